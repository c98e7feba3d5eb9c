"""Samplers. All have the same shape: a model, where to start, the schedule, the step count and a callback."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import torch
from torch import Tensor

from fewstep.diffusion.prediction import PredictionType, ddim_step, from_sample, to_sample
from fewstep.diffusion.schedule import NoiseSchedule
from fewstep.errors import SamplingError

#: (z, time (B,)) -> network output, guided or not. Times are the schedule's; the model tells its network of them.
Model = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class SamplerStep:
    """What a sampler tells its callback after each step: for previews, metrics and cancellation (raise to stop).

    Attributes:
        step: 0 … number of steps − 1.
        index: the time that the step started from, as the schedule counts it.
        z: the state after the step, (B, …).
        denoised: x̂ of the step, (B, …).
    """

    step: int
    index: float
    z: Tensor
    denoised: Tensor


Callback = Callable[[SamplerStep], None]


@torch.no_grad()
def ddim(
    model: Model,
    z: Tensor,
    *,
    schedule: NoiseSchedule,
    prediction_type: PredictionType,
    num_inference_steps: int,
    steps_to_run: int | None = None,
    start: Fraction | None = None,
    clip_sample: bool = False,
    constrain: Callable[[Tensor, Tensor], Tensor] | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Return the end of the deterministic N-step DDIM trajectory from z (Meng et al. eq. 2), float32, z's shape.

    Args:
        model: network as a function of the state and the time; called once a step.
        z: (B, …) standard normal noise, or a noised picture at the time K/N where the sampling begins.
        schedule: alpha and sigma.
        prediction_type: what the model returns.
        num_inference_steps: N; the grid is `schedule.times(N)`.
        steps_to_run: K, the last K of the N steps; None runs all. K < N is SDEdit (Meng et al. §4.2.3).
        start: the t in (0, 1] at which z is, where it is none of the grid's: jumps of 1/N from there, the last of them
            shorter where less is left, as students with extra start times learn them.
        clip_sample: keep x̂ within [−1, 1], for pictures in pixels; eps-hat is then computed from what is left of it.
        constrain: called with the state after each step and its time (B,); returns the state to go on with.
        callback: called after each step.
    """
    z = z.float()
    for step, (t, s) in enumerate(_steps(schedule, num_inference_steps, steps_to_run, start)):
        time, after = _rows(t, z), _rows(s, z)
        at_t, at_s = schedule.alpha_sigma(time, ndim=z.ndim), schedule.alpha_sigma(after, ndim=z.ndim)
        output, denoised = _evaluate(model, z, time, at_t, prediction_type, clip_sample, wanted=callback is not None)
        z = ddim_step(output, z, *at_t, *at_s, prediction_type)
        if constrain is not None:
            z = constrain(z, after)
        if callback is not None and denoised is not None:
            callback(SamplerStep(step=step, index=t.item(), z=z, denoised=denoised))
    return z


