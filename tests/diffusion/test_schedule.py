"""alpha and sigma are diffusers' own, and the table ends where sampling starts and stops."""

from __future__ import annotations

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from fewstep.diffusion import NoiseSchedule
from fewstep.errors import ModelError
from fewstep.models import SCHEDULER_CONFIG

CONFIGS = {
    "stable diffusion": {**SCHEDULER_CONFIG, "rescale_betas_zero_snr": False},
    "zero terminal snr": SCHEDULER_CONFIG,
    "cosine": {"num_train_timesteps": 200, "beta_schedule": "squaredcos_cap_v2"},
    "trained betas": {"num_train_timesteps": 4, "trained_betas": [0.1, 0.2, 0.3, 0.4]},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_tables_are_diffusers_alphas_cumprod(name: str) -> None:
    config = {key: value for key, value in CONFIGS[name].items() if not key.startswith("_")}
    expected = DDIMScheduler(**config).alphas_cumprod
    schedule = NoiseSchedule.from_scheduler_config(CONFIGS[name])

    assert schedule.num_train_timesteps == len(expected)
    index = torch.arange(len(expected))
    alpha, sigma = schedule.alpha_sigma(index)
    assert alpha.shape == sigma.shape == (len(expected), 1, 1, 1)
    torch.testing.assert_close(alpha.flatten() ** 2, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(sigma.flatten() ** 2, 1 - expected, rtol=1e-6, atol=1e-7)
    assert torch.allclose(schedule.alphas**2 + schedule.sigmas**2, torch.ones((), dtype=torch.float64), atol=1e-15)


def test_stable_diffusions_values_at_the_grid() -> None:
    schedule = NoiseSchedule.from_scheduler_config(CONFIGS["stable diffusion"])
    alpha, sigma = schedule.alpha_sigma(torch.tensor([999, 874, 749, 624, 499, 374, 249, 124, 0]))
    assert [round(float(a), 4) for a in alpha] == [
        0.0683,
        0.1358,
        0.2380,
        0.3723,
        0.5269,
        0.6832,
        0.8218,
        0.9292,
        0.9996,
    ]
    assert [round(float(s), 4) for s in sigma] == [
        0.9977,
        0.9907,
        0.9713,
        0.9281,
        0.8499,
        0.7303,
        0.5697,
        0.3696,
        0.0292,
    ]


def test_the_rescaled_schedule_ends_in_pure_noise_exactly() -> None:
    schedule = NoiseSchedule.from_scheduler_config(SCHEDULER_CONFIG)
    alpha, sigma = schedule.alpha_sigma(torch.tensor([999]))
    assert float(alpha) == 0.0
    assert float(sigma) == 1.0
    assert float(schedule.snr(torch.tensor([999]))) == 0.0


@pytest.mark.parametrize("name", CONFIGS)
def test_index_minus_one_is_the_clean_picture(name: str) -> None:
    schedule = NoiseSchedule.from_scheduler_config(CONFIGS[name])
    alpha, sigma = schedule.alpha_sigma(torch.tensor([-1]), ndim=2)
    assert alpha.tolist() == [[1.0]]
    assert sigma.tolist() == [[0.0]]
    assert torch.isinf(schedule.snr(torch.tensor([-1]))).all()


def test_noise_takes_each_row_at_its_own_time() -> None:
    schedule = NoiseSchedule.from_scheduler_config(SCHEDULER_CONFIG)
    x, noise = torch.full((3, 2, 2, 2), 2.0), torch.full((3, 2, 2, 2), 5.0)
    z = schedule.noise(x, noise, torch.tensor([-1, 499, 999]))
    assert torch.equal(z[0], x[0])
    assert torch.equal(z[2], noise[2])
    assert torch.allclose(z[1], 2.0 * schedule.alphas[500].float() + 5.0 * schedule.sigmas[500].float())


@pytest.mark.parametrize(
    "config", [{}, {"num_train_timesteps": 1000}, {"beta_schedule": "linear"}, {"_class_name": "FlowMatchEuler"}]
)
def test_a_configuration_without_betas_is_refused(config: dict[str, object]) -> None:
    with pytest.raises(ModelError, match="names no beta schedule: num_train_timesteps and beta_schedule"):
        NoiseSchedule.from_scheduler_config(config)


def test_an_unknown_beta_schedule_is_refused_in_words() -> None:
    with pytest.raises(ModelError, match=r"beta_schedule='zigzag' is none .*give the betas themselves"):
        NoiseSchedule.from_scheduler_config({"num_train_timesteps": 1000, "beta_schedule": "zigzag"})
