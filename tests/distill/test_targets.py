"""What a student must output for one DDIM step to land where two of its teacher's do."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import get_args

import pytest
import torch
from torch import Tensor

from fewstep.diffusion import NoiseSchedule, ddim_step, step_indices, to_epsilon, to_sample, to_velocity
from fewstep.diffusion.prediction import PredictionType
from fewstep.distill import step_target
from fewstep.models import SCHEDULER_CONFIG

TYPES: tuple[PredictionType, ...] = get_args(PredictionType)
Times = tuple[Tensor, Tensor, Tensor, Tensor]


def _angles(phi_t: float, phi_s: float) -> Times:
    t, s = torch.tensor(phi_t, dtype=torch.float64), torch.tensor(phi_s, dtype=torch.float64)
    return t.cos(), t.sin(), s.cos(), s.sin()


def _ends() -> tuple[Tensor, Tensor]:
    z_t, z_s = torch.randn(2, 3, 4, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return z_t, z_s


@pytest.mark.parametrize("angles", [(1.5, 1.2), (1.0, 0.2), (0.4, 0.05), (1.3, 0.0)])
def test_targets_of_all_types_say_the_same(angles: tuple[float, float]) -> None:
    times = _angles(*angles)
    alpha, sigma = times[:2]
    z_t, z_s = _ends()
    x = step_target(z_t, z_s, *times, "sample")
    v = step_target(z_t, z_s, *times, "v_prediction")
    eps = step_target(z_t, z_s, *times, "epsilon")
    for output, kind in ((v, "v_prediction"), (eps, "epsilon")):
        torch.testing.assert_close(to_sample(output, z_t, alpha, sigma, kind), x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(to_velocity(eps, z_t, alpha, sigma, "epsilon"), v, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(to_epsilon(v, z_t, alpha, sigma, "v_prediction"), eps, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("angles", [(1.5, 1.2), (1.0, 0.2), (0.4, 0.05), (1.3, 0.0)])
def test_x_target_is_salimans_and_hos(angles: tuple[float, float]) -> None:
    alpha_t, sigma_t, alpha_s, sigma_s = times = _angles(*angles)
    z_t, z_s = _ends()
    ratio = sigma_s / sigma_t
    expected = (z_s - ratio * z_t) / (alpha_s - ratio * alpha_t)
    torch.testing.assert_close(step_target(z_t, z_s, *times, "sample"), expected, rtol=1e-6, atol=1e-9)


def test_with_s_clean_the_x_target_is_the_picture() -> None:
    z_t, z_s = _ends()
    torch.testing.assert_close(step_target(z_t, z_s, *_angles(1.1, 0.0), "sample"), z_s, rtol=0, atol=1e-15)


@pytest.mark.parametrize("kind", TYPES)
def test_a_student_that_hits_its_target_lands_on_z_s(kind: PredictionType) -> None:
    z_t, z_s = _ends()
    for phi_t, phi_s in ((1.5, 1.2), (0.9, 0.3), (1.3, 0.0)):
        times = _angles(phi_t, phi_s)
        target = step_target(z_t, z_s, *times, kind)
        torch.testing.assert_close(ddim_step(target, z_t, *times, kind), z_s, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
@pytest.mark.parametrize("steps", [1, 2, 8, 32])
def test_in_float32_from_pure_noise_on_the_shipped_grid(kind: PredictionType, steps: int) -> None:
    schedule = NoiseSchedule.from_scheduler_config(SCHEDULER_CONFIG)
    indices = step_indices(steps)
    z_t, z_s = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    for t, s in pairwise(indices):
        at_t, at_s = (schedule.alpha_sigma(torch.full((3,), index)) for index in (t, s))
        target = step_target(z_t, z_s, *at_t, *at_s, kind)
        assert bool(torch.isfinite(target).all())
        torch.testing.assert_close(ddim_step(target, z_t, *at_t, *at_s, kind), z_s, rtol=0, atol=1e-5)


def test_the_target_is_a_turn_of_constant_speed() -> None:
    """On the circle (alpha, sigma) a constant v takes z_t to z_s over any angle: the target of that arc is v itself."""
    x, eps = _ends()
    alpha_t, sigma_t, alpha_s, sigma_s = times = _angles(1.2, 1.2 - math.pi / 8)
    z_t, z_s = alpha_t * x + sigma_t * eps, alpha_s * x + sigma_s * eps
    torch.testing.assert_close(step_target(z_t, z_s, *times, "v_prediction"), alpha_t * eps - sigma_t * x)
    torch.testing.assert_close(step_target(z_t, z_s, *times, "sample"), x)
    torch.testing.assert_close(step_target(z_t, z_s, *times, "epsilon"), eps)
