"""What `report.json` holds. Field names are part of the interface: dashboards and the gate read them."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from fewstep.evaluate.baselines import Method
from fewstep.evaluate.distances import Interval


def _null_unless_finite(value: Any) -> Any:
    # A student that diverged gives NaN; JSON has no such number, and no rule may take it for one.
    parts = value if isinstance(value, tuple | list) else [value]
    return None if any(isinstance(part, float) and not math.isfinite(part) for part in parts) else value


Figure = Annotated[float | None, BeforeValidator(_null_unless_finite)]
FigureInterval = Annotated[Interval | None, BeforeValidator(_null_unless_finite)]


class _Figures(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Result(_Figures):
    """One method at one number of steps. `…_ci` is the 95 % interval of that field; null = none or not finite."""

    method: Method = Field(description="teacher (reference), ddim, dpmpp (the teacher with few steps) or student")
    num_inference_steps: int = Field(description="steps of the sampler")
    guidance_scale: float = Field(description="g = 1 + w, diffusers' convention")
    network_evaluations: int = Field(description="U-Net evaluations a picture, counted; a guided step counts 2")
    kid_lite0_to_real: Figure = Field(description="KID on EfficientNet-Lite0 features to held-out real pictures")
    kid_lite0_to_real_ci: FigureInterval
    kid_lite0_to_teacher: Figure = Field(description="the same to the teacher's pictures (same prompts and noise)")
    kid_lite0_to_teacher_ci: FigureInterval
    fd_lite0_to_real: Figure = Field(description="Fréchet distance on the same features to real pictures")
    fd_lite0_to_real_ci: FigureInterval
    alignment: Figure = Field(description="alignment_lite0_minilm: mean cosine of picture and prompt")
    alignment_ci: FigureInterval
    paired_mse: Figure = Field(description="mean squared latent distance to the teacher's picture of the same noise")
    paired_mse_ci: FigureInterval
    seconds_per_image: Figure = Field(description="network and sampler, median of the repeats, side by side")
    seconds_per_image_ci: FigureInterval
    num_images: int = Field(description="pictures that the row was measured on")


class Floor(_Figures):
    """What the metrics read where nothing is wrong."""

    kid_lite0: float = Field(description="real against real, two disjoint halves")
    kid_lite0_ci: Interval
    fd_lite0: float
    fd_lite0_ci: Interval
    num_images: int = Field(description="pictures in each half; the Fréchet distance falls as it grows")
    vae_kid_lite0: float | None = Field(description="real pictures through the VAE and back, against themselves")
    vae_kid_lite0_ci: Interval | None
    alignment: float | None = Field(description="real pictures with their own captions")
    alignment_ci: Interval | None


class Excess(_Figures):
    """How much of the baseline's loss is left: excess = kid_lite0_to_real − the teacher's own with many steps."""

    num_inference_steps: int = Field(description="of the student")
    at: Literal["equal_evaluations", "equal_steps"]
    baseline_method: Method = Field(description="the better of ddim and dpmpp")
    baseline_steps: int
    student_excess: float
    student_excess_ci: Interval
    baseline_excess: float
    baseline_excess_ci: Interval
    ratio: float | None = Field(description="student over baseline; null where the baseline has no excess to share")
    ratio_ci: Interval | None
    goal: float | None = Field(description="at most this; null where none was set")
    met: bool | None


class KidRatio(_Figures):
    """kid_lite0_to_real over the teacher's own with many steps."""

    num_inference_steps: int
    ratio: float | None
    ratio_ci: Interval | None
    goal: float | None
    met: bool | None


class WallClock(_Figures):
    """Seconds of the teacher over seconds of the student, measured side by side."""

    teacher_steps: int
    student_steps: int
    evaluation_ratio: float
    ratio: float
    ratio_ci: Interval
    goal: float
    met: bool


class Ratios(_Figures):
    """The comparisons that the goals are about."""

    excess: list[Excess]
    kid_to_teachers_own: list[KidRatio]
    wall_clock: WallClock | None


class StageUsage(_Figures):
    """What a stage of the workflow took."""

    name: str
    seconds: float
    peak_memory_bytes: int | None = None
    skipped: bool = Field(default=False, description="done in an earlier run")


class HoleResult(_Figures):
    """One method at one number of steps, as an inpainter. `…_ci` is the 95 % interval of that field."""

    method: Method
    num_inference_steps: int
    hole_mse: Figure = Field(
        description="mean squared distance (pixels of 0 to 1), inside the hole, to the teacher's picture of the same "
        "prompt, hole and noise"
    )
    hole_mse_ci: FigureInterval
    known_mse: Figure = Field(description="the same, outside the hole, to the real picture")
    known_mse_ci: FigureInterval


class Inpainting(_Figures):
    """What only inpainting models are judged by."""

    results: list[HoleResult]
    hole_share: float = Field(description="mean share of a picture that is hole")
    vae_known_mse: Figure = Field(
        description="known_mse of the real pictures through the VAE and back: what keeping them exactly reads"
    )
    vae_known_mse_ci: FigureInterval


class Report(_Figures):
    """The whole comparison."""

    schema_version: int = 1
    results: list[Result]
    floor: Floor
    ratios: Ratios
    stages: list[StageUsage] = []
    stage_one_relative_error: Figure = Field(
        default=None,
        description="relative L2 error of v̂ of the w-conditioned network against the guided pair, on held-out prompts "
        "and weights, before any halving",
    )
    inpainting: Inpainting | None = Field(default=None, description="of inpainting models alone")
    settings: dict[str, object] = Field(description="of the evaluation")
    num_real_images: int
    versions: dict[str, str]

    def find(self, method: Method, num_inference_steps: int | None = None) -> Result | None:
        """Return the row of a method (and number of steps), or None."""
        for result in self.results:
            if result.method == method and num_inference_steps in (None, result.num_inference_steps):
                return result
        return None
