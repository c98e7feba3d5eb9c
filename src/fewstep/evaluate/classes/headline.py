"""What the paper claims of Table 1, computed from the rows: students as good as the teacher, and how much cheaper.

Everything is formed group by group over rows that share classes, noise and real pictures (`jackknife`).
"Equal" in the search for the largest speed-up is one-sided: a student that is better than its teacher counts. By
Fréchet distance alone that is easy at large w, where the guided teacher itself is far from the data and a blurred
picture may be nearer; the headline therefore asks for the classifier score as well, as the paper compares FID and IS.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from fewstep.evaluate.classes.jackknife import Measured, difference, ratio
from fewstep.evaluate.classes.schema import (
    PLAIN_SAMPLERS,
    STUDENTS,
    ClassMethod,
    ClassResult,
    EarlyRatio,
    Headline,
    SingleW,
    Speedup,
    TeacherMatch,
    find_row,
)
from fewstep.evaluate.classes.settings import ClassCompareSettings

_EqualIn = Literal["distance", "distance_and_score"]
_EQUAL_IN: tuple[_EqualIn, ...] = ("distance", "distance_and_score")


def compute_headline(results: Sequence[ClassResult], settings: ClassCompareSettings) -> Headline:
    """Return all comparisons for which the rows are there.

    Args:
        results: rows that share classes, noise and real pictures.
        settings: which steps are compared, and what counts as equal.
    """
    speedups = [
        found
        for w in sorted({row.w for row in results})
        for method in STUDENTS
        for equal_in in _EQUAL_IN
        if (found := _speedup([row for row in results if row.w == w], method, equal_in, settings)) is not None
    ]
    return Headline(
        teacher_matches=_teacher_matches(results, settings.match_steps),
        speedups=speedups,
        largest_speedup=_largest(speedups, "distance_and_score"),
        largest_speedup_by_distance=_largest(speedups, "distance"),
        early_ratios=_early_ratios(results, settings.early_steps),
        single_w=_single_w(results),
    )


def _teacher_matches(results: Sequence[ClassResult], steps: Sequence[int]) -> list[TeacherMatch]:
    matches = []
    for row in _students(results):
        teacher = find_row(results, "teacher", row.w)
        if row.num_inference_steps not in steps or teacher is None:
            continue
        matches.append(_teacher_match(row, teacher, "fd_classifier"))
        matches.append(_teacher_match(row, teacher, "classifier_score"))
    return matches


def _teacher_match(
    row: ClassResult, teacher: ClassResult, metric: Literal["fd_classifier", "classifier_score"]
) -> TeacherMatch:
    ours, theirs = row.metric(metric), teacher.metric(metric)
    within = not_worse = None
    if ours.value is not None and theirs.interval is not None:
        low, high = theirs.interval
        within = low <= ours.value <= high
        not_worse = ours.value <= high if metric == "fd_classifier" else ours.value >= low
    return TeacherMatch(
        method=row.method,
        num_inference_steps=row.num_inference_steps,
        w=row.w,
        metric=metric,
        student=_bare(ours),
        teacher=_bare(theirs),
        difference=_bare(difference(ours, theirs)),
        within=within,
        not_worse=not_worse,
    )


def _speedup(
    rows: Sequence[ClassResult], method: ClassMethod, equal_in: _EqualIn, settings: ClassCompareSettings
) -> Speedup | None:
    """Return the fewest steps of a student that equal the teacher's many, among rows of one w."""
    teacher = next((row for row in rows if row.method == "teacher"), None)
    if teacher is None:
        return None
    most, least = 1 + settings.equal_within, 1 - settings.equal_within
    equal = []
    for row in rows:
        distance, score = _against(teacher, row)
        if _in_order(distance.value, most) and (equal_in == "distance" or _in_order(least, score.value)):
            equal.append(row)
    students = [row for row in equal if row.method == method]
    if not students:
        return None
    student = min(students, key=lambda row: row.num_inference_steps)
    plain = min(
        (row for row in equal if row.method in PLAIN_SAMPLERS), key=lambda row: row.network_evaluations, default=None
    )
    distance, score = _against(teacher, student)
    certain = distance.interval is not None and distance.interval[1] <= most
    if equal_in == "distance_and_score":
        certain = certain and score.interval is not None and score.interval[0] >= least
    evaluations = student.network_evaluations
    return Speedup(
        method=student.method,
        num_inference_steps=student.num_inference_steps,
        w=student.w,
        equal_in=equal_in,
        fd_ratio=_bare(distance),
        score_ratio=_bare(score),
        evaluation_ratio=teacher.network_evaluations / evaluations,
        certain=certain,
        plain_method=plain.method if plain else None,
        plain_steps=plain.num_inference_steps if plain else None,
        plain_evaluation_ratio=plain.network_evaluations / evaluations if plain else None,
    )


def _against(teacher: ClassResult, row: ClassResult) -> tuple[Measured, Measured]:
    """Return the row's Fréchet distance and classifier score over the teacher's."""
    distance = ratio(row.fd_classifier, teacher.fd_classifier)
    return distance, ratio(row.classifier_score, teacher.classifier_score)


def _in_order(low: float | None, high: float | None) -> bool:
    return low is not None and high is not None and low <= high


def _largest(speedups: Sequence[Speedup], equal_in: _EqualIn) -> Speedup | None:
    candidates = [speedup for speedup in speedups if speedup.equal_in == equal_in]
    return max(candidates, key=lambda speedup: speedup.evaluation_ratio, default=None)


def _early_ratios(results: Sequence[ClassResult], steps: Sequence[int]) -> list[EarlyRatio]:
    ratios = []
    for row in _students(results):
        if row.num_inference_steps not in steps:
            continue
        for baseline in PLAIN_SAMPLERS:
            other = find_row(results, baseline, row.w, row.num_inference_steps)
            if other is None:
                continue
            ratios.append(
                EarlyRatio(
                    method=row.method,
                    baseline=baseline,
                    num_inference_steps=row.num_inference_steps,
                    w=row.w,
                    fd_ratio=_bare(ratio(other.fd_classifier, row.fd_classifier)),
                )
            )
    return ratios


def _single_w(results: Sequence[ClassResult]) -> list[SingleW]:
    pairs = []
    for single in (row for row in _students(results) if row.method == "student_single_w"):
        conditioned = find_row(results, "student", single.w, single.num_inference_steps)
        if conditioned is None:
            continue
        relation = ratio(single.fd_classifier, conditioned.fd_classifier)
        pairs.append(
            SingleW(
                num_inference_steps=single.num_inference_steps,
                w=single.w,
                single_w=_bare(single.fd_classifier),
                w_conditioned=_bare(conditioned.fd_classifier),
                fd_ratio=_bare(relation),
                difference=_bare(difference(single.fd_classifier, conditioned.fd_classifier)),
                better=_better(relation),
            )
        )
    return pairs


def _better(relation: Measured) -> Literal["single_w", "w_conditioned", "neither"] | None:
    # By the ratio: the error of a distance grows with it, so the ratio's interval is the sharper of the two.
    if relation.interval is None:
        return None
    low, high = relation.interval
    if low <= 1 <= high:
        return "neither"
    return "single_w" if high < 1 else "w_conditioned"


def _students(results: Sequence[ClassResult]) -> list[ClassResult]:
    students = [row for row in results if row.method in STUDENTS]
    return sorted(students, key=lambda row: (row.w, STUDENTS.index(row.method), row.num_inference_steps))


def _bare(figure: Measured) -> Measured:
    """Return the figure without its parts: they are in the rows already."""
    return Measured(value=figure.value, interval=figure.interval)