@torch.no_grad()
def stochastic(
    model: Model,
    z: Tensor,
    *,
    schedule: NoiseSchedule,
    prediction_type: PredictionType,
    num_inference_steps: int,
    noise: Callable[[int], Tensor],
    steps_to_run: int | None = None,
    clip_sample: bool = False,
    constrain: Callable[[Tensor, Tensor], Tensor] | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Return the end of the N-step stochastic sampler (Meng et al. eqs. 4–7), float32, z's shape.

    Every step but the last goes two grid steps forward, t → k = t − 2/N, deterministically, and then one back by
    adding noise, k → s = t − 1/N: z_s = (alpha_s/alpha_k) z_k + sigma_{s|k} eps, with
    sigma²_{s|k} = sigma_s² − (alpha_s/alpha_k)² sigma_k². The last step, from t = 1/N, is the deterministic one. So the
    model is called N times, at the same times as in `ddim`.

    Args:
        model, z, schedule, prediction_type, num_inference_steps, steps_to_run, clip_sample, constrain, callback: as for
            `ddim`; a constraint sees the state after its noise.
        noise: called with the number of the step (0 … K − 2), returns standard normal noise of z's shape.
    """
    z = z.float()
    times = schedule.times(num_inference_steps)
    for step, i in enumerate(range(_steps_to_run(num_inference_steps, steps_to_run), 0, -1)):
        k = max(i - 2, 0)
        time = _rows(times[i], z)
        at_t, at_k = (schedule.alpha_sigma(_rows(times[j], z), ndim=z.ndim) for j in (i, k))
        output, denoised = _evaluate(model, z, time, at_t, prediction_type, clip_sample, wanted=callback is not None)
        z = ddim_step(output, z, *at_t, *at_k, prediction_type)
        if i > 1:
            (alpha_s, sigma_s), (alpha_k, sigma_k) = schedule.alpha_sigma(_rows(times[i - 1], z), ndim=z.ndim), at_k
            ratio = alpha_s / alpha_k
            z = ratio * z + noise_std(alpha_s, sigma_s, alpha_k, sigma_k) * noise(step).to(z)
        if constrain is not None:
            z = constrain(z, _rows(times[i - 1], z))
        if callback is not None and denoised is not None:
            callback(SamplerStep(step=step, index=times[i].item(), z=z, denoised=denoised))
    return z


@torch.no_grad()
def ddim_encode(
    model: Model,
    x: Tensor,
    *,
    schedule: NoiseSchedule,
    prediction_type: PredictionType,
    num_inference_steps: int,
    callback: Callback | None = None,
) -> Tensor:
    """Return the noise that the N-step DDIM sampler would turn into x: the same trajectory upwards, float32.

    Meng et al. §4.3 (after Su et al. 2023, dual diffusion implicit bridges). Only for v-prediction: near the clean end
    an error of x̂ or eps-hat would be multiplied by thousands.

    Args:
        model: the network; its first call is at the clean time.
        x: (B, …) clean samples.
        schedule, prediction_type, num_inference_steps, callback: as for `ddim`.

    Raises:
        SamplingError: another prediction type.
    """
    if prediction_type != "v_prediction":
        raise SamplingError(
            f"prediction_type={prediction_type}: encoding needs a v_prediction network, for near the clean picture the "
            "others divide by next to nothing; convert the model first (stage convert)"
        )
    z = x.float()
    for step, (s, t) in enumerate(pairwise(schedule.times(num_inference_steps))):
        time = _rows(s, z)
        at_s, at_t = (schedule.alpha_sigma(_rows(u, z), ndim=z.ndim) for u in (s, t))
        output = model(z, time).float()
        denoised = to_sample(output, z, *at_s, prediction_type)
        z = ddim_step(output, z, *at_s, *at_t, prediction_type)
        if callback is not None:
            callback(SamplerStep(step=step, index=s.item(), z=z, denoised=denoised))
    return z


def noise_std(alpha_s: Tensor, sigma_s: Tensor, alpha_k: Tensor, sigma_k: Tensor) -> Tensor:
    """Return sigma_{s|k}, the standard deviation of the noise that takes z_k to z_s for k before s (eq. 5)."""
    return (sigma_s.square() - (alpha_s / alpha_k).square() * sigma_k.square()).clamp_min(0).sqrt()


def stochastic_etas(schedule: NoiseSchedule, num_inference_steps: int) -> list[float]:
    """Return DDIM's eta of each of the N steps with which it is the stochastic sampler, noisiest first; the last is 0.

    eta_i = sigma_{s|k} / sqrt((sigma_s²/sigma_t²)(1 − alpha_t²/alpha_s²)): diffusers' `DDIMScheduler.step(eta=…)` adds
    noise of eta times that root. Above 1 near the end, which the scheduler takes; but at the last step but one it takes
    the root of a number that is 0 but for rounding, and may give NaN. `StochasticDDIMScheduler` does not.
    """
    times = schedule.times(num_inference_steps)
    alpha, sigma = (a.double().flatten() for a in schedule.alpha_sigma(times, ndim=1))
    etas = []
    for i in range(num_inference_steps, 1, -1):
        std = noise_std(alpha[i - 1], sigma[i - 1], alpha[max(i - 2, 0)], sigma[max(i - 2, 0)])
        unit = (sigma[i - 1] / sigma[i]) * (1 - (alpha[i] / alpha[i - 1]).square()).sqrt()
        etas.append(float(std / unit))
    return [*etas, 0.0]


def _steps(
    schedule: NoiseSchedule, num_inference_steps: int, steps_to_run: int | None, start: Fraction | None
) -> list[tuple[Tensor, Tensor]]:
    if start is None:
        times = schedule.times(num_inference_steps)
        return list(pairwise(times[: _steps_to_run(num_inference_steps, steps_to_run) + 1].flip(0)))
    if not 0 < start <= 1 or steps_to_run is not None:
        raise SamplingError(f"start={start}, steps_to_run={steps_to_run}: give one of them, and a start within 0 … 1")
    # A grid that has the start and everything that jumps of 1/N from there meet.
    grid = math.lcm(num_inference_steps, start.denominator)
    jump = grid // num_inference_steps
    places = [*range(int(start * grid), 0, -jump), 0]
    return list(pairwise(schedule.times(grid)[places]))


def _steps_to_run(num_inference_steps: int, steps_to_run: int | None) -> int:
    run = num_inference_steps if steps_to_run is None else steps_to_run
    if not 1 <= run <= num_inference_steps:
        raise SamplingError(f"{run} of {num_inference_steps} steps cannot be run: it must be 1 … {num_inference_steps}")
    return run


def _rows(time: Tensor, z: Tensor) -> Tensor:
    return time.to(z.device).expand(z.shape[0])


def _evaluate(
    model: Model,
    z: Tensor,
    time: Tensor,
    at_t: tuple[Tensor, Tensor],
    prediction_type: PredictionType,
    clip_sample: bool,
    *,
    wanted: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return the output, and x̂ where it is wanted or clipped."""
    output = model(z, time).float()
    if not (wanted or clip_sample):
        return output, None
    denoised = to_sample(output, z, *at_t, prediction_type)
    if clip_sample:
        denoised = denoised.clamp(-1, 1)
        output = from_sample(denoised, z, *at_t, prediction_type)
    return output, denoised


__all__ = [
    "Callback",
    "Model",
    "SamplerStep",
    "ddim",
    "ddim_encode",
    "noise_std",
    "stochastic",
    "stochastic_etas",
]
