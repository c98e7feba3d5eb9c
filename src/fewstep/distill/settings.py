"""What a recipe may say about the two stages of distillation."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fewstep.diffusion.grid import check_ladder
from fewstep.diffusion.prediction import PredictionType
from fewstep.distill.errors import ErrorName
from fewstep.distill.jumps import plan_jumps
from fewstep.distill.weights import LossWeight
from fewstep.models.student import StudentKind

_PREDICTION = "what the students output: epsilon, v_prediction or sample; null: what their teacher does"
_PURE_NOISE = (
    "show the network pure noise at the noisiest time, where sampling begins, although the schedule leaves a trace of "
    "the picture there"
)
_ERROR = "how far an output is from its target: mse or pseudo_huber (Song & Dhariwal 2024)"


class GuidanceSettings(BaseModel):
    """Stage one: which guidance weights one network learns."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    w_min: float = Field(0.0, ge=0, description="smallest guidance weight; guidance_scale is 1 + w")
    w_max: float = Field(4.0, ge=0, description="largest guidance weight")
    single_w: float | None = Field(
        None, ge=0, description="one guidance weight instead of the range: a student without an input for w"
    )
    embedding_dim: int = Field(256, ge=4, description="width of the embedding of w (time_cond_proj_dim)")
    loss_weight: LossWeight = Field(
        "x", description="weight of the loss: x, snr, truncated_snr, snr_plus_one or min_snr"
    )
    error: ErrorName = Field("mse", description=_ERROR)
    prediction_type: PredictionType | None = Field(None, description=_PREDICTION)
    pure_noise_at_end: bool = Field(False, description=_PURE_NOISE)

    @model_validator(mode="after")
    def _check(self) -> GuidanceSettings:
        if self.w_min >= self.w_max:
            raise ValueError(
                f"w_min={self.w_min:g} is not below w_max={self.w_max:g}: the range of guidance weights is upside down "
                "or empty; the paper uses 0 to 4 in pixel space and 2 to 14 for Stable Diffusion. For a student of "
                "one weight set single_w"
            )
        return self

    @property
    def weights(self) -> tuple[float, float]:
        """The smallest and largest guidance weight that the student learns."""
        return (self.w_min, self.w_max) if self.single_w is None else (self.single_w, self.single_w)


class ProgressiveSettings(BaseModel):
    """Stage two: the ladder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ladder: tuple[int, ...] = Field(
        (16, 8, 4, 2, 1),
        description="step counts of the students, each a divisor of the one before; half is the paper's",
    )
    first_teacher_steps: int | None = Field(
        None, gt=1, description="steps of the first student's teacher; null: twice the first student's"
    )
    kinds: tuple[StudentKind, ...] = Field(
        ("deterministic",),
        min_length=1,
        description="ladders to train: deterministic, stochastic (for the stochastic sampler), encoder (from the "
        "picture to noise) and naive (the guided pair without stage one: the negative control)",
    )
    skip_level: tuple[int, ...] = Field(
        (), description="step counts whose teacher is the student two rungs before instead of the one before"
    )
    start_times: dict[int, int] = Field(
        default_factory=dict,
        description="step count N -> M: this student may also start at the times j/M (deterministic ladder)",
    )
    loss_weight: LossWeight = Field("truncated_snr", description="weight of the loss, as in stage one")
    error: ErrorName = Field("mse", description=_ERROR)
    prediction_type: dict[int, PredictionType] = Field(
        default_factory=dict, description="step count -> " + _PREDICTION.replace("the students output", "it outputs")
    )
    pure_noise_at_end: bool = Field(False, description=_PURE_NOISE)
    trajectory_inputs: bool = Field(
        False, description="train on states of the teacher's own sampler instead of noised data (deterministic ladder)"
    )
    denoising_weight: float = Field(
        0.0, ge=0, description="share of the ordinary denoising loss on the data that is added (SnapFusion)"
    )
    guided_share: float = Field(
        1.0, gt=0, le=1, description="naive ladder: share of samples that are trained under guidance (SnapFusion)"
    )

    @model_validator(mode="after")
    def _check(self) -> ProgressiveSettings:
        check_ladder(self.ladder, first_teacher_steps=self.first_teacher_steps, num_train_timesteps=None)
        if len(set(self.kinds)) != len(self.kinds):
            raise ValueError(f"kinds {list(self.kinds)} names a ladder twice: name each once")
        for key in ("skip_level", "start_times", "prediction_type"):
            strangers = sorted(set(getattr(self, key)) - set(self.ladder))
            if strangers:
                raise ValueError(
                    f"{key} names the step counts {strangers}, which are not in the ladder {list(self.ladder)}"
                )
        if self.ladder[0] in self.skip_level:
            raise ValueError(
                f"skip_level names {self.ladder[0]}, the ladder's first: its teacher is stage one; set "
                f"first_teacher_steps={4 * self.ladder[0]} for longer jumps"
            )
        for kind in self.kinds:
            for steps in self.ladder:
                plan_jumps(
                    kind,
                    steps,
                    teacher_steps=self.teacher_of(steps)[1],
                    start_times=self.start_times.get(steps) if kind == "deterministic" else None,
                )
        if self.trajectory_inputs and "deterministic" not in self.kinds:
            raise ValueError(
                f"trajectory_inputs is for the deterministic ladder, and kinds is {list(self.kinds)}: leave it out"
            )
        return self

    def teacher_of(self, num_inference_steps: int) -> tuple[int | None, int]:
        """Return the rung that teaches this one (None: stage one) and the number of steps that it takes."""
        place = self.ladder.index(num_inference_steps)
        back = place - (2 if num_inference_steps in self.skip_level else 1)
        if back < 0:
            first = self.first_teacher_steps or 2 * self.ladder[0]
            return None, first
        return self.ladder[back], self.ladder[back]


def student_label(kind: StudentKind, num_inference_steps: int) -> str:
    """Return how a student is called in stages, runs and reports: "4", "stochastic-4", "encoder-4", "naive-4"."""
    return str(num_inference_steps) if kind == "deterministic" else f"{kind}-{num_inference_steps}"
