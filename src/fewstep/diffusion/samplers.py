"""Samplers. All have the same shape: a model, the starting noise, the schedule, the step count and a callback."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fewstep.diffusion.grid import step_indices
from fewstep.diffusion.prediction import PredictionType, ddim_step, to_sample
from fewstep.diffusion.schedule import NoiseSchedule

#: (z, time index (B,)) -> network output, guided or not.
Model = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class SamplerStep:
    """What a sampler tells its callback after each step: for previews, metrics and cancellation (raise to stop).

    Attributes:
        step: 0 … N − 1.
        index: the time index that the step started from.
        z: the state after the step, (B, …).
        denoised: x̂ of the step, (B, …).
    """

    step: int
    index: int
    z: Tensor
    denoised: Tensor


@torch.no_grad()
def ddim(
    model: Model,
    z: Tensor,
    *,
    schedule: NoiseSchedule,
    prediction_type: PredictionType,
    num_inference_steps: int,
    callback: Callable[[SamplerStep], None] | None = None,
) -> Tensor:
    """Return the end of the deterministic N-step DDIM trajectory from z (Meng et al. eq. 2), float32, z's shape.

    Args:
        model: network as a function of the state and the time index; called exactly N times.
        z: (B, …) standard normal noise, or a noised picture at the first time of the grid.
        schedule: alpha and sigma.
        prediction_type: what the model returns.
        num_inference_steps: N; the grid is `step_indices(N)`.
        callback: called after each step.
    """
    indices = step_indices(num_inference_steps, num_train_timesteps=schedule.num_train_timesteps)
    z = z.float()
    for step, (t, s) in enumerate(pairwise(indices)):
        index = torch.full((z.shape[0],), t, dtype=torch.int64, device=z.device)
        alpha_t, sigma_t = schedule.alpha_sigma(index, ndim=z.ndim)
        alpha_s, sigma_s = schedule.alpha_sigma(torch.full_like(index, s), ndim=z.ndim)
        output = model(z, index).float()
        denoised = to_sample(output, z, alpha_t, sigma_t, prediction_type) if callback else None
        z = ddim_step(output, z, alpha_t, sigma_t, alpha_s, sigma_s, prediction_type)
        if callback is not None and denoised is not None:
            callback(SamplerStep(step=step, index=t, z=z, denoised=denoised))
    return z
