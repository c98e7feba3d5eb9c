"""The headline's comparisons on rows with chosen figures."""

from __future__ import annotations

import math

import pytest
from tests.evaluate.class_pictures import row

from fewstep.errors import DataError, SamplingError
from fewstep.evaluate.classes.compare import table_specs
from fewstep.evaluate.classes.headline import compute_headline
from fewstep.evaluate.classes.schema import METHOD_NAMES, ClassRowSpec
from fewstep.evaluate.classes.settings import ClassCompareSettings

SETTINGS = ClassCompareSettings()


def test_evaluations_a_picture() -> None:
    assert ClassRowSpec("ddim", 8, 1.0).network_evaluations == 16
    assert ClassRowSpec("teacher", 512, 0.3).network_evaluations == 1024
    assert ClassRowSpec("student_stochastic", 8, 1.0).network_evaluations == 8
    assert ClassRowSpec("dpmpp", 8, 0.0).network_evaluations == 8, "at w = 0 nothing is guided"


@pytest.mark.parametrize(
    ("method", "steps", "w", "message"),
    [
        ("euler", 4, 1.0, "method='euler' is none of student"),
        ("ddim", 0, 1.0, "num_inference_steps=0"),
        ("ddim", 4, -0.5, "w=-0.5 must be a guidance weight"),
        ("ddim", 4, math.nan, "w=nan"),
    ],
)
def test_rows_that_cannot_be(method: str, steps: int, w: float, message: str) -> None:
    with pytest.raises(SamplingError, match=message):
        ClassRowSpec(method, steps, w)  # type: ignore[arg-type]


def test_rows_of_the_table() -> None:
    specs = table_specs(reference_steps=512)
    assert len(specs) == len(set(specs)) == 5 * (1 + 5 * 5)
    assert {spec.method for spec in specs} == set(METHOD_NAMES)
    fewer = table_specs(reference_steps=64, weights=(0.0, 1.0), steps=(4,), single_w=(1.0,), stochastic=False)
    assert fewer == [
        ClassRowSpec("teacher", 64, 0.0),
        ClassRowSpec("student", 4, 0.0),
        ClassRowSpec("dpmpp", 4, 0.0),
        ClassRowSpec("ddim", 4, 0.0),
        ClassRowSpec("teacher", 64, 1.0),
        ClassRowSpec("student", 4, 1.0),
        ClassRowSpec("student_single_w", 4, 1.0),
        ClassRowSpec("dpmpp", 4, 1.0),
        ClassRowSpec("ddim", 4, 1.0),
    ]
    with pytest.raises(DataError, match=r"single_w=\[2.0\]"):
        table_specs(reference_steps=64, weights=(0.0,), single_w=(2.0,))


def test_students_against_the_teachers_interval() -> None:
    rows = [
        row(ClassRowSpec("teacher", 512, 1.0), 10.0),
        row(ClassRowSpec("student", 8, 1.0), 10.05),
        row(ClassRowSpec("student", 4, 1.0), 9.0),
        row(ClassRowSpec("student", 2, 1.0), 15.0),
        row(ClassRowSpec("student_stochastic", 4, 1.0), 12.0, score=9.0),
        row(ClassRowSpec("student", 4, 2.0), 9.0),
    ]
    matches = compute_headline(rows, SETTINGS).teacher_matches
    found = {
        (match.method, match.num_inference_steps, match.metric): (match.within, match.not_worse) for match in matches
    }
    assert found == {
        ("student", 4, "fd_classifier"): (False, True),
        ("student", 4, "classifier_score"): (True, True),
        ("student", 8, "fd_classifier"): (True, True),
        ("student", 8, "classifier_score"): (True, True),
        ("student_stochastic", 4, "fd_classifier"): (False, False),
        ("student_stochastic", 4, "classifier_score"): (False, True),
    }, "two steps are not asked for, and w = 2 has no teacher"
    better = next(match for match in matches if match.num_inference_steps == 4 and match.method == "student")
    assert better.difference.value == pytest.approx(-1.0)


def test_largest_speedup_wants_the_score_too() -> None:
    rows = [
        row(ClassRowSpec("teacher", 512, 1.0), 10.0),
        row(ClassRowSpec("student", 1, 1.0), 9.0, score=5.0),
        row(ClassRowSpec("student", 2, 1.0), 10.6),
        row(ClassRowSpec("student", 4, 1.0), 10.4),
        row(ClassRowSpec("student", 8, 1.0), 9.9),
        row(ClassRowSpec("ddim", 16, 1.0), 10.4),
        row(ClassRowSpec("dpmpp", 8, 1.0), 10.3),
        row(ClassRowSpec("dpmpp", 4, 1.0), 20.0),
        row(ClassRowSpec("teacher", 512, 0.0), 10.0),
        row(ClassRowSpec("student", 4, 0.0), 10.0, spread=0.5),
        row(ClassRowSpec("student_stochastic", 4, 0.0), 30.0),
    ]
    headline = compute_headline(rows, SETTINGS)
    best = headline.largest_speedup
    assert best is not None
    assert (best.method, best.num_inference_steps, best.w) == ("student", 4, 1.0)
    assert best.evaluation_ratio == 1024 / 4
    assert (best.plain_method, best.plain_steps, best.plain_evaluation_ratio) == ("dpmpp", 8, 4.0)
    assert best.certain
    by_distance = headline.largest_speedup_by_distance
    assert by_distance is not None
    assert (by_distance.num_inference_steps, by_distance.evaluation_ratio) == (1, 1024), "a blurred picture may be near"
    unguided = next(speedup for speedup in headline.speedups if speedup.w == 0)
    assert unguided.evaluation_ratio == 512 / 4
    assert not unguided.certain, "its interval is wider than the allowed share"
    assert unguided.plain_method is None
    assert not any(speedup.method == "student_stochastic" for speedup in headline.speedups)


def test_early_ratios_and_single_w() -> None:
    rows = [
        row(ClassRowSpec("ddim", 1, 1.0), 50.0),
        row(ClassRowSpec("dpmpp", 1, 1.0), 40.0),
        row(ClassRowSpec("student", 1, 1.0), 10.0),
        row(ClassRowSpec("student_single_w", 1, 1.0), 9.0),
        row(ClassRowSpec("student", 4, 1.0), 4.0),
        row(ClassRowSpec("student_single_w", 4, 1.0), 4.0),
        row(ClassRowSpec("student", 8, 1.0), None),
        row(ClassRowSpec("student_single_w", 8, 1.0), 4.0),
    ]
    headline = compute_headline(rows, SETTINGS)
    ratios = {(early.method, early.baseline): early.fd_ratio.value for early in headline.early_ratios}
    assert ratios == pytest.approx(
        {
            ("student", "ddim"): 5.0,
            ("student", "dpmpp"): 4.0,
            ("student_single_w", "ddim"): 50 / 9,
            ("student_single_w", "dpmpp"): 40 / 9,
        }
    )
    assert [(pair.num_inference_steps, pair.better) for pair in headline.single_w] == [
        (1, "single_w"),
        (4, "neither"),
        (8, None),
    ]
    assert headline.single_w[0].fd_ratio.value == pytest.approx(0.9)
    assert headline.largest_speedup is None
    assert headline.teacher_matches == []
