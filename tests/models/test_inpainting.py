"""Inpainting models: the hole as the stock pipeline shows it, its folder, and its student in that pipeline."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline
from torch import Tensor

from counted import counted
from fewstep.diffusion import ddim
from fewstep.errors import DataError, ModelError
from fewstep.models import (
    AutoencoderArchitecture,
    InpaintingParts,
    StudentInfo,
    TextToImageParts,
    add_inpainting,
    check_mask,
    initial_noise,
    load_model,
    load_text_to_image,
    make_student,
    save_student,
)
from tiny import pictures_with_holes, tiny_inpainting, tiny_sdxl, tiny_teacher, w_student

W = 3.0


@pytest.fixture(scope="module")
def inpainting() -> InpaintingParts:
    parts = tiny_inpainting()
    # Without the posterior's noise, which the pipeline draws, both see the same latents of the masked picture.
    with torch.no_grad():
        parts.vae.quant_conv.weight[4:] = 0
        parts.vae.quant_conv.bias[4:] = -30
    return parts


@pytest.fixture(scope="module")
def samples() -> list[dict[str, Any]]:
    return pictures_with_holes(3)


@pytest.fixture(scope="module")
def folder(inpainting: InpaintingParts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inpainting") / "teacher"
    inpainting.save(folder)
    return folder


def _stock(folder: Path, samples: list[dict[str, Any]], noise: Tensor, *, steps: int) -> tuple[Tensor, list[int]]:
    with warnings.catch_warnings():
        # diffusers warns when it has to mend a configuration: what we ship must need no mending.
        warnings.simplefilter("error", FutureWarning)
        pipeline = StableDiffusionInpaintPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    with counted(pipeline.unet) as calls:
        latents = pipeline(
            [sample["caption"] for sample in samples],
            image=torch.stack([sample["pixels"] for sample in samples]) / 255,
            mask_image=torch.stack([sample["mask"] for sample in samples]).float(),
            strength=1.0,
            num_inference_steps=steps,
            guidance_scale=1 + W,
            latents=noise,
            output_type="latent",
        ).images
    return latents, calls


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_a_student_gives_the_same_latents_in_the_stock_pipeline(
    inpainting: InpaintingParts, samples: list[dict[str, Any]], tmp_path: Path, steps: int
) -> None:
    info = StudentInfo("progressive", steps, 0.0, 6.0, 4.0, "tiny", "test")
    save_student(tmp_path, inpainting, w_student(inpainting.unet), info)
    noise = initial_noise(range(3), (4, 4, 4))
    stock, calls = _stock(tmp_path, samples, noise, steps=steps)
    assert calls == [3] * steps
    parts = load_model(tmp_path)
    model = parts.denoiser()
    settings = {"schedule": model.schedule, "prediction_type": model.prediction_type, "num_inference_steps": steps}
    condition = parts.conditions(samples)
    with counted(parts.network) as calls:
        own = ddim(model.conditional(condition, W), noise, **settings)
    assert calls == [3] * steps
    torch.testing.assert_close(own, stock, rtol=0, atol=1e-5)
    for changed in ("mask", "masked_latents"):
        other = ddim(model.conditional({**condition, changed: condition[changed].flip(0)}, W), noise, **settings)
        assert float((other - stock).abs().max()) > 1e-3, f"{changed} has no effect, so this test shows nothing"


def test_the_guided_teacher_is_the_stock_pipelines_guidance(
    inpainting: InpaintingParts, samples: list[dict[str, Any]], folder: Path
) -> None:
    noise = initial_noise(range(3), (4, 4, 4))
    stock, calls = _stock(folder, samples, noise, steps=4)
    assert calls == [6] * 4
    model = inpainting.denoiser()
    own = ddim(
        model.guided(inpainting.conditions(samples), W),
        noise,
        schedule=model.schedule,
        prediction_type=model.prediction_type,
        num_inference_steps=4,
    )
    torch.testing.assert_close(own, stock, rtol=0, atol=1e-5)


def test_both_branches_see_the_hole(inpainting: InpaintingParts, samples: list[dict[str, Any]]) -> None:
    condition = inpainting.conditions(samples)
    assert {name: tuple(value.shape) for name, value in condition.items()} == {
        "text": (3, 16, 16),
        "mask": (3, 1, 4, 4),
        "masked_latents": (3, 4, 4, 4),
    }
    assert set(condition["mask"].unique().tolist()) == {0.0, 1.0}
    without = inpainting.denoiser().unconditional(condition)
    assert torch.equal(without["text"], inpainting.encode_prompts([""]).expand(3, -1, -1))
    assert torch.equal(without["mask"], condition["mask"])
    assert torch.equal(without["masked_latents"], condition["masked_latents"])


def test_nothing_of_the_hole_is_told(inpainting: InpaintingParts, samples: list[dict[str, Any]]) -> None:
    before = inpainting.conditions(samples)
    inverted = [
        {**sample, "pixels": torch.where(sample["mask"], 255 - sample["pixels"], sample["pixels"])}
        for sample in samples
    ]
    after = inpainting.conditions(inverted)
    assert all(torch.equal(before[name], after[name]) for name in before)
    outside = [
        {**sample, "pixels": torch.where(sample["mask"], sample["pixels"], 255 - sample["pixels"])}
        for sample in samples
    ]
    assert not torch.equal(inpainting.conditions(outside)["masked_latents"], before["masked_latents"])


def test_a_fresh_inpainting_model_draws_what_the_text_model_drew(samples: list[dict[str, Any]]) -> None:
    text_model = tiny_teacher()
    parts = add_inpainting(text_model)
    assert parts.unet.config["in_channels"] == 9
    assert parts.vae is text_model.vae
    assert add_inpainting(parts) is parts
    condition = parts.conditions(samples)
    z, time = torch.randn(3, 4, 4, 4), torch.tensor([999, 500, 3])
    with torch.no_grad():
        expected = text_model.unet(z, time, condition["text"]).sample
        assert torch.equal(parts.denoiser().conditional(condition)(z, time), expected)
    assert text_model.unet.conv_in.weight.shape[1] == 4, "the text model stays as it is"


def test_save_and_load_keep_every_weight(inpainting: InpaintingParts, folder: Path) -> None:
    loaded = load_model(folder)
    assert isinstance(loaded, InpaintingParts)
    for name in ("unet", "vae", "text_encoder"):
        before, after = getattr(inpainting, name).state_dict(), getattr(loaded, name).state_dict()
        assert all(torch.equal(before[key], after[key]) for key in before)
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "StableDiffusionInpaintPipeline"
    student = make_student(loaded.unet, embedding_dim=16)
    assert student.config["in_channels"] == 9


def test_a_model_that_needs_a_hole_does_not_draw_from_a_prompt(folder: Path) -> None:
    with pytest.raises(ModelError, match="of the family inpainting, which draws from more than a prompt"):
        load_text_to_image(folder)


def test_a_text_model_in_an_inpainting_folder_is_refused(folder: Path, teacher_folder: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(folder, tmp_path / "model"))
    shutil.rmtree(broken / "unet")
    shutil.copytree(teacher_folder / "unet", broken / "unet")
    with pytest.raises(ModelError, match=r"takes 4 channels and its VAE has 4: StableDiffusionInpaintPipeline needs 9"):
        load_model(broken)


def test_an_inpainting_model_in_a_text_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(folder, tmp_path / "model"))
    index = json.loads((broken / "model_index.json").read_text())
    (broken / "model_index.json").write_text(json.dumps({**index, "_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(ModelError, match=r"takes 9 channels but its VAE has 4.*save it with StableDiffusionInpaint"):
        load_model(broken)


def test_other_latents_cannot_be_inpainted_by_diffusers() -> None:
    parts = tiny_teacher()
    vae = AutoencoderArchitecture(resolution=16, block_out_channels=(8, 16, 16), norm_num_groups=4, latent_channels=3)
    parts.vae = vae.build()
    with pytest.raises(ModelError, match=r"needs 9 .* and a VAE of 4; name another model"):
        add_inpainting(parts)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(1, 8, 8, dtype=torch.bool), r"\(1, 8, 8\) and the picture \(3, 16, 16\).*must be \(1, 16, 16\)"),
        (torch.zeros(16, 16, dtype=torch.bool), r"must be \(1, 16, 16\), as high and wide as its picture"),
        (torch.full((1, 16, 16), 0.25), "the mask holds 0.25, and each pixel must be 0"),
        (torch.full((1, 16, 16), 255, dtype=torch.uint8), "holds 255.*mask > 127"),
        (None, "the sample '0000' has no mask"),
    ],
)
def test_masks_that_do_not_fit(
    inpainting: InpaintingParts, samples: list[dict[str, Any]], mask: Tensor | None, message: str
) -> None:
    sample = {name: value for name, value in samples[0].items() if name != "mask"}
    with pytest.raises(DataError, match=message):
        inpainting.conditions([sample if mask is None else {**sample, "mask": mask}])


def test_masks_of_numbers_are_taken(samples: list[dict[str, Any]]) -> None:
    mask, pixels = samples[0]["mask"], samples[0]["pixels"]
    for kind in (torch.float32, torch.uint8, torch.bool):
        assert torch.equal(check_mask(mask.to(kind), pixels), mask)


def test_only_stable_diffusions_kind_can_be_grown() -> None:
    assert isinstance(add_inpainting(tiny_teacher()), InpaintingParts)
    assert not isinstance(tiny_sdxl(), TextToImageParts), "what is not of this kind cannot be handed in by its type"
