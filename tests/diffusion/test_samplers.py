"""The DDIM sampler: how often it calls, what it reports, and what it does to a Gaussian."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fewstep.diffusion import (
    CosineSchedule,
    DiscreteSchedule,
    NoiseSchedule,
    ddim,
    ddim_step,
    interval_weight,
    step_index,
    step_indices,
    stochastic,
)
from fewstep.diffusion.samplers import SamplerStep
from fewstep.distill import step_target
from fewstep.errors import RecipeError, SamplingError
from fewstep.models import SCHEDULER_CONFIG

VARIANCE, MEAN = 0.3, 0.7


@pytest.fixture(scope="module")
def zero_snr() -> NoiseSchedule:
    return NoiseSchedule.from_scheduler_config(SCHEDULER_CONFIG)


@pytest.fixture(scope="module")
def cosine() -> DiscreteSchedule:
    """logsnr(u) = −2 log tan(a u + b) from 20 to −20 (Salimans & Ho's schedules.py), at u = 0, 1/1024, … 1."""
    b = math.atan(math.exp(-10))
    a = math.atan(math.exp(10)) - b
    phi = a * torch.arange(1025, dtype=torch.float64) / 1024 + b
    return DiscreteSchedule(alphas=phi.cos(), sigmas=phi.sin())


def _wave(z: Tensor, index: Tensor) -> Tensor:
    return torch.sin(3 * z + index.view(-1, 1, 1, 1) / 500)


@pytest.mark.parametrize("steps", [1, 2, 4, 7])
def test_each_step_calls_the_model_once_and_reports_once(zero_snr: NoiseSchedule, steps: int) -> None:
    calls: list[Tensor] = []
    seen: list[SamplerStep] = []

    def model(z: Tensor, index: Tensor) -> Tensor:
        calls.append(index)
        return _wave(z, index)

    noise = torch.randn(3, 4, 2, 2)
    z = ddim(
        model, noise, schedule=zero_snr, prediction_type="v_prediction", num_inference_steps=steps, callback=seen.append
    )
    assert [index.tolist() for index in calls] == [[t] * 3 for t in step_indices(steps)[:-1]]
    assert [step.step for step in seen] == list(range(steps))
    assert [step.index for step in seen] == step_indices(steps)[:-1]
    assert torch.equal(seen[-1].z, z)
    # The last step ends at the clean picture: the state is what was denoised.
    torch.testing.assert_close(seen[-1].denoised, z, rtol=0, atol=1e-6)


def test_reruns_are_bit_equal_and_the_callback_changes_nothing(zero_snr: NoiseSchedule) -> None:
    noise = torch.randn(2, 4, 2, 2)

    def sample(**more: object) -> Tensor:
        return ddim(_wave, noise, schedule=zero_snr, prediction_type="v_prediction", num_inference_steps=4, **more)  # type: ignore[arg-type]

    first = sample()
    assert torch.equal(first, sample())
    assert torch.equal(first, sample(callback=lambda step: None))
    assert first.dtype == torch.float32


def test_raising_in_the_callback_stops_the_sampler(zero_snr: NoiseSchedule) -> None:
    seen: list[int] = []

    def stop(step: SamplerStep) -> None:
        seen.append(step.step)
        if step.step == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ddim(
            _wave,
            torch.randn(1, 4, 2, 2),
            schedule=zero_snr,
            prediction_type="v_prediction",
            num_inference_steps=8,
            callback=stop,
        )
    assert seen == [0, 1]


def test_no_steps_are_refused(zero_snr: NoiseSchedule) -> None:
    with pytest.raises(RecipeError, match="num_inference_steps=0"):
        ddim(_wave, torch.randn(1, 4, 2, 2), schedule=zero_snr, prediction_type="v_prediction", num_inference_steps=0)


@pytest.mark.parametrize(
    ("steps", "variance"), [(1, 0.000), (2, 0.053), (4, 0.139), (8, 0.207), (16, 0.249), (64, 0.287), (1024, 0.300)]
)
def test_few_ddim_steps_lose_a_gaussians_variance(cosine: DiscreteSchedule, steps: int, variance: float) -> None:
    """Data N(0.7, 0.3) and its exact denoiser: the sampler is affine, so two starting points tell mean and variance."""

    def denoiser(z: Tensor, index: Tensor) -> Tensor:
        alpha, sigma = cosine.alpha_sigma(index)
        return MEAN + alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2) * (z - alpha * MEAN)

    z = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)
    start, end = (
        ddim(denoiser, z, schedule=cosine, prediction_type="sample", num_inference_steps=steps).flatten().tolist()
    )
    assert abs((end - start) ** 2 - variance) < 2e-3
    assert abs(start - MEAN) < 2e-3


