"""The step grid: which of the T training times an N-step sampler visits."""

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


def check_ladder(ladder: Sequence[int], *, num_train_timesteps: int = 1000) -> None:
    """Check a halving ladder such as [32, 16, 8, 4, 2, 1]: each entry is half of the one before.

    Raises:
        RecipeError: naming the entry that does not halve, and what would.
    """
    if len(ladder) < 1:
        raise RecipeError("the ladder is empty: name the step counts of the students, for example [8, 4, 2, 1]")
    if not ladder[-1] >= 1 or 2 * ladder[0] > num_train_timesteps:
        raise RecipeError(
            f"the ladder {list(ladder)} must lie between 1 and {num_train_timesteps // 2} steps: "
            f"its first student imitates twice as many steps of a teacher with {num_train_timesteps} times"
        )
    for position, (before, after) in enumerate(pairwise(ladder), start=1):
        if 2 * after != before:
            fix = (
                f"write {before // 2} there" if before % 2 == 0 else f"begin with a power of two instead of {ladder[0]}"
            )
            raise RecipeError(f"ladder[{position}]={after} is not half of {before}: {fix}")
