"""Teacher and student may output different things, on continuous and discrete schedules: the targets stay the same."""

from __future__ import annotations

from itertools import product
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from distill.fields import SCHEDULES, Field, Oracle, field_denoiser, rows, time_of, w_of
from fewstep.diffusion import RowRandom
from fewstep.diffusion.prediction import PredictionType
from fewstep.distill import GuidanceObjective, ProgressiveObjective

TYPES: tuple[PredictionType, ...] = get_args(PredictionType)
PAIRS = list(product(TYPES, TYPES))
#: On the full cosine schedule eps is multiplied by 2e4 at pure noise, and x divided by 4.5e-5 at the clean picture.
COMBINATIONS = [
    *[("mild cosine", *pair) for pair in PAIRS],
    *[("stable diffusion", *pair) for pair in PAIRS],
    ("cosine", "v_prediction", "v_prediction"),
    ("zero terminal snr", "v_prediction", "v_prediction"),
    ("zero terminal snr", "v_prediction", "sample"),
    ("zero terminal snr", "sample", "v_prediction"),
    ("zero terminal snr", "sample", "sample"),
]


class GuidedPair(nn.Module):
    """A student of stage one that knows the guided pair of the field, in its own prediction type."""

    def __init__(self, field: Field, schedule: str, prediction_type: PredictionType) -> None:
        super().__init__()
        self.field, self.schedule, self.kind = field, SCHEDULES[schedule], prediction_type

    def forward(self, z: Tensor, told: Tensor, label: Tensor, w_embedding: Tensor) -> Tensor:
        time, w = time_of(self.schedule, told), w_of(w_embedding)
        zero, without = torch.zeros_like(w), torch.full_like(label, -1.0)
        given, free = (self.field.velocity(z, time, c, zero) for c in (label, without))
        v = given + w[:, None] * (given - free)
        alpha, sigma = (value.double() for value in self.schedule.alpha_sigma(time, ndim=2))
        return {"v_prediction": v, "sample": alpha * z - sigma * v, "epsilon": sigma * z + alpha * v}[self.kind]


def _losses(objective: Any, oracle: nn.Module, *, updates: int = 4) -> tuple[float, float]:
    """Return the mean loss of the oracle and of a copy of the teacher whose output is a tenth too large."""
    batch, sums = rows(16), torch.zeros(2, dtype=torch.float64)

    class TooLarge(nn.Module):
        def forward(self, *args: Any) -> Tensor:
            return 1.1 * oracle(*args)

    for update in range(updates):
        for place, network in enumerate((oracle, TooLarge())):
            random = RowRandom(seed=0, step=update, rows=range(16))
            sums[place] += objective.loss(network, batch, random)[0].double()
    return sums[0].item(), sums[1].item()


@pytest.mark.parametrize(("schedule", "of_teacher", "of_student"), COMBINATIONS)
def test_stage_one_reaches_the_guided_pair(
    schedule: str, of_teacher: PredictionType, of_student: PredictionType
) -> None:
    teacher = field_denoiser(schedule, of_teacher)
    objective = GuidanceObjective(teacher, w_min=0.0, w_max=4.0, prediction_type=of_student)
    knows, wrong = _losses(objective, GuidedPair(teacher.network, schedule, of_student))
    assert knows < 1e-6 * wrong


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize(("schedule", "of_teacher", "of_student"), COMBINATIONS)
def test_stage_two_reaches_two_steps_of_its_teacher(
    schedule: str, of_teacher: PredictionType, of_student: PredictionType, steps: int
) -> None:
    teacher = field_denoiser(schedule, of_teacher, w_input=True)
    objective = ProgressiveObjective(
        teacher, num_inference_steps=steps, w_min=0.0, w_max=4.0, prediction_type=of_student
    )
    paths = {2 * i: [2 * i, 2 * i - 1, 2 * i - 2] for i in range(1, steps + 1)}
    oracle = Oracle(teacher.network, schedule, of_student, units=2 * steps, paths=paths)
    knows, wrong = _losses(objective, oracle)
    assert knows < 1e-6 * wrong
