"""The models that ship with fewstep: small, with a card, and students that do better than plain sampling."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from fewstep.diffusion import ddim
from fewstep.models import TextToImageParts, initial_noise, load_parts, read_student_info
from fewstep.tracking.fetch import ASSETS, packaged_model

PROMPTS = ["a red apple, twemoji", "a dog face on blue, openmoji", "a mushroom", "two fruits on black, twemoji"] * 4
W = 2.0


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWSTEP_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="module")
def teacher() -> TextToImageParts:
    return load_parts(packaged_model("emoji-teacher"))


def _draw(parts: TextToImageParts, noise: Tensor, *, steps: int, guided: bool) -> Tensor:
    embeddings = parts.encode_prompts(PROMPTS)
    model = (
        parts.denoiser().guided({"text": embeddings}, W)
        if guided
        else parts.denoiser().conditional({"text": embeddings}, W)
    )
    settings = {"schedule": parts.schedule, "prediction_type": parts.prediction_type, "num_inference_steps": steps}
    return ddim(model, noise, **settings)


@pytest.fixture(scope="module")
def noise(teacher: TextToImageParts) -> Tensor:
    return initial_noise(range(len(PROMPTS)), teacher.latent_shape)


@pytest.fixture(scope="module")
def reference(teacher: TextToImageParts, noise: Tensor) -> Tensor:
    return _draw(teacher, noise, steps=50, guided=True)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_shipped_student_is_nearer_its_teacher_than_plain_sampling(
    steps: int, teacher: TextToImageParts, noise: Tensor, reference: Tensor
) -> None:
    folder = packaged_model(f"emoji-student-{steps}")
    info = read_student_info(folder)
    assert info is not None
    assert (info.num_inference_steps, info.teacher) == (steps, "asset:emoji-teacher")
    student = _draw(load_parts(folder), noise, steps=steps, guided=False)
    # At equal evaluations; one guided step already takes two.
    plain = _draw(teacher, noise, steps=max(1, steps // 2), guided=True)
    assert float((student - reference).square().mean()) < 0.7 * float((plain - reference).square().mean())

    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    stock = pipeline(
        PROMPTS, num_inference_steps=steps, guidance_scale=1 + W, latents=noise, output_type="latent"
    ).images
    torch.testing.assert_close(stock, student, rtol=0, atol=1e-4)


def test_what_ships_is_small_and_has_a_card() -> None:
    folders = [folder for folder in ASSETS.iterdir() if folder.is_dir()]
    assert {folder.name for folder in folders} >= {"emoji-teacher", *(f"emoji-student-{n}" for n in (1, 2, 4))}
    for folder in folders:
        assert sum(file.stat().st_size for file in folder.rglob("*")) <= 20 * 10**6
        card = Path(folder, "README.md").read_text(encoding="utf-8")
        assert "CC BY-SA 4.0" in card
