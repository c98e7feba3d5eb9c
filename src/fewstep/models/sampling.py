"""How a student or a teacher is sampled: its network as a function of (z, time), its sampler, its noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion.guidance import WeightSchedule
from fewstep.diffusion.random import RowRandom
from fewstep.diffusion.samplers import Callback, ddim, stochastic
from fewstep.errors import SamplingError
from fewstep.models.denoiser import Condition, Denoiser
from fewstep.models.student import StudentInfo


class SeededNoise:
    """Standard normal noise, each picture's from a CPU generator of its own seed, as in diffusers with a list of
    generators: a seed gives the same picture whatever is drawn beside it, and the one that diffusers draws.

    Args:
        seeds: one a picture.
        shape: of what is diffused, (C, h, w).
        device: where the noise goes.
    """

    def __init__(self, seeds: Sequence[int], shape: Sequence[int], *, device: torch.device | str = "cpu") -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._shape = tuple(shape)
        self._device = device

    def draw(self) -> Tensor:
        """Return the next noise, (B, *shape), float32."""
        return torch.stack([torch.randn(self._shape, generator=g) for g in self._generators]).to(self._device)


def initial_noise(seeds: Sequence[int], shape: tuple[int, ...], *, device: torch.device | str = "cpu") -> Tensor:
    """Return standard normal noise, (B, *shape), each picture from a CPU generator of its own seed."""
    return SeededNoise(seeds, shape, device=device).draw()


def is_guided(info: StudentInfo | None, *, takes_weight: bool) -> bool:
    """Return whether a network is sampled with classifier-free guidance, two evaluations a step.

    Args:
        info: what the student was made for; None for a teacher.
        takes_weight: whether the network has an input for the guidance weight.
    """
    return not takes_weight if info is None else info.kind == "naive"


def number_of_steps(info: StudentInfo | None, num_inference_steps: int | None) -> int:
    """Return the steps to run: those that a student was made for, or those that are asked for.

    Raises:
        SamplingError: neither says a number, or the two differ.
    """
    own = None if info is None else info.num_inference_steps
    if own is None and num_inference_steps is None:
        raise SamplingError("a teacher or a student of stage one works with any number of steps: name one")
    if info is not None and own is not None and num_inference_steps is not None:
        info.check(num_inference_steps=num_inference_steps, guidance_scale=1 + info.w_min)
    steps = own or num_inference_steps
    assert steps is not None
    return steps


def sample_student(
    model: Denoiser,
    info: StudentInfo | None,
    z: Tensor,
    condition: Condition,
    *,
    w: Tensor | float | WeightSchedule,
    seed: int = 0,
    noise: Callable[[int], Tensor] | None = None,
    num_inference_steps: int | None = None,
    start: Fraction = Fraction(1),
    constrain: Callable[[Tensor, Tensor], Tensor] | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Return what a student makes of noise with its own sampler and number of steps, z's shape, float32.

    Args:
        model: the student, or a teacher.
        info: what it was made for; None for a teacher, which is guided with two evaluations a step.
        z: (B, C, h, w) noise, or a noised picture at t = start.
        condition: B rows.
        w: guidance weight, a number, (B,) or w(t); without effect on a student of a single one.
        seed: of the stochastic sampler's noise, row by row.
        noise: that noise itself instead, called with the number of the step.
        num_inference_steps: N, for a teacher or a student of stage one.
        start: t at which z is: a time of the student's grid, or one of its extra start times.
        constrain: called with the state after each step and its time (B,); returns the state to go on with.
        callback: called after each step.

    Raises:
        SamplingError: no number of steps, an encoder, or a start that is none of the student's times.
    """
    if info is not None:
        info.check_kind("making pictures of noise", "deterministic", "stochastic", "naive")
    takes_weight = model.embedding_dim is not None
    if isinstance(w, Tensor):
        w = w.to(z.device)
    network = (model.guided if is_guided(info, takes_weight=takes_weight) else model.conditional)(condition, w)
    steps = number_of_steps(info, num_inference_steps)
    _check_start(info, start, steps)
    common: dict[str, Any] = {
        "schedule": model.schedule,
        "prediction_type": model.prediction_type,
        "num_inference_steps": steps,
        "clip_sample": model.clip_sample,
        "constrain": constrain,
        "callback": callback,
    }
    if info is None or info.kind != "stochastic":
        return ddim(network, z, start=start, **common)
    if noise is None:
        random = RowRandom(seed=seed, step=0, rows=range(len(z)), device=z.device)

        def noise(step: int) -> Tensor:
            return random.normal(*z.shape[1:])

    return stochastic(network, z, noise=noise, steps_to_run=int(start * steps), **common)


def _check_start(info: StudentInfo | None, start: Fraction, steps: int) -> None:
    times = steps if info is None or info.start_times is None else info.start_times
    if not 0 < start <= 1 or (start * times).denominator != 1:
        raise SamplingError(
            f"start={start} is none of the times that this model starts a step from: it must be a multiple of "
            f"1/{times} above 0, up to 1"
        )
