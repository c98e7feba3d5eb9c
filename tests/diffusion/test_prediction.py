"""Prediction types say the same thing, and so do their DDIM steps."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import get_args

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor

from fewstep.diffusion import NoiseSchedule, ddim_step, guide, step_indices, to_epsilon, to_sample, to_velocity
from fewstep.diffusion.prediction import PredictionType, check_prediction_type, from_velocity
from fewstep.errors import ModelError
from fewstep.models import SCHEDULER_CONFIG, student_scheduler_config

TYPES: tuple[PredictionType, ...] = get_args(PredictionType)
F64 = torch.float64


def _angle(phi: float) -> tuple[Tensor, Tensor]:
    return torch.tensor(math.cos(phi), dtype=F64), torch.tensor(math.sin(phi), dtype=F64)


def _outputs(x: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> dict[PredictionType, Tensor]:
    return {"epsilon": eps, "v_prediction": alpha * eps - sigma * x, "sample": x}


@pytest.mark.parametrize("phi", [0.01, 0.7, 1.2, 1.56])
@pytest.mark.parametrize("kind", TYPES)
def test_conversions_round_trip(kind: PredictionType, phi: float) -> None:
    x, eps = torch.randn(2, 3, 4, 4, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    alpha, sigma = _angle(phi)
    z = alpha * x + sigma * eps
    output = _outputs(x, eps, alpha, sigma)[kind]
    # A division by a small alpha or sigma magnifies rounding as much.
    tolerance = {"rtol": 0, "atol": 1e-14 / min(float(alpha), float(sigma)) + 1e-14}
    v = to_velocity(output, z, alpha, sigma, kind)
    torch.testing.assert_close(v, alpha * eps - sigma * x, **tolerance)
    torch.testing.assert_close(to_sample(output, z, alpha, sigma, kind), x, **tolerance)
    torch.testing.assert_close(to_epsilon(output, z, alpha, sigma, kind), eps, **tolerance)
    torch.testing.assert_close(from_velocity(v, z, alpha, sigma, kind), output, **tolerance)


@pytest.mark.parametrize("phi_s", [0.0, 0.3, 1.0])
def test_ddim_steps_of_all_types_agree(phi_s: float) -> None:
    x, eps = torch.randn(2, 3, 4, 4, 4, dtype=F64, generator=torch.Generator().manual_seed(1))
    (alpha_t, sigma_t), (alpha_s, sigma_s) = _angle(1.3), _angle(phi_s)
    z = alpha_t * x + sigma_t * eps
    for kind, output in _outputs(x, eps, alpha_t, sigma_t).items():
        z_s = ddim_step(output, z, alpha_t, sigma_t, alpha_s, sigma_s, kind)
        torch.testing.assert_close(z_s, alpha_s * x + sigma_s * eps, rtol=0, atol=1e-10)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", TYPES)
def test_ddim_step_is_the_shipped_schedulers_step(kind: PredictionType, steps: int) -> None:
    config = {**SCHEDULER_CONFIG, "prediction_type": kind, "rescale_betas_zero_snr": kind != "epsilon"}
    scheduler = DDIMScheduler.from_config(student_scheduler_config(config))
    scheduler.set_timesteps(steps)
    schedule = NoiseSchedule.from_scheduler_config(config)
    indices = step_indices(steps)
    assert scheduler.timesteps.tolist() == indices[:-1]
    generator = torch.Generator().manual_seed(steps)
    for t, s in pairwise(indices):
        z, output = torch.randn(2, 2, 4, 4, 4, generator=generator)
        at_t, at_s = (schedule.alpha_sigma(torch.full((2,), index)) for index in (t, s))
        expected = scheduler.step(output, torch.tensor(t), z, eta=0.0).prev_sample
        torch.testing.assert_close(ddim_step(output, z, *at_t, *at_s, kind), expected, rtol=1e-5, atol=2e-5)


def test_a_v_step_from_pure_noise_to_the_clean_picture_is_minus_v() -> None:
    zero, one = torch.zeros(()), torch.ones(())
    v, z = torch.randn(2, 5)
    assert torch.equal(ddim_step(v, z, zero, one, one, zero, "v_prediction"), -v)


def test_guidance_is_the_same_in_every_prediction_type() -> None:
    generator = torch.Generator().manual_seed(2)
    x_cond, x_free, eps = torch.randn(3, 3, 4, 4, 4, dtype=F64, generator=generator)
    alpha, sigma = _angle(0.9)
    z = alpha * x_cond + sigma * eps
    w = torch.tensor([0.0, 1.5, 7.0], dtype=F64)
    expected = guide(x_cond, x_free, w)
    for kind in TYPES:
        pair = [
            from_velocity(to_velocity(x, z, alpha, sigma, "sample"), z, alpha, sigma, kind) for x in (x_cond, x_free)
        ]
        got = to_sample(guide(pair[0], pair[1], w), z, alpha, sigma, kind)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def test_guide_takes_one_weight_for_each_row() -> None:
    conditional, unconditional = torch.full((3, 1, 2, 2), 2.0), torch.full((3, 1, 2, 2), 1.0)
    guided = guide(conditional, unconditional, torch.tensor([0.0, 1.0, 4.0]))
    assert guided[:, 0, 0, 0].tolist() == [2.0, 3.0, 6.0]
    assert torch.equal(guide(conditional, unconditional, 4.0)[0], guided[2])
    assert torch.equal(guide(conditional, unconditional, 0.0), conditional)


def test_an_unknown_prediction_type_is_refused() -> None:
    assert check_prediction_type("sample") == "sample"
    with pytest.raises(ModelError, match="prediction_type='flow' is unknown; it must be one of epsilon, v_prediction"):
        check_prediction_type("flow")