def test_the_halving_ladder_keeps_a_gaussians_variance(cosine: DiscreteSchedule) -> None:
    """A student that reaches its targets exactly, rung by rung, does in one step what its 1024-step teacher does.

    With data N(0, 0.3) every network is x̂ = k(t) z, so a rung is solved by one target for each time.
    """
    total = cosine.num_train_timesteps

    def at(index: int) -> tuple[Tensor, Tensor]:
        return cosine.alphas[index + 1], cosine.sigmas[index + 1]

    gain = {}
    for index in range(total):
        alpha, sigma = at(index)
        gain[index] = alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2)
    z = torch.ones((), dtype=torch.float64)
    steps = total // 2
    while steps >= 1:
        student = {}
        for i in range(1, steps + 1):
            t, m, s = (step_index(i - back, steps, num_train_timesteps=total) for back in (0, 0.5, 1))
            z_m = ddim_step(gain[t] * z, z, *at(t), *at(m), "sample")
            z_s = ddim_step(gain[m] * z_m, z_m, *at(m), *at(s), "sample")
            student[t] = step_target(z, z_s, *at(t), *at(s), "sample")
            one_step = ddim_step(student[t], z, *at(t), *at(s), "sample")
            assert abs(float(one_step - z_s)) < 1e-12
        gain = student
        steps //= 2
    assert list(gain) == [total - 1]
    teacher_variance = float(ddim_step(gain[total - 1], z, *at(total - 1), *at(-1), "sample")) ** 2
    assert abs(teacher_variance - VARIANCE) < 2e-3


@pytest.mark.parametrize("steps_to_run", [1, 3, 4])
def test_the_last_steps_alone_are_the_end_of_all_steps(zero_snr: NoiseSchedule, steps_to_run: int) -> None:
    seen: list[SamplerStep] = []
    noise = torch.randn(2, 4, 2, 2)
    common = {"schedule": zero_snr, "prediction_type": "v_prediction", "num_inference_steps": 4}
    end = ddim(_wave, noise, callback=seen.append, **common)  # type: ignore[arg-type]
    states = [noise, *(step.z for step in seen)]
    asked: list[int] = []

    def model(z: Tensor, index: Tensor) -> Tensor:
        asked.append(int(index[0]))
        return _wave(z, index)

    assert torch.equal(ddim(model, states[4 - steps_to_run], steps_to_run=steps_to_run, **common), end)  # type: ignore[arg-type]
    assert asked == [999, 749, 499, 249][4 - steps_to_run :]


@pytest.mark.parametrize("steps_to_run", [0, 5])
def test_other_numbers_of_steps_cannot_be_run(zero_snr: NoiseSchedule, steps_to_run: int) -> None:
    with pytest.raises(SamplingError, match=f"{steps_to_run} of 4 steps cannot be run: it must be 1 … 4"):
        ddim(
            _wave,
            torch.zeros(1, 1, 1, 1),
            schedule=zero_snr,
            prediction_type="v_prediction",
            num_inference_steps=4,
            steps_to_run=steps_to_run,
        )


