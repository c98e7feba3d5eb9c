"""Picture files and what they say about themselves."""

import io

import numpy as np
import pytest
from PIL import Image

from fewstep.serve.encode import Provenance, encode_image

PIXELS = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
PROVENANCE = Provenance(
    prompt="a red apple, “twemoji” 🍎", seed=7, num_inference_steps=4, guidance_scale=3.5, model="emoji@3"
)


def test_png_is_lossless_and_says_how_it_was_made() -> None:
    image = Image.open(io.BytesIO(encode_image(Image.fromarray(PIXELS), PROVENANCE)))
    assert np.array_equal(np.asarray(image), PIXELS)
    assert image.text == {  # type: ignore[attr-defined]
        "Title": "AI-generated", "Software": "fewstep", "prompt": PROVENANCE.prompt, "seed": "7",
        "num_inference_steps": "4", "guidance_scale": "3.5", "model": "emoji@3",
    }  # fmt: skip


@pytest.mark.parametrize("output_format", ["webp", "jpeg"])
def test_lossy_files_say_so_in_exif_and_shrink_with_quality(output_format: str) -> None:
    picture = Image.fromarray(PIXELS)
    files = [encode_image(picture, PROVENANCE, output_format=output_format, quality=q) for q in (20, 95)]  # type: ignore[arg-type]
    image = Image.open(io.BytesIO(files[0]))
    assert image.format == output_format.upper()
    assert image.size == (24, 16)
    assert "AI-generated" in image.getexif()[0x010E]
    assert "seed: 7" in image.getexif()[0x010E]
    assert len(files[0]) < len(files[1])


def test_the_same_picture_is_the_same_file() -> None:
    assert encode_image(Image.fromarray(PIXELS), PROVENANCE) == encode_image(Image.fromarray(PIXELS), PROVENANCE)


def test_control_characters_of_a_prompt_do_not_reach_the_file() -> None:
    provenance = Provenance(prompt="a\x00b\x1bc", seed=1, num_inference_steps=1, guidance_scale=1.0, model="m")
    image = Image.open(io.BytesIO(encode_image(Image.fromarray(PIXELS), provenance)))
    assert image.text["prompt"] == "abc"  # type: ignore[attr-defined]
