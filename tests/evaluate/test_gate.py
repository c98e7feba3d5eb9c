"""The gate: each rule can fail, and says so with numbers."""

from __future__ import annotations

import json

import pytest
from tests.evaluate.made_rows import report, result

from fewstep.evaluate.gate import GateSettings, decide
from fewstep.evaluate.schema import Report

SETTINGS = GateSettings(max_kid_ratio=1.2, min_alignment_ratio=0.9, max_paired_mse=0.1, min_num_images=500)


def test_a_good_student_passes_and_every_rule_is_told() -> None:
    decision = decide(report(result("teacher", 50), result("student", 4)), num_inference_steps=4, settings=SETTINGS)
    assert decision.passed
    assert len(decision.reasons) == 4


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        (
            {"kid_lite0_to_real": 0.13},
            "kid_lite0_to_real is 0.1300, 1.30 times the teacher's 0.1000; the gate allows",
        ),
        ({"kid_lite0_to_real": None}, "kid_lite0_to_real is missing"),
        ({"kid_lite0_to_real": float("nan")}, "kid_lite0_to_real is missing"),
        ({"alignment": 0.2}, "the alignment is 0.200, 0.67 times the teacher's 0.300; the gate asks for 0.90"),
        ({"alignment": None}, "the alignment is missing"),
        ({"paired_mse": 0.2}, "the paired distance to the teacher is 0.2000; the gate allows 0.1000"),
        ({"paired_mse": None}, "the paired distance to the teacher is missing"),
    ],
)
def test_one_broken_rule_fails_and_comes_first(figures: dict[str, float | None], words: str) -> None:
    rows = report(result("teacher", 50), result("student", 4, **figures))
    decision = decide(rows, num_inference_steps=4, settings=SETTINGS)
    assert not decision.passed
    assert decision.reasons[0].startswith(words)
    assert len(decision.reasons) == 4


def test_too_few_pictures_and_a_row_that_is_not_there() -> None:
    few = result("student", 4).model_copy(update={"num_images": 499})
    decision = decide(report(result("teacher", 50), few), num_inference_steps=4, settings=SETTINGS)
    assert decision.reasons[0] == "measured on 499 pictures, fewer than the 500 that the gate asks for"
    missing = decide(report(result("teacher", 50), few), num_inference_steps=2, settings=SETTINGS)
    assert not missing.passed
    assert "no row for the student of 2 steps" in missing.reasons[0]
    assert "no row for the teacher" in decide(report(few), num_inference_steps=4, settings=SETTINGS).reasons[0]


def test_a_teacher_at_zero_gives_no_ratio() -> None:
    rows = report(result("teacher", 50, kid_lite0_to_real=-0.001), result("student", 4))
    decision = decide(rows, num_inference_steps=4, settings=SETTINGS)
    assert not decision.passed
    assert "not above zero: too few pictures" in decision.reasons[0]


def test_rules_that_are_not_asked_for() -> None:
    settings = GateSettings(min_alignment_ratio=None)
    rows = report(result("teacher", 50), result("student", 4, alignment=None, paired_mse=None))
    assert decide(rows, num_inference_steps=4, settings=settings).passed


def test_a_report_read_from_json_is_judged_the_same() -> None:
    rows = report(result("teacher", 50), result("student", 4, alignment=float("nan")))
    again = Report.model_validate_json(rows.model_dump_json())
    assert json.loads(rows.model_dump_json())["results"][1]["alignment"] is None
    assert not decide(again, num_inference_steps=4, settings=SETTINGS).passed


@pytest.mark.parametrize(
    ("error", "passed", "words"),
    [
        (0.04, True, "the relative error of stage one is 0.040; the gate allows 0.050"),
        (0.06, False, "the relative error of stage one is 0.060; the gate allows 0.050"),
        (None, False, "the relative error of stage one is missing"),
    ],
)
def test_stage_ones_error(error: float | None, passed: bool, words: str) -> None:
    rows = report(result("teacher", 50), result("student", 4)).model_copy(update={"stage_one_relative_error": error})
    settings = SETTINGS.model_copy(update={"max_relative_error": 0.05})
    decision = decide(rows, num_inference_steps=4, settings=settings)
    assert decision.passed is passed
    assert words in decision.reasons
