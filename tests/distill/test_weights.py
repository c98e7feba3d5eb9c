"""A weight on ||Δx||² and the factor on the network's own error are the same loss."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch

from fewstep.diffusion import NoiseSchedule, to_sample
from fewstep.diffusion.prediction import PredictionType
from fewstep.distill import LossWeight, output_weight
from fewstep.models import SCHEDULER_CONFIG

OMEGA = {
    "x": lambda snr: 1.0,
    "snr": lambda snr: snr,
    "truncated_snr": lambda snr: max(snr, 1.0),
    "snr_plus_one": lambda snr: snr + 1.0,
    "min_snr": lambda snr: min(snr, 5.0),
}


@pytest.mark.parametrize("kind", get_args(PredictionType))
@pytest.mark.parametrize("name", get_args(LossWeight))
@pytest.mark.parametrize("phi", [0.05, 0.5, math.pi / 4 + 0.01, 1.2, 1.55])
def test_the_factor_turns_output_error_into_weighted_x_error(
    name: LossWeight, kind: PredictionType, phi: float
) -> None:
    alpha, sigma = torch.tensor(phi, dtype=torch.float64).cos(), torch.tensor(phi, dtype=torch.float64).sin()
    z, first, second = torch.randn(3, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_error = to_sample(first, z, alpha, sigma, kind) - to_sample(second, z, alpha, sigma, kind)
    expected = OMEGA[name](float(alpha**2 / sigma**2)) * float(x_error.square().sum())
    got = float(output_weight(name, alpha, sigma, kind) * (first - second).square().sum())
    assert got == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", get_args(LossWeight))
def test_a_v_network_has_a_finite_weight_at_every_time(name: LossWeight) -> None:
    schedule = NoiseSchedule.from_scheduler_config(SCHEDULER_CONFIG)
    alpha, sigma = schedule.alpha_sigma(torch.arange(1000))
    weight = output_weight(name, alpha, sigma, "v_prediction")
    assert weight.shape == alpha.shape
    assert bool(torch.isfinite(weight).all())
    # At pure noise only the plain SNR weight says nothing: that is why the paper truncates it.
    assert float(weight[-1]) == (0.0 if name in ("snr", "min_snr") else 1.0)
