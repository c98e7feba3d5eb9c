"""A student's folder in an unmodified StableDiffusionPipeline: N evaluations, and the pictures of our own sampler."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from counted import counted
from fewstep.diffusion import ddim
from fewstep.models import (
    StudentInfo,
    initial_noise,
    load_parts,
    make_student,
    save_student,
)
from tiny import tiny_student_folder, tiny_teacher

PROMPTS = ["a red apple", "two birds on blue", "an emoji"]


def _pipeline(folder: Path) -> StableDiffusionPipeline:
    with warnings.catch_warnings():
        # diffusers warns when it has to mend a configuration: what we ship must need no mending.
        warnings.simplefilter("error", FutureWarning)
        pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _both(folder: Path, *, steps: int, w: float, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Latents of the stock pipeline and of ours, each with exactly `steps` evaluations of the U-Net."""
    pipeline = _pipeline(folder)
    with counted(pipeline.unet) as stock_calls:
        stock = pipeline(
            PROMPTS, num_inference_steps=steps, guidance_scale=1 + w, latents=noise, output_type="latent"
        ).images
    assert stock_calls == [len(PROMPTS)] * steps
    parts = load_parts(folder)
    with counted(parts.unet) as own_calls:
        own = ddim(
            parts.denoiser().conditional({"text": parts.encode_prompts(PROMPTS)}, w),
            noise,
            schedule=parts.schedule,
            prediction_type=parts.prediction_type,
            num_inference_steps=steps,
        )
    assert own_calls == [len(PROMPTS)] * steps
    return stock, own


@pytest.mark.parametrize("pooled_text", [False, True], ids=["as Stable Diffusion", "pooled text"])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_a_student_gives_the_same_latents_in_the_stock_pipeline(tmp_path: Path, steps: int, pooled_text: bool) -> None:
    folder = tiny_student_folder(tmp_path / "student", num_inference_steps=steps, pooled_text=pooled_text)
    noise = initial_noise(range(3), (4, 4, 4))
    stock, own = _both(folder, steps=steps, w=3.0, noise=noise)
    torch.testing.assert_close(own, stock, rtol=0, atol=1e-5)
    other, _ = _both(folder, steps=steps, w=0.5, noise=noise)
    assert float((other - stock).abs().max()) > 1e-3, "w has no effect, so this test shows nothing"


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("kind", ["epsilon", "sample"])
def test_so_does_a_student_of_another_prediction_type(tmp_path: Path, kind: str, steps: int) -> None:
    teacher = tiny_teacher(prediction_type=kind, rescale_betas_zero_snr=False)
    unet = make_student(teacher.unet, embedding_dim=16)
    torch.manual_seed(1)
    torch.nn.init.normal_(unet.time_embedding.cond_proj.weight, std=0.5)
    info = StudentInfo("progressive", steps, 0.0, 6.0, 4.0, "tiny", "test")
    save_student(tmp_path / "student", teacher, unet.eval(), info)
    stock, own = _both(tmp_path / "student", steps=steps, w=2.0, noise=initial_noise(range(3), (4, 4, 4)))
    # An eps output is divided by alpha = 0.068 at the first step, which magnifies rounding 15-fold.
    torch.testing.assert_close(own, stock, rtol=1e-5, atol=1e-5 if kind == "sample" else 2e-4)


def test_the_guided_teacher_is_the_stock_pipelines_guidance(tmp_path: Path) -> None:
    teacher = tiny_teacher()
    teacher.save(tmp_path)
    pipeline = _pipeline(tmp_path)
    noise = initial_noise(range(3), (4, 4, 4))
    with counted(pipeline.unet) as calls:
        stock = pipeline(PROMPTS, num_inference_steps=4, guidance_scale=3.5, latents=noise, output_type="latent").images
    assert calls == [6] * 4
    own = ddim(
        teacher.denoiser().guided({"text": teacher.encode_prompts(PROMPTS)}, 2.5),
        noise,
        schedule=teacher.schedule,
        prediction_type=teacher.prediction_type,
        num_inference_steps=4,
    )
    torch.testing.assert_close(own, stock, rtol=0, atol=1e-5)


def test_decoded_pictures_are_the_pipelines_to_one_level(tmp_path: Path) -> None:
    parts = load_parts(tiny_student_folder(tmp_path / "student", num_inference_steps=2))
    noise = initial_noise([7, 8], (4, 4, 4))
    images = _pipeline(tmp_path / "student")(
        PROMPTS[:2], num_inference_steps=2, guidance_scale=4.0, latents=noise, output_type="np"
    ).images
    latents = ddim(
        parts.denoiser().conditional({"text": parts.encode_prompts(PROMPTS[:2])}, 3.0),
        noise,
        schedule=parts.schedule,
        prediction_type=parts.prediction_type,
        num_inference_steps=2,
    )
    own = parts.decode(latents).permute(0, 2, 3, 1).float() / 255
    assert float((own - torch.from_numpy(images)).abs().max()) <= 1 / 255


def test_initial_noise_belongs_to_its_seed() -> None:
    noise = initial_noise([3, 1, 2], (4, 4, 4))
    assert torch.equal(initial_noise([1], (4, 4, 4))[0], noise[1])
    assert not torch.equal(noise[0], noise[1])
