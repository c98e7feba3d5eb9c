"""The step grid: which of the T training times an N-step sampler visits, and ladders of step counts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from fewstep.errors import RecipeError


def step_index(i: float, num_inference_steps: int, *, num_train_timesteps: int = 1000) -> int:
    """Return the time index of t = i/N: round(T·i/N) − 1, where −1 is the clean picture.

    This is diffusers' "trailing" spacing, and the one grid that targets, samplers and shipped schedulers share. The
    stock scheduler's own next time, t − T//N, leaves it when N does not divide T. Half steps (i = k − 0.5) are allowed.
    """
    # numpy rounds half to even, as diffusers does; the same everywhere or the grids drift apart by one.
    return int(np.round(num_train_timesteps * i / num_inference_steps)) - 1


def step_indices(num_inference_steps: int, *, num_train_timesteps: int = 1000) -> list[int]:
    """Return the N + 1 time indices that an N-step sampler visits, noisiest first, ending at −1 (clean).

    Raises:
        RecipeError: N is not between 1 and T.
    """
    if not 1 <= num_inference_steps <= num_train_timesteps:
        raise RecipeError(
            f"num_inference_steps={num_inference_steps} is outside 1 … {num_train_timesteps}, "
            "the number of times that the network was trained on"
        )
    steps = range(num_inference_steps, -1, -1)
    return [step_index(i, num_inference_steps, num_train_timesteps=num_train_timesteps) for i in steps]


def check_ladder(
    ladder: Sequence[int], *, first_teacher_steps: int | None = None, num_train_timesteps: int | None = 1000
) -> None:
    """Check a ladder of step counts such as [32, 16, 8, 4, 2, 1]: each entry is a divisor of the one before.

    Halving is the paper's; larger factors (32, 8, 2, 1) skip rungs.

    Args:
        ladder: step counts of the students.
        first_teacher_steps: steps of the first student's teacher; None: twice the first student's.
        num_train_timesteps: T of a discrete schedule; None: a continuous one, any number of steps is there.

    Raises:
        RecipeError: naming the entry that does not divide, and what would.
    """
    if len(ladder) < 1:
        raise RecipeError("the ladder is empty: name the step counts of the students, for example [8, 4, 2, 1]")
    first = 2 * ladder[0] if first_teacher_steps is None else first_teacher_steps
    if not ladder[-1] >= 1 or (num_train_timesteps is not None and first > num_train_timesteps):
        limit = "" if num_train_timesteps is None else f" and {num_train_timesteps // 2}"
        raise RecipeError(
            f"the ladder {list(ladder)} must lie between 1{limit} steps: its first student imitates {first} steps of "
            f"a teacher" + ("" if num_train_timesteps is None else f" with {num_train_timesteps} times")
        )
    if first % ladder[0] or first == ladder[0]:
        raise RecipeError(
            f"first_teacher_steps={first} is no multiple of the ladder's first entry {ladder[0]}, or the same: the "
            f"student's one step stands for several whole steps of its teacher; take {2 * ladder[0]}"
        )
    for position, (before, after) in enumerate(pairwise(ladder), start=1):
        if after < 1 or before % after or after == before:
            below = [n for n in range(1, before) if before % n == 0]
            fix = f"write {below[-1]} there" if below else f"end the ladder at {before}"
            raise RecipeError(
                f"ladder[{position}]={after} is not a divisor below {before}: one step stands for several whole steps "
                f"of the student before; {fix}"
            )
