"""What the class-conditional `report.json` holds. Field names are part of the interface."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from fewstep.errors import SamplingError
from fewstep.evaluate.classes.jackknife import Measured
from fewstep.evaluate.classes.settings import ClassCompareSettings

ClassMethod = Literal["student", "student_stochastic", "student_single_w", "dpmpp", "ddim", "teacher"]

#: In the order of the tables.
METHOD_NAMES: Mapping[ClassMethod, str] = {
    "student": "student, deterministic",
    "student_stochastic": "student, stochastic",
    "student_single_w": "student, single w",
    "dpmpp": "teacher, DPM-Solver++",
    "ddim": "teacher, DDIM",
    "teacher": "teacher, many steps",
}
STUDENTS: tuple[ClassMethod, ...] = ("student", "student_stochastic", "student_single_w")
PLAIN_SAMPLERS: tuple[ClassMethod, ...] = ("ddim", "dpmpp")

MetricName = Literal["fd_classifier", "classifier_score", "accuracy", "precision", "recall"]


@dataclass(frozen=True, order=True)
class ClassRowSpec:
    """One row of the comparison.

    Attributes:
        method: who makes the pictures.
        num_inference_steps: N.
        w: guidance weight of the paper, ≥ 0; diffusers' guidance_scale is 1 + w.

    Raises:
        SamplingError: an unknown method, no steps, or a weight that is negative or not finite.
    """

    method: ClassMethod
    num_inference_steps: int
    w: float

    def __post_init__(self) -> None:
        if self.method not in get_args(ClassMethod):
            raise SamplingError(f"method={self.method!r} is none of {', '.join(get_args(ClassMethod))}")
        if self.num_inference_steps < 1:
            raise SamplingError(f"num_inference_steps={self.num_inference_steps} must be at least 1")
        if not (math.isfinite(self.w) and self.w >= 0):
            raise SamplingError(f"w={self.w} must be a guidance weight from 0 on (guidance_scale = 1 + w)")

    @property
    def network_evaluations(self) -> int:
        """Evaluations a picture: N of a student, 2N of a guided teacher, N of a teacher at w = 0.

        At w = 0 the unconditional network has the weight 0 and need not be run. The paper's tables count 2N there too;
        counting it would make the students look twice as cheap as they are.
        """
        a_step = 1 if self.method in STUDENTS or self.w == 0 else 2
        return a_step * self.num_inference_steps

    def __str__(self) -> str:
        steps = "1 step" if self.num_inference_steps == 1 else f"{self.num_inference_steps} steps"
        return f"{METHOD_NAMES[self.method]}, {steps}, w = {self.w:g}"


class _Figures(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ClassResult(_Figures):
    """One method at one number of steps and one guidance weight; every figure with its 95 % interval."""

    method: ClassMethod
    num_inference_steps: int
    w: float = Field(description="guidance weight of the paper; guidance_scale = 1 + w")
    network_evaluations: int = Field(description="a picture; a guided step counts 2")
    fd_classifier: Measured = Field(description="Fréchet distance to real pictures on the classifier's features")
    classifier_score: Measured = Field(description="exp(mean KL(p(y|x) ‖ p(y))), 1 … number of classes")
    accuracy: Measured = Field(description="share that the classifier takes for the asked class")
    precision: Measured = Field(description="share of generated pictures in the manifold of the real ones")
    recall: Measured = Field(description="share of real pictures in the manifold of the generated ones")
    seconds_per_picture: Measured = Field(description="of the sampler: median over the batches of one size")
    num_pictures: int
    num_manifold_pictures: int = Field(description="pictures a side behind precision and recall")

    @property
    def spec(self) -> ClassRowSpec:
        """The row that this is."""
        return ClassRowSpec(self.method, self.num_inference_steps, self.w)

    def metric(self, name: MetricName) -> Measured:
        """Return one of the quality figures by its field name."""
        figure: Measured = getattr(self, name)
        return figure


class RealFloor(_Figures):
    """What the figures read for real pictures, that is where nothing is wrong."""

    fd_classifier: Measured = Field(description="two disjoint halves against each other; falls as they grow")
    precision: Measured = Field(description="of one half in the other's manifold")
    recall: Measured
    classifier_score: Measured = Field(description="of all real pictures")
    accuracy: Measured = Field(description="of the classifier on all real pictures: with the given labels")
    num_pictures: int = Field(description="all real pictures, which the Fréchet distances of the rows are taken to")
    num_half: int = Field(description="pictures in each half")
    num_manifold_half: int = Field(description="pictures a half behind precision and recall")


class ClassifierFacts(_Figures):
    """Which classifier the figures come from; figures of another fingerprint must not be compared."""

    fingerprint: str
    channels: int
    resolution: int
    num_classes: int
    feature_dim: int
    settings: dict[str, object]


class TeacherMatch(_Figures):
    """A student against the many-step teacher of the same w."""

    method: ClassMethod
    num_inference_steps: int
    w: float
    metric: Literal["fd_classifier", "classifier_score"]
    student: Measured
    teacher: Measured
    difference: Measured = Field(description="student − teacher, over pictures of one class and noise each")
    within: bool | None = Field(description="the student's value lies in the teacher's interval")
    not_worse: bool | None = Field(description="the student's value lies in it or on its better side")


class Speedup(_Figures):
    """The fewest steps with which a student equals the many-step teacher of the same w, or is better."""

    method: ClassMethod
    num_inference_steps: int
    w: float
    equal_in: Literal["distance", "distance_and_score"]
    fd_ratio: Measured = Field(description="Fréchet distance of the student over the teacher's")
    score_ratio: Measured = Field(description="classifier score of the student over the teacher's")
    evaluation_ratio: float = Field(description="network evaluations of the teacher over the student's")
    certain: bool = Field(description="the whole intervals count as equal, not the values alone")
    plain_method: ClassMethod | None = Field(description="the cheapest plain sampler that equals the teacher too")
    plain_steps: int | None
    plain_evaluation_ratio: float | None = Field(description="evaluations of that plain sampler over the student's")


class EarlyRatio(_Figures):
    """A plain sampler of the teacher over a student, at one number of steps."""

    method: ClassMethod
    baseline: ClassMethod
    num_inference_steps: int
    w: float
    fd_ratio: Measured = Field(
        description="Fréchet distance of the baseline over the student's; above 1 = student wins"
    )


class SingleW(_Figures):
    """A student of one w only against the w-conditioned student, both deterministic."""

    num_inference_steps: int
    w: float
    single_w: Measured
    w_conditioned: Measured
    fd_ratio: Measured = Field(description="Fréchet distance of single-w over w-conditioned")
    difference: Measured = Field(description="single-w − w-conditioned")
    better: Literal["single_w", "w_conditioned", "neither"] | None = Field(
        description="neither = the interval of fd_ratio holds 1"
    )


class Headline(_Figures):
    """The comparisons that the paper's claims are about."""

    teacher_matches: list[TeacherMatch]
    speedups: list[Speedup] = Field(description="for each student, w and `equal_in`, where there are equal steps")
    largest_speedup: Speedup | None = Field(description="equal in distance and score")
    largest_speedup_by_distance: Speedup | None = Field(description="equal in distance, whatever the score")
    early_ratios: list[EarlyRatio]
    single_w: list[SingleW]


class ClassReport(_Figures):
    """The whole class-conditional comparison."""

    schema_version: int = 1
    results: list[ClassResult]
    floor: RealFloor
    headline: Headline
    classifier: ClassifierFacts
    settings: ClassCompareSettings
    pictures_per_class: list[int] = Field(description="asked pictures of class 0, 1 …, the same in every row")
    noise_seeds: list[tuple[int, int]] = Field(
        description="of the pictures in order, as runs: (5, 9) is 5, 6, 7, 8; the same in every row"
    )
    versions: dict[str, str]

    def find(self, method: ClassMethod, w: float, num_inference_steps: int | None = None) -> ClassResult | None:
        """Return the row of a method, weight (and number of steps), or None."""
        return find_row(self.results, method, w, num_inference_steps)


def find_row(
    results: Sequence[ClassResult], method: ClassMethod, w: float, num_inference_steps: int | None = None
) -> ClassResult | None:
    """Return the row of a method, weight (and number of steps), or None."""
    for result in results:
        steps_fit = num_inference_steps in (None, result.num_inference_steps)
        if result.method == method and result.w == w and steps_fit:
            return result
    return None
