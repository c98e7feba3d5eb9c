"""Gaussian data, where all is known: x|c ~ N(mu_c, s²) is guided to N((1 + w) mu_c − w mu_∅, s²) exactly, the flow is
affine, and a student is a table of affine outputs that can be fitted to its targets without error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion import NoiseSchedule, ddim, stochastic
from fewstep.diffusion.samplers import Model
from fewstep.distill import plan_jumps, step_target
from fewstep.distill.jumps import follow
from fewstep.models.student import StudentKind

VARIANCE = 0.3
OF_CLASS, OF_NONE, W = 0.7, 0.5, 2.0
#: (1 + w) mu_c − w mu_∅.
MEAN = 1.1


@dataclass(frozen=True)
class Gaussian:
    """The exact network of N(mean, VARIANCE), as v."""

    schedule: NoiseSchedule
    mean: float = MEAN

    def __call__(self, z: Tensor, time: Tensor) -> Tensor:
        alpha, sigma = (value.double() for value in self.schedule.alpha_sigma(time, ndim=z.ndim))
        from_mean = (z.double() - alpha * self.mean) / (alpha**2 * VARIANCE + sigma**2)
        x = self.mean + alpha * VARIANCE * from_mean
        return alpha * sigma * from_mean - sigma * x

    def flow(self, z: Tensor, alpha_t: Tensor, sigma_t: Tensor, alpha_s: Tensor, sigma_s: Tensor) -> Tensor:
        """Return where the exact flow takes z from t to s."""
        before, after = (a**2 * VARIANCE + b**2 for a, b in ((alpha_t, sigma_t), (alpha_s, sigma_s)))
        return alpha_s * self.mean + (after / before).sqrt() * (z - alpha_t * self.mean)


@dataclass(frozen=True)
class Fitted:
    """A student: for each of its times the v at z = 0 and at z = 1, between which it is affine; NaN at other times.

    Attributes:
        times: (K,) float64, ascending.
        outputs: (K, 2) float64.
    """

    times: Tensor
    outputs: Tensor

    def __call__(self, z: Tensor, time: Tensor) -> Tensor:
        place = torch.searchsorted(self.times, time.double() - 1e-6)
        known = (self.times[place] - time).abs() < 1e-6
        at_zero, at_one = self.outputs[place].split(1, dim=1)
        return torch.where(known[:, None], at_zero + (at_one - at_zero) * z, torch.nan)


def rung(
    teacher: Model,
    schedule: NoiseSchedule,
    kind: StudentKind,
    num_inference_steps: int,
    *,
    teacher_steps: int,
    start_times: int | None = None,
) -> tuple[Fitted, float]:
    """Return the student that has no loss, and the largest distance between its jump and its teacher's jumps."""
    jumps = plan_jumps(kind, num_inference_steps, teacher_steps=teacher_steps, start_times=start_times)
    times = schedule.times(jumps.grid_steps)
    # Every start twice: z = 0, then z = 1.
    start, end = (torch.tensor(units).repeat(2) for units in (jumps.starts, jumps.ends))
    z = torch.arange(2, dtype=torch.float64).repeat_interleave(len(jumps.starts))[:, None]
    landed = follow(
        teacher,
        z,
        start,
        end,
        stride=jumps.stride,
        num_jumps=max(jumps.teacher_steps),
        together=len(set(jumps.teacher_steps)) == 1,
        times=times,
        schedule=schedule,
        prediction_type="v_prediction",
    )
    (alpha, sigma), (alpha_s, sigma_s) = (schedule.alpha_sigma(times[units], ndim=2) for units in (start, end))
    v = step_target(z, landed, alpha, sigma, alpha_s, sigma_s, "v_prediction")
    # The jump in the form of eq. 2: x̂ and eps-hat, put together at s.
    jump = alpha_s * (alpha * z - sigma * v) + sigma_s * (sigma * z + alpha * v)
    student = Fitted(times[torch.tensor(jumps.starts)].double(), v.view(2, -1).T)
    return student, float((jump - landed).abs().max())


def ladder(
    schedule: NoiseSchedule, kind: StudentKind, *, first: int, factor: int = 2, last: int = 1
) -> tuple[dict[int, Fitted], float]:
    """Return the students of first/factor … last steps, whose first teacher is the exact network with `first` steps,
    and the largest distance of `rung`."""
    teacher: Model = Gaussian(schedule)
    students, apart, steps = {}, 0.0, first
    while steps > last:
        student, distance = rung(teacher, schedule, kind, steps // factor, teacher_steps=steps)
        steps //= factor
        students[steps], teacher, apart = student, student, max(apart, distance)
    return students, apart


def moments(model: Model, schedule: NoiseSchedule, steps: int, *, sampler: str) -> tuple[float, float]:
    """Return mean and variance of what a sampler makes of standard noise; exact for an affine network.

    Row 0 has no noise at all; row j has one of the N noises at one and the others at zero.
    """
    z = torch.zeros(steps + 1, 1)
    z[1] = 1.0
    common: dict[str, Any] = {"schedule": schedule, "num_inference_steps": steps, "prediction_type": "v_prediction"}
    if sampler == "ddim":
        end = ddim(model, z[:2], **common)
    else:

        def noise(step: int) -> Tensor:
            drawn = torch.zeros_like(z)
            drawn[step + 2] = 1.0
            return drawn

        end = stochastic(model, z, noise=noise, **common)
    end = end.double().flatten()
    return float(end[0]), float((end[1:] - end[0]).square().sum())
