"""The continuous cosine schedule: its ends, its constant angle, and what networks are told of its times."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from typing import get_args

import pytest
import torch
from torch import Tensor

from fewstep.diffusion import CosineSchedule, DiscreteSchedule, NoiseSchedule, RowRandom, ddim_step
from fewstep.diffusion.prediction import PredictionType, convert_output
from fewstep.diffusion.schedulers import CosineDDIMScheduler
from fewstep.distill import step_target
from fewstep.errors import ModelError, RecipeError

COSINE = CosineSchedule()
TYPES: tuple[PredictionType, ...] = get_args(PredictionType)


def _time(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_log_snr_is_20_0_and_minus_20_and_falls_all_the_way() -> None:
    log_snr = COSINE.snr(_time(0, 0.5, 1)).double().log()
    torch.testing.assert_close(log_snr, _time(20, 0, -20), rtol=0, atol=1e-5)
    assert bool((COSINE.snr(torch.linspace(0, 1, 500, dtype=torch.float64)).diff() < 0).all())


def test_another_range_of_log_snr_has_its_ends() -> None:
    log_snr = CosineSchedule(-8, 12).snr(_time(0, 1)).double().log()
    torch.testing.assert_close(log_snr, _time(12, -8), rtol=0, atol=1e-5)


def test_ends_of_alpha_and_sigma() -> None:
    alpha, sigma = (value.flatten().double() for value in COSINE.alpha_sigma(_time(0, 1)))
    small = math.exp(-10)  # 4.54e-5: tan b
    # In float32 the one end is 1 to its last digit; the small one must keep its digits all the same.
    assert [float(alpha[0]), float(sigma[1])] == [1.0, 1.0]
    torch.testing.assert_close(torch.stack([sigma[0], alpha[1]]), _time(small, small), rtol=1e-5, atol=0)
    assert COSINE.last_alpha == pytest.approx(small, rel=1e-6)
    assert 1 - math.cos(float(COSINE.angle(_time(0)))) == pytest.approx(1.03e-9, rel=1e-2)


@pytest.mark.parametrize("steps", [1, 3, 16, 1024])
def test_every_step_turns_by_the_same_angle(steps: int) -> None:
    times = COSINE.times(steps)
    assert times.tolist() == [i / steps for i in range(steps + 1)]
    angle = COSINE.angle(times).diff()
    expected = (math.pi / 2 - 2 * math.exp(-10)) / steps
    torch.testing.assert_close(angle, torch.full_like(angle, expected), rtol=1e-9, atol=0)


def test_networks_are_told_1000_at_pure_noise_and_0_at_the_clean_picture() -> None:
    """Salimans & Ho tell arctan(exp(−log SNR/2))/(pi/2), times 1000: a third of it where tan is 1/sqrt(3)."""
    b = math.atan(math.exp(-10))
    at_third = (math.pi / 6 - b) / (math.pi / 2 - 2 * b)
    told = COSINE.network_time(_time(0, at_third, 0.5, 1)).double()
    assert told.tolist() == pytest.approx([1000 * b / (math.pi / 2), 1000 / 3, 500, 1000 * (1 - 2 * b / math.pi)])
    torch.testing.assert_close(COSINE.time_of_network(told), _time(0, at_third, 0.5, 1), rtol=0, atol=1e-7)


def test_told_times_come_back_for_every_time_of_training() -> None:
    time = COSINE.random_times(RowRandom(seed=0, step=0, rows=range(200)))
    assert time.dtype == torch.float64
    assert 0 <= float(time.min()) < 0.05
    assert 0.95 < float(time.max()) < 1
    torch.testing.assert_close(COSINE.time_of_network(COSINE.network_time(time)), time, rtol=0, atol=1e-7)
    torch.testing.assert_close(COSINE.fraction(time), time.float())


def test_a_scheduler_configuration_is_this_schedule() -> None:
    scheduler = CosineDDIMScheduler(logsnr_min=-15, logsnr_max=10)
    schedule = NoiseSchedule.from_scheduler_config(json.loads(scheduler.to_json_string()))
    assert schedule == CosineSchedule(-15, 10)
    assert schedule.same_as(scheduler.schedule)
    assert not schedule.same_as(COSINE)
    assert not schedule.same_as(NoiseSchedule.from_scheduler_config({"num_train_timesteps": 9, "trained_betas": [0.1]}))


def test_upside_down_ranges_and_no_steps_are_refused() -> None:
    with pytest.raises(ModelError, match="logsnr_min=20 is not below logsnr_max=-20"):
        CosineSchedule(20, -20)
    with pytest.raises(RecipeError, match="num_inference_steps=0 is below 1"):
        COSINE.times(0)


def _as_a_table(steps: int) -> DiscreteSchedule:
    phi = COSINE.angle(COSINE.times(steps))
    return DiscreteSchedule(alphas=phi.cos(), sigmas=phi.sin())


@pytest.mark.parametrize("kind", TYPES)
def test_a_table_of_the_same_angles_has_the_same_steps_and_targets(kind: PredictionType) -> None:
    """Continuous and discrete time are one mathematics: 16 times of the curve, asked for in both ways."""
    table = _as_a_table(16)
    generator = torch.Generator().manual_seed(0)
    for steps in (16, 8, 2, 1):
        pairs = zip(pairwise(COSINE.times(steps)), pairwise(table.times(steps)), strict=True)
        for (s, t), (at_s, at_t) in pairs:
            of_curve = (*COSINE.alpha_sigma(t.view(1), ndim=2), *COSINE.alpha_sigma(s.view(1), ndim=2))
            of_table = (*table.alpha_sigma(at_t.view(1), ndim=2), *table.alpha_sigma(at_s.view(1), ndim=2))
            z, end = torch.randn(2, 1, 8, generator=generator)
            of_curve_target = step_target(z, end, *of_curve, kind)
            torch.testing.assert_close(of_curve_target, step_target(z, end, *of_table, kind), rtol=1e-5, atol=1e-6)
            # An eps output's step divides by alpha: 2e4 times its rounding at the noisiest time.
            landed = ddim_step(of_curve_target, z, *of_curve, kind)
            atol = 2e-2 if kind == "epsilon" and float(t) == 1 else 1e-5
            torch.testing.assert_close(landed, end, rtol=0, atol=atol)


@pytest.mark.parametrize("name", ["cosine", "stable diffusion"])
def test_targets_of_all_types_say_the_same_on_both_schedules(name: str) -> None:
    """x̃, eps̃ and ṽ of one jump, turned into one another, in float64, for all jumps of 1, 2, 4 and 8 steps."""
    stable_diffusion = NoiseSchedule.from_scheduler_config(
        {
            "num_train_timesteps": 1000,
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
        }
    )
    assert isinstance(stable_diffusion, DiscreteSchedule)
    generator = torch.Generator().manual_seed(1)
    for steps in (1, 2, 4, 8):
        if name == "cosine":
            phi = COSINE.angle(COSINE.times(steps))
            at = list(zip(phi.cos(), phi.sin(), strict=True))
        else:
            rows = stable_diffusion.times(steps) + 1
            at = list(zip(stable_diffusion.alphas[rows], stable_diffusion.sigmas[rows], strict=True))
        for (alpha_s, sigma_s), (alpha_t, sigma_t) in pairwise(at):
            z, end = torch.randn(2, 50, dtype=torch.float64, generator=generator)
            targets = {kind: step_target(z, end, alpha_t, sigma_t, alpha_s, sigma_s, kind) for kind in TYPES}
            # The left-hand forms, which divide by sigma_t and alpha_t: float64 carries them even at alpha = 4.5e-5.
            ratio = sigma_s / sigma_t
            x = (end - ratio * z) / (alpha_s - ratio * alpha_t)
            eps = (z - alpha_t * x) / sigma_t
            expected = {"sample": x, "epsilon": eps, "v_prediction": alpha_t * eps - sigma_t * x}
            for kind in TYPES:
                torch.testing.assert_close(targets[kind], expected[kind], rtol=1e-6, atol=1e-6)
                for other in TYPES:
                    turned = convert_output(targets[kind], z, alpha_t, sigma_t, source=kind, target=other)
                    torch.testing.assert_close(turned, expected[other], rtol=1e-6, atol=1e-6)
