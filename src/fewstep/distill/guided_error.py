"""How well a student of stage one matches the guided pair, on held-out data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fewstep.diffusion.prediction import to_velocity
from fewstep.diffusion.random import RowRandom
from fewstep.diffusion.schedule import DiscreteSchedule, NoiseSchedule
from fewstep.distill.clean import draw_clean
from fewstep.distill.objective import Batch
from fewstep.models.denoiser import Denoiser

_QUARTERS = 4


@dataclass(frozen=True)
class GuidedError:
    """Relative errors of a student's v̂ against the guided pair: ‖Δv‖ / ‖v^w‖ over all rows that belong to a key.

    Attributes:
        by_w: for each guidance weight, over all times.
        by_time: for each quarter of the times ("750-999" is the noisiest of 1000), over all weights.
    """

    by_w: dict[float, float]
    by_time: dict[str, float]

    @property
    def mean(self) -> float:
        """The mean over the weights."""
        return sum(self.by_w.values()) / len(self.by_w)


@torch.no_grad()
def guided_relative_error(
    teacher: Denoiser, student: Denoiser, batches: Iterable[Batch], *, weights: Sequence[float], seed: int
) -> GuidedError:
    """Return the relative errors of the student's v̂ against the guided pair's.

    Times are uniform over the schedule; every w sees the same noise and times. The errors are of v, whatever the two
    networks output.

    Args:
        teacher: the guided teacher.
        student: w-conditioned, or of a single w (then `weights` is that one).
        batches: held-out samples and conditions, as in training.
        weights: the guidance weights to measure at.
        seed: seed of noise and times.
    """
    schedule = teacher.schedule
    # (weights, quarters of the times, [error, norm])
    sums = torch.zeros(len(weights), _QUARTERS, 2, dtype=torch.float64)
    for number, batch in enumerate(batches):
        condition = teacher.condition_of(batch)
        first = next(iter(condition.values()))
        random = RowRandom(seed=seed, step=number, rows=range(len(first)), device=first.device)
        x = draw_clean(batch, random)
        time = schedule.random_times(random)
        alpha, sigma = schedule.alpha_sigma(time, ndim=x.ndim)
        z = alpha * x + sigma * random.normal(*x.shape[1:])
        quarter = ((schedule.fraction(time) * _QUARTERS).ceil().long() - 1).clamp_min(0).cpu()
        for row, w in enumerate(weights):
            rows = torch.full((len(first),), w, device=z.device)
            target = to_velocity(teacher.guided(condition, rows)(z, time), z, alpha, sigma, teacher.prediction_type)
            output = to_velocity(
                student.conditional(condition, rows)(z, time), z, alpha, sigma, student.prediction_type
            )
            both = torch.stack([(output - target).square(), target.square()], dim=-1)
            sums[row].index_add_(0, quarter, both.flatten(1, -2).sum(dim=1).double().cpu())
    return GuidedError(
        by_w={w: _relative(sums[row].sum(0)) for row, w in enumerate(weights)},
        by_time={
            label: _relative(sums[:, k].sum(0)) for k, label in enumerate(_labels(schedule)) if sums[:, k, 1].sum() > 0
        },
    )


def _labels(schedule: NoiseSchedule) -> list[str]:
    if isinstance(schedule, DiscreteSchedule):
        total = schedule.num_train_timesteps
        edges = [k * total // _QUARTERS for k in range(_QUARTERS + 1)]
        return [f"{low}-{high - 1}" for low, high in pairwise(edges)]
    return [f"{k / _QUARTERS:g}-{(k + 1) / _QUARTERS:g}" for k in range(_QUARTERS)]


def _relative(error_and_norm: Tensor) -> float:
    return float((error_and_norm[0] / error_and_norm[1]).sqrt())
