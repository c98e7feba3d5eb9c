"""Settings of the class-conditional comparison."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from fewstep.evaluate.classes.classifier import ClassifierSettings
from fewstep.evaluate.classes.precision_recall import NEIGHBOURS


class ClassCompareSettings(BaseModel):
    """How the rows are measured and which of them the headline compares."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    batch_size: int = Field(default=250, ge=1, description="pictures asked of the sampler at a time")
    seed: int = Field(default=0, ge=0, description="of the groups behind the intervals and of the halves of the floor")
    neighbours: int = Field(default=NEIGHBOURS, ge=1, description="of precision and recall: k, which sets the radii")
    max_manifold_pictures: int = Field(
        default=5000,
        ge=20,
        description="pictures a side for precision and recall at most; time grows with the square",
    )
    grid_columns: int = Field(default=10, ge=1, description="classes in the picture grid")
    match_steps: tuple[int, ...] = Field(
        default=(4, 8), description="students of these steps are held against the many-step teacher's interval"
    )
    early_steps: tuple[int, ...] = Field(
        default=(1, 2), description="students of these steps are held against the plain samplers of the same steps"
    )
    equal_within: float = Field(
        default=0.05,
        ge=0,
        lt=1,
        description="a Fréchet distance up to this share above the teacher's counts as equal to it, and a classifier "
        "score up to this share below",
    )


class ClassEvaluateSettings(BaseModel):
    """What is compared: weights, steps, on how many pictures; and the classifier that judges."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: tuple[float, ...] = Field((0.0, 0.3, 1.0, 2.0, 4.0), min_length=1, description="guidance weights w")
    steps: tuple[int, ...] = Field(
        (16, 8, 4, 2, 1), min_length=1, description="students and plain samplers to judge, by number of steps"
    )
    reference_steps: int = Field(64, ge=1, description="steps of the guided teacher that all are measured against")
    num_pictures: int = Field(1000, ge=40, description="pictures of each row, equally many of every class")
    num_real: int = Field(10_000, ge=40, description="held-out pictures at most")
    classifier: ClassifierSettings = Field(
        default_factory=ClassifierSettings, description="training of the classifier whose features are used"
    )
    num_train: int = Field(60_000, ge=1, description="training pictures at most that the classifier sees")
    compare: ClassCompareSettings = Field(
        default_factory=ClassCompareSettings, description="how rows are measured and which of them are compared"
    )
