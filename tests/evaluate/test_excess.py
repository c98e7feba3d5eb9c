"""Shares of the excess: which baseline, at which steps, and with what interval."""

from __future__ import annotations

import pytest
from tests.evaluate.made_rows import outcome

from fewstep.evaluate.baselines import RowSpec
from fewstep.evaluate.excess import compute_ratios

ROWS = [
    outcome("teacher", 50, 0.10, seed=1),
    outcome("ddim", 4, 0.30, seed=2),
    outcome("dpmpp", 4, 0.20, seed=3),
    outcome("student", 4, 0.12, seed=4),
    outcome("ddim", 2, 0.50, seed=5),
    outcome("dpmpp", 2, 0.60, seed=6),
]


def test_the_better_baseline_at_equal_steps_and_at_equal_evaluations() -> None:
    equal_evaluations, equal_steps = compute_ratios(ROWS, {}).excess
    assert (equal_steps.at, equal_steps.baseline_method, equal_steps.baseline_steps) == ("equal_steps", "dpmpp", 4)
    assert equal_steps.ratio == pytest.approx(0.2)
    assert equal_steps.goal == 0.8
    assert equal_steps.met
    assert (equal_evaluations.at, equal_evaluations.baseline_method) == ("equal_evaluations", "ddim")
    assert equal_evaluations.baseline_steps == 2
    assert equal_evaluations.ratio == pytest.approx(0.02 / 0.40)
    assert equal_evaluations.student_excess == pytest.approx(0.02)


def test_what_the_rows_share_cancels_in_the_interval() -> None:
    """The common error of 0.01 is half of the student's excess; the rows' own of 0.001 is what counts."""
    equal_steps = compute_ratios(ROWS, {}).excess[1]
    low, high = equal_steps.student_excess_ci
    assert high - low == pytest.approx(2 * 1.96 * 0.001 * 2**0.5, rel=0.1)
    assert equal_steps.ratio_ci is not None
    assert 0.15 < equal_steps.ratio_ci[0] < 0.2 < equal_steps.ratio_ci[1] < 0.25


def test_ratio_to_the_teachers_own() -> None:
    (row,) = compute_ratios(ROWS, {}).kid_to_teachers_own
    assert row.ratio == pytest.approx(1.2)
    assert row.goal == 1.10
    assert row.met is False


def test_a_baseline_without_excess_gives_no_ratio_and_shows_no_goal() -> None:
    rows = [
        outcome("teacher", 50, 0.10, seed=1),
        outcome("ddim", 1, 0.1001, seed=2),
        outcome("dpmpp", 1, 0.1002, seed=3),
        outcome("student", 1, 0.1, seed=4),
    ]
    (excess,) = compute_ratios(rows, {}).excess
    assert excess.at == "equal_steps"
    assert excess.ratio is None
    assert excess.met is False


def test_wall_clock_is_the_median_of_the_rounds() -> None:
    seconds = {RowSpec("teacher", 50): [2.0, 4.0, 2.2], RowSpec("student", 4): [0.1, 0.1, 0.1]}
    clock = compute_ratios(ROWS, seconds).wall_clock
    assert clock is not None
    assert clock.ratio == pytest.approx(22)
    assert clock.ratio_ci == pytest.approx((20, 40))
    assert clock.evaluation_ratio == 25
    assert clock.met
    assert compute_ratios(ROWS, {}).wall_clock is None
