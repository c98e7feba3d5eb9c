"""Sampling for the comparison against stock diffusers, and the count of network evaluations."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor

from fewstep.diffusion import NoiseSchedule
from fewstep.errors import ModelError, SamplingError
from fewstep.evaluate.baselines import Conditions, RowSpec, Sampler, dpm_solver
from fewstep.models import SCHEDULER_CONFIG, Denoiser, TextToImageParts, initial_noise, student_scheduler_config

GUIDANCE_SCALE = 3.0
PROMPTS = ["a red apple, twemoji", "two birds on blue", "an emoji"]


@pytest.fixture(scope="module")
def conditions(teacher: TextToImageParts) -> Conditions:
    noise = initial_noise([4, 5, 6], teacher.latent_shape)
    return Conditions({"text": teacher.encode_prompts(PROMPTS)}, noise)


@pytest.fixture(scope="module")
def sampler(teacher: TextToImageParts, student: UNet2DConditionModel) -> Sampler:
    model = teacher.denoiser()
    return Sampler(
        teacher=model,
        students={2: model.with_network(student), 4: model.with_network(student)},
        scheduler_config=teacher.scheduler_config,
        guidance_scale=GUIDANCE_SCALE,
    )


def stock_pipeline(parts: TextToImageParts, unet: UNet2DConditionModel, noise: Tensor, steps: int) -> Tensor:
    pipeline = parts.pipeline()
    pipeline.unet = unet
    pipeline.scheduler = DDIMScheduler.from_config(student_scheduler_config(parts.scheduler_config))
    pipeline.set_progress_bar_config(disable=True)
    out = pipeline(
        PROMPTS, num_inference_steps=steps, guidance_scale=GUIDANCE_SCALE, latents=noise.clone(), output_type="latent"
    )
    return out.images


@pytest.mark.parametrize("steps", [1, 4])
def test_guided_teacher_is_the_stock_pipeline(
    teacher: TextToImageParts, sampler: Sampler, conditions: Conditions, steps: int
) -> None:
    samples = sampler(RowSpec("ddim", steps), conditions, batch_size=2)
    stock = stock_pipeline(teacher, teacher.unet, conditions.noise, steps)
    torch.testing.assert_close(samples.latents, stock, atol=1e-5, rtol=1e-4)
    assert samples.network_evaluations == 2 * steps


def test_student_is_the_stock_pipeline_and_takes_half_the_evaluations(
    teacher: TextToImageParts, student: UNet2DConditionModel, sampler: Sampler, conditions: Conditions
) -> None:
    samples = sampler(RowSpec("student", 4), conditions, batch_size=2)
    torch.testing.assert_close(
        samples.latents, stock_pipeline(teacher, student, conditions.noise, 4), atol=1e-5, rtol=1e-4
    )
    assert samples.network_evaluations == 4
    assert samples.seconds > 0


@pytest.mark.parametrize("steps", [1, 2])
def test_dpm_solver_is_ddim_at_one_and_two_steps(sampler: Sampler, conditions: Conditions, steps: int) -> None:
    first = sampler(RowSpec("dpmpp", steps), conditions, batch_size=3)
    second = sampler(RowSpec("ddim", steps), conditions, batch_size=3)
    # diffusers keeps alpha at 2⁻¹² where ours is 0.
    torch.testing.assert_close(first.latents, second.latents, atol=5e-3, rtol=5e-3)
    assert first.network_evaluations == 2 * steps


@pytest.mark.parametrize("steps", [2, 4, 8, 50])
def test_dpm_solver_visits_our_grid(steps: int) -> None:
    from fewstep.diffusion import step_indices

    scheduler = dpm_solver(SCHEDULER_CONFIG, "v_prediction")
    scheduler.set_timesteps(steps)
    assert [*scheduler.timesteps.tolist(), -1] == step_indices(steps)
    assert scheduler.sigmas[-1] == 0


def test_dpm_solver_beats_ddim_on_a_known_distribution() -> None:
    """Data N(0.5, 0.3²): the exact velocity is known, so is the end of every trajectory."""
    mean, sd = 0.5, 0.3
    schedule = NoiseSchedule.from_scheduler_config(SCHEDULER_CONFIG)

    class Exact(torch.nn.Module):
        device = torch.device("cpu")
        dtype = torch.float32
        config: ClassVar = {"time_cond_proj_dim": None}

        def forward(self, z: Tensor, index: Tensor) -> Tensor:
            alpha, sigma = schedule.alpha_sigma(index)
            x = mean + alpha * sd**2 / (alpha**2 * sd**2 + sigma**2) * (z - alpha * mean)
            return (alpha * z - x) / sigma

    noise = initial_noise(range(200), (1, 1, 1))
    conditions = Conditions({"text": torch.zeros(200, 1, 1)}, noise)
    model = Denoiser(
        network=Exact(),
        forward=lambda network, z, time, condition, w_embedding: network(z, time),
        schedule=schedule,
        prediction_type="v_prediction",
        condition_names=("text",),
        null={"text": torch.zeros(1, 1, 1)},
    )
    sampler = Sampler(model, {}, SCHEDULER_CONFIG, 1.0)
    truth = mean + sd * noise
    errors = {
        (method, steps): float(
            (sampler(RowSpec(method, steps), conditions, batch_size=200).latents - truth).square().mean().sqrt()
        )
        for method in ("ddim", "dpmpp")
        for steps in (4, 8, 50)
    }
    for steps in (4, 8, 50):
        assert errors["dpmpp", steps] < errors["ddim", steps]
    assert errors["dpmpp", 50] < errors["dpmpp", 8] < errors["dpmpp", 4], errors
    assert errors["dpmpp", 50] < 0.03


def test_student_that_is_missing_or_of_a_single_weight(
    teacher: TextToImageParts, sampler: Sampler, conditions: Conditions
) -> None:
    with pytest.raises(ModelError, match=r"no student for 8 steps.*\[2, 4\]"):
        sampler(RowSpec("student", 8), conditions, batch_size=3)
    # Whether a student without an input for w was made for one weight, the evaluate stage knows (its tests hold it).
    plain = Sampler(teacher.denoiser(), {1: teacher.denoiser()}, teacher.scheduler_config, GUIDANCE_SCALE)
    assert plain(RowSpec("student", 1), conditions, batch_size=3).network_evaluations == 1, "it is not guided"


def test_epsilon_network_with_zero_terminal_snr() -> None:
    with pytest.raises(SamplingError, match="v_prediction first"):
        dpm_solver(SCHEDULER_CONFIG, "epsilon")
