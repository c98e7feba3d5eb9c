"""The one grid of times, and ladders of step counts."""

from __future__ import annotations

import numpy as np
import pytest
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from fewstep.diffusion import check_ladder, step_index, step_indices
from fewstep.errors import RecipeError


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (1, [999, -1]),
        (2, [999, 499, -1]),
        (4, [999, 749, 499, 249, -1]),
        (8, [999, 874, 749, 624, 499, 374, 249, 124, -1]),
    ],
)
def test_grid_of_the_powers_of_two(steps: int, expected: list[int]) -> None:
    assert step_indices(steps) == expected


@pytest.mark.parametrize("steps", [3, 6, 16, 32, 64, 1000])
def test_grid_is_diffusers_trailing_spacing(steps: int) -> None:
    assert step_indices(steps)[:-1] == list(np.round(np.arange(1000, 0, -1000 / steps)).astype(int) - 1)
    scheduler = DDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    assert step_indices(steps)[:-1] == scheduler.timesteps.tolist()


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 16, 32])
def test_half_steps_are_the_grid_of_twice_as_many(steps: int) -> None:
    halves = [step_index(j / 2, steps) for j in range(2 * steps, -1, -1)]
    assert halves == step_indices(2 * steps)


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_step_counts_outside_the_schedule_are_refused(steps: int) -> None:
    with pytest.raises(RecipeError, match=rf"num_inference_steps={steps} is outside 1 … 1000"):
        step_indices(steps)


@pytest.mark.parametrize("ladder", [[1], [4], [8, 4, 2, 1], [500, 250, 125], [6, 3], [32, 8, 2, 1], [6, 2, 1]])
def test_ladders_of_divisors_are_taken(ladder: list[int]) -> None:
    check_ladder(ladder)


def test_the_first_teacher_may_take_any_multiple_of_steps_but_not_more_than_there_are_times() -> None:
    check_ladder([32, 8], first_teacher_steps=128)
    check_ladder([1024, 512], num_train_timesteps=None)
    with pytest.raises(RecipeError, match="first_teacher_steps=48 is no multiple of the ladder's first entry 32"):
        check_ladder([32, 8], first_teacher_steps=48)
    with pytest.raises(RecipeError, match=r"first_teacher_steps=32 is no multiple .* or the same"):
        check_ladder([32, 8], first_teacher_steps=32)
    with pytest.raises(RecipeError, match="its first student imitates 1024 steps of a teacher with 1000 times"):
        check_ladder([32, 8], first_teacher_steps=1024)


@pytest.mark.parametrize(
    ("ladder", "message"),
    [
        ([], "the ladder is empty: name the step counts"),
        ([8, 3, 1], r"ladder\[1\]=3 is not a divisor below 8: .*; write 4 there"),
        ([8, 8, 4], r"ladder\[1\]=8 is not a divisor below 8: .*; write 4 there"),
        ([1, 2, 4], r"ladder\[1\]=2 is not a divisor below 1: .*; end the ladder at 1"),
        ([6, 4, 1], r"ladder\[1\]=4 is not a divisor below 6: .*; write 3 there"),
        ([1024, 512], "must lie between 1 and 500 steps"),
        ([0], "must lie between 1 and 500 steps"),
        ([2, 1, 0], "must lie between 1 and 500 steps"),
    ],
)
def test_other_ladders_are_refused_with_the_entry_and_the_fix(ladder: list[int], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        check_ladder(ladder)
