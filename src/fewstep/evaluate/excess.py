"""The comparisons that the goals are about, each with an interval from draws that the rows share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from torch import Tensor

from fewstep.evaluate.baselines import RowSpec
from fewstep.evaluate.distances import Estimate, percentile_interval
from fewstep.evaluate.rows import RowOutcome
from fewstep.evaluate.schema import Excess, KidRatio, Ratios, WallClock

#: Largest allowed share of the better baseline's excess, by number of student steps.
EXCESS_GOALS: Mapping[str, Mapping[int, float]] = {
    "equal_evaluations": {8: 1 / 2, 4: 1 / 3, 2: 1 / 5},
    "equal_steps": {4: 0.8, 2: 1 / 3, 1: 1 / 5},
}
#: Largest allowed kid_lite0_to_real over the teacher's own.
KID_RATIO_GOALS: Mapping[int, float] = {4: 1.10, 1: 1.35}
#: A student of this many steps against the guided teacher's many: evaluations and wall clock.
WALL_CLOCK_STEPS = 4
WALL_CLOCK_GOAL = 20.0
#: Largest relative error of stage one's network.
STAGE_ONE_GOAL = 0.05


def compute_ratios(outcomes: Sequence[RowOutcome], seconds: Mapping[RowSpec, Sequence[float]]) -> Ratios:
    """Return all comparisons between the students, the plain samplers and the teacher.

    Args:
        outcomes: all rows; exactly one of the method "teacher".
        seconds: of each row, by round (`time_rows`); may be empty.
    """
    rows = {outcome.spec: outcome for outcome in outcomes}
    teacher = next(outcome for outcome in outcomes if outcome.spec.method == "teacher")
    students = sorted((spec for spec in rows if spec.method == "student"), key=lambda s: -s.num_inference_steps)
    excess = []
    for spec in students:
        steps = spec.num_inference_steps
        if steps % 2 == 0:
            excess.append(_excess(rows, teacher, steps, at="equal_evaluations", baseline_steps=steps // 2))
        excess.append(_excess(rows, teacher, steps, at="equal_steps", baseline_steps=steps))
    return Ratios(
        excess=excess,
        kid_to_teachers_own=[_kid_ratio(rows[spec], teacher) for spec in students],
        wall_clock=_wall_clock(rows, teacher, seconds),
    )


def _excess(
    rows: Mapping[RowSpec, RowOutcome], teacher: RowOutcome, steps: int, *, at: str, baseline_steps: int
) -> Excess:
    baseline = min(
        (rows[RowSpec(method, baseline_steps)] for method in ("ddim", "dpmpp")),
        key=lambda row: row.kid_to_real.value,
    )
    student = _difference(rows[RowSpec("student", steps)].kid_to_real, teacher.kid_to_real)
    other = _difference(baseline.kid_to_real, teacher.kid_to_real)
    ratio = _ratio(student, other)
    goal = EXCESS_GOALS[at].get(steps)
    return Excess(
        num_inference_steps=steps,
        at=at,
        baseline_method=baseline.spec.method,
        baseline_steps=baseline_steps,
        student_excess=student.value,
        student_excess_ci=student.interval,
        baseline_excess=other.value,
        baseline_excess_ci=other.interval,
        ratio=ratio.value if ratio else None,
        ratio_ci=ratio.interval if ratio else None,
        goal=goal,
        # Without an excess of the baseline's there is nothing to take a share of, and the goal is not shown.
        met=None if goal is None else bool(ratio is not None and ratio.value <= goal),
    )


def _kid_ratio(student: RowOutcome, teacher: RowOutcome) -> KidRatio:
    steps = student.spec.num_inference_steps
    ratio, goal = _ratio(student.kid_to_real, teacher.kid_to_real), KID_RATIO_GOALS.get(steps)
    return KidRatio(
        num_inference_steps=steps,
        ratio=ratio.value if ratio else None,
        ratio_ci=ratio.interval if ratio else None,
        goal=goal,
        met=None if goal is None else bool(ratio is not None and ratio.value <= goal),
    )


def _wall_clock(
    rows: Mapping[RowSpec, RowOutcome], teacher: RowOutcome, seconds: Mapping[RowSpec, Sequence[float]]
) -> WallClock | None:
    spec = RowSpec("student", WALL_CLOCK_STEPS)
    if spec not in seconds or teacher.spec not in seconds:
        return None
    by_round = [slow / fast for slow, fast in zip(seconds[teacher.spec], seconds[spec], strict=True)]
    ratio = median(by_round)
    return WallClock(
        teacher_steps=teacher.spec.num_inference_steps,
        student_steps=spec.num_inference_steps,
        evaluation_ratio=teacher.result.network_evaluations / rows[spec].result.network_evaluations,
        ratio=ratio,
        ratio_ci=(min(by_round), max(by_round)),
        goal=WALL_CLOCK_GOAL,
        met=ratio >= WALL_CLOCK_GOAL,
    )


def _draws(estimate: Estimate) -> Tensor:
    assert estimate.draws is not None, "comparisons are made draw by draw"
    return estimate.draws


def _difference(first: Estimate, second: Estimate) -> Estimate:
    draws = _draws(first) - _draws(second)
    return Estimate(first.value - second.value, percentile_interval(draws), draws)


def _ratio(first: Estimate, second: Estimate) -> Estimate | None:
    """Return first / second, or None where second is not clearly above zero (its interval reaches zero)."""
    if second.interval[0] <= 0:
        return None
    # A single draw below zero would turn the sign of the ratio; such draws lie outside the interval just checked.
    ratios = _draws(first) / _draws(second).clamp_min(second.interval[0])
    return Estimate(first.value / second.value, percentile_interval(ratios))