def test_constrain_sees_every_state_at_its_time_and_replaces_it(zero_snr: NoiseSchedule) -> None:
    """Inpainting with a network of the plain kind: the known half is put back at the noise of each time."""
    x, eps = torch.randn(2, 2, 3, 1, 4, generator=torch.Generator().manual_seed(0)).unbind(0)
    known = torch.tensor([1.0, 1.0, 0.0, 0.0]).expand_as(x)
    times: list[list[int]] = []
    states: list[Tensor] = []

    def put_back(z: Tensor, time: Tensor) -> Tensor:
        times.append(time.tolist())
        return known * zero_snr.noise(x, eps, time) + (1 - known) * z

    def model(z: Tensor, index: Tensor) -> Tensor:
        states.append(z)
        return _wave(z, index)

    common = {"schedule": zero_snr, "prediction_type": "v_prediction", "num_inference_steps": 4}
    end = ddim(model, eps, constrain=put_back, **common)  # type: ignore[arg-type]
    assert times == [[749] * 2, [499] * 2, [249] * 2, [-1] * 2]
    for z, (row, *_) in zip(states[1:], times, strict=False):
        noised = zero_snr.noise(x, eps, torch.tensor([row, row]))
        torch.testing.assert_close(z[..., :2], noised[..., :2])
    torch.testing.assert_close(end[..., :2], x[..., :2])
    assert not torch.allclose(end[..., 2:], x[..., 2:], atol=0.1)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_stochastic_sampler_calls_the_model_at_the_times_of_ddim(zero_snr: NoiseSchedule, steps: int) -> None:
    asked: list[int] = []
    drawn: list[int] = []
    seen: list[SamplerStep] = []
    noise = torch.randn(3, 4, 2, 2)

    def model(z: Tensor, index: Tensor) -> Tensor:
        asked.append(int(index[0]))
        return _wave(z, index)

    def draw(step: int) -> Tensor:
        drawn.append(step)
        return torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(step))

    def sample() -> Tensor:
        return stochastic(
            model,
            noise,
            schedule=zero_snr,
            prediction_type="v_prediction",
            num_inference_steps=steps,
            noise=draw,
            callback=seen.append,
        )

    end = sample()
    assert asked == step_indices(steps)[:-1]
    assert drawn == list(range(steps - 1))
    assert [step.index for step in seen] == step_indices(steps)[:-1]
    assert torch.equal(seen[-1].z, end)
    assert torch.equal(sample(), end), "the same noise, the same end"
    if steps == 1:
        plain = ddim(_wave, noise, schedule=zero_snr, prediction_type="v_prediction", num_inference_steps=1)
        assert torch.equal(end, plain)


def test_the_stochastic_sampler_steps_two_forward_and_one_back() -> None:
    """Equations 4 to 7 written out for three steps of a network that always answers x̂ = 2."""
    schedule, steps = CosineSchedule(), 3
    phi = schedule.angle(schedule.times(steps))
    alpha, sigma = phi.cos(), phi.sin()
    log_snr = 2 * (alpha.log() - sigma.log())
    noises = torch.randn(2, 1, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = start = torch.randn(1, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for draw, (t, s, k) in enumerate([(3, 2, 1), (2, 1, 0)]):
        z_k = 2 * alpha[k] + sigma[k] * (z - 2 * alpha[t]) / sigma[t]
        variance = (1 - (log_snr[s] - log_snr[k]).exp()) * sigma[s] ** 2
        z = alpha[s] / alpha[k] * z_k + variance.sqrt() * noises[draw]
    z = 2 * alpha[0] + sigma[0] * (z - 2 * alpha[1]) / sigma[1]
    ours = stochastic(
        lambda z, time: torch.full_like(z, 2.0),
        start,
        schedule=schedule,
        prediction_type="sample",
        num_inference_steps=steps,
        noise=lambda step: noises[step],
    )
    torch.testing.assert_close(ours.double(), z, rtol=0, atol=1e-6)


def test_the_weight_of_an_interval_is_inside_its_ends() -> None:
    t = torch.tensor([0.0, 0.2, 0.25, 0.5, 0.75, 0.8, 1.0])
    assert interval_weight(3.0, 0.25, 0.75)(t).tolist() == [0, 0, 3, 3, 3, 0, 0]
    assert interval_weight(3.0, 0.0, 0.2, outside=1.0)(t).tolist() == [3, 3, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(("low", "high"), [(0.5, 0.5), (0.8, 0.2), (-0.1, 0.5), (0.5, 1.1)])
def test_an_interval_that_is_none_is_refused(low: float, high: float) -> None:
    with pytest.raises(SamplingError, match=f"the guidance interval {low:g} … {high:g} must be within 0 … 1"):
        interval_weight(3.0, low, high)
