"""The promotion gate: may this student become the champion? Reasons in words, with the numbers."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

from fewstep.evaluate.schema import Report, Result


class GateSettings(BaseModel):
    """What a student must reach to be served. A figure that is missing from the report fails."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_kid_ratio: float = Field(
        default=1.5, gt=0, description="largest kid_lite0_to_real over that of the guided teacher with many steps"
    )
    min_alignment_ratio: float | None = Field(
        default=0.9, gt=0, description="smallest alignment over the teacher's; null = the alignment is not asked for"
    )
    max_paired_mse: float | None = Field(
        default=None, gt=0, description="largest paired latent distance to the teacher; null = not asked for"
    )
    max_relative_error: float | None = Field(
        default=None, gt=0, description="largest relative error of stage one on held-out prompts; null = not asked for"
    )
    min_num_images: int = Field(default=100, ge=1, description="fewest pictures that the figures may rest on")


@dataclass(frozen=True)
class GateDecision:
    """Whether the student passed, and one sentence for every rule, the broken ones first."""

    passed: bool
    reasons: tuple[str, ...]


def decide(report: Report, *, num_inference_steps: int, settings: GateSettings) -> GateDecision:
    """Return whether the student of N steps may be promoted.

    Args:
        report: of a comparison.
        num_inference_steps: N of the student.
        settings: the rules.
    """
    student, teacher = report.find("student", num_inference_steps), report.find("teacher")
    if student is None or teacher is None:
        who = f"student of {num_inference_steps} steps" if student is None else "teacher"
        return GateDecision(False, (f"the report has no row for the {who}, so nothing can be judged",))
    rules = [_enough_images(student, settings.min_num_images), _kid(student, teacher, settings.max_kid_ratio)]
    if settings.min_alignment_ratio is not None:
        rules.append(_alignment(student, teacher, settings.min_alignment_ratio))
    if settings.max_paired_mse is not None:
        rules.append(_paired(student, settings.max_paired_mse))
    if settings.max_relative_error is not None:
        rules.append(_relative_error(report, settings.max_relative_error))
    broken = [reason for passed, reason in rules if not passed]
    return GateDecision(not broken, tuple(broken + [reason for passed, reason in rules if passed]))


_Rule = tuple[bool, str]


def _enough_images(student: Result, least: int) -> _Rule:
    enough = student.num_images >= least
    relation = "at least" if enough else "fewer than"
    return enough, f"measured on {student.num_images} pictures, {relation} the {least} that the gate asks for"


def _kid(student: Result, teacher: Result, limit: float) -> _Rule:
    name = "kid_lite0_to_real"
    own, of_teacher = student.kid_lite0_to_real, teacher.kid_lite0_to_real
    if own is None or of_teacher is None:
        return False, f"{name} is missing (student {own}, teacher {of_teacher})"
    if of_teacher <= 0:
        return False, f"the teacher's {name} is {of_teacher:.4f}, not above zero: too few pictures for a ratio"
    ratio = own / of_teacher
    return ratio <= limit, (
        f"{name} is {own:.4f}, {ratio:.2f} times the teacher's {of_teacher:.4f}; the gate allows {limit:.2f} times"
    )


def _alignment(student: Result, teacher: Result, limit: float) -> _Rule:
    own, of_teacher = student.alignment, teacher.alignment
    if own is None or of_teacher is None:
        return False, f"the alignment is missing (student {own}, teacher {of_teacher})"
    if of_teacher <= 0:
        return (
            False,
            f"the teacher's alignment is {of_teacher:.3f}, not above zero: the scorer or the teacher is at fault",
        )
    ratio = own / of_teacher
    return ratio >= limit, (
        f"the alignment is {own:.3f}, {ratio:.2f} times the teacher's {of_teacher:.3f}; "
        f"the gate asks for {limit:.2f} times"
    )


def _paired(student: Result, limit: float) -> _Rule:
    own = student.paired_mse
    if own is None:
        return False, "the paired distance to the teacher is missing"
    return own <= limit, f"the paired distance to the teacher is {own:.4f}; the gate allows {limit:.4f}"


def _relative_error(report: Report, limit: float) -> _Rule:
    own = report.stage_one_relative_error
    if own is None:
        return False, "the relative error of stage one is missing"
    return own <= limit, f"the relative error of stage one is {own:.3f}; the gate allows {limit:.3f}"
