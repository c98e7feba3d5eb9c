"""What a recipe may say about the two stages of distillation."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fewstep.diffusion.grid import check_ladder
from fewstep.diffusion.prediction import PredictionType
from fewstep.distill.errors import ErrorName, StepErrorName
from fewstep.distill.jumps import plan_jumps
from fewstep.distill.weights import LossWeight
from fewstep.models.lora import LoraSettings
from fewstep.models.student import StudentKind

_PREDICTION = "what the students output: epsilon, v_prediction or sample; null: what their teacher does"
_PURE_NOISE = (
    "show the network pure noise at the noisiest time, where sampling begins, although the schedule leaves a trace of "
    "the picture there"
)
_ERROR = "how far an output is from its target: mse or pseudo_huber (Song & Dhariwal 2024)"
_LORA = "train low-rank adapters (LoRA) on a frozen network, instead of all its weights; needs the extra [lora]"


#: What a ladder can be made for.
LadderKind = Literal["deterministic", "stochastic", "encoder", "naive", "single_w"]


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
    lora: LoraSettings | None = Field(None, description=_LORA + "; with single_w only")

    @model_validator(mode="after")
    def _check(self) -> GuidanceSettings:
        if self.lora is not None and self.single_w is None:
            raise ValueError(
                "lora needs single_w in stage one: the input for w is a new layer, which adapters on the teacher "
                "cannot bring along, so no stock pipeline could load them. Set single_w; or train stage one whole and "
                "give lora to progressive, whose adapters then sit on the w-conditioned network of stage one"
            )
        unused = sorted(self.model_fields_set & {"w_min", "w_max", "embedding_dim"})
        if self.single_w is not None and unused:
            raise ValueError(
                f"{' and '.join(unused)} has no effect beside single_w={self.single_w:g}, a student without an input "
                "for w: leave out one or the other"
            )
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
    kinds: tuple[LadderKind, ...] = Field(
        ("deterministic",),
        min_length=1,
        description="ladders to train: deterministic, stochastic (for the stochastic sampler), encoder (from the "
        "picture to noise), naive (the guided pair without stage one: the negative control) and single_w (students of "
        "one weight each, from the guided teacher itself: the paper's baseline)",
    )
    single_w: tuple[float, ...] = Field((), description="guidance weights of the single_w ladders")
    skip_level: tuple[int, ...] = Field(
        (), description="step counts whose teacher is the student two rungs before instead of the one before"
    )
    start_times: dict[int, int] = Field(
        default_factory=dict,
        description="step count N -> M: this student may also start at the times j/M (deterministic ladder)",
    )
    loss_weight: LossWeight = Field("truncated_snr", description="weight of the loss, as in stage one")
    error: StepErrorName = Field(
        "mse",
        description=_ERROR + "; or features: the mse and an LPIPS-like distance (Zhang et al. 2018) between the states "
        "that student and teacher reach, in the down blocks of the frozen teacher; two more passes through them, one "
        "with gradients, about a sixth more time an update, and their activations; not in naive ladders",
    )
    feature_weight: float = Field(1.0, gt=0, description="factor on the distance in features, with error=features")
    prediction_type: dict[int, PredictionType] = Field(
        default_factory=dict, description="step count -> " + _PREDICTION.replace("the students output", "it outputs")
    )
    pure_noise_at_end: bool = Field(False, description=_PURE_NOISE)
    trajectory_inputs: bool = Field(
        False,
        description="train on states of the teacher's own sampler instead of noised data (Clockwork Diffusion, AGD; "
        "deterministic ladder); costs the teacher's steps from pure noise down to there",
    )
    denoising_weight: float = Field(
        0.0,
        ge=0,
        description="size of the ordinary denoising loss on the data that is added, relative to the step's loss "
        "(SnapFusion's gamma, 0.2 there); it pulls guided outputs towards unguided ones, and SnapFusion's students, "
        "those of the naive ladder, take no w",
    )
    guided_share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="naive ladder: share of samples that are trained under guidance (SnapFusion: 0.1, w in 1 to 13)",
    )
    lora: LoraSettings | None = Field(
        None,
        description=_LORA + ". What they sit on is stage one's network or, where that has adapters itself and in "
        "single_w ladders, the teacher; each rung goes on from the adapters of the one before; not in naive ladders",
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
        kinds = {student_kind(kind) for kind in self.kinds}
        if any(w < 0 for w in self.single_w) or len(set(self.single_w)) != len(self.single_w):
            raise ValueError(f"single_w={list(self.single_w)}: weights must be 0 or more, each named once")
        if ("single_w" in self.kinds) != bool(self.single_w):
            raise ValueError(
                f"kinds {list(self.kinds)} and single_w {list(self.single_w)} do not fit: name single_w among the "
                "kinds and its weights under single_w, or neither"
            )
        for kind in self.kinds:
            for steps in self.ladder:
                plan_jumps(
                    student_kind(kind),
                    steps,
                    teacher_steps=self.teacher_of(steps)[1],
                    start_times=self.start_times.get(steps) if student_kind(kind) == "deterministic" else None,
                )
        for steps, start_times in self.start_times.items():
            taught_by, teacher_steps = self.teacher_of(steps)
            # Stage one knows every time; a rung knows its own, and its own extra ones.
            known = teacher_steps if taught_by is None else self.start_times.get(taught_by, teacher_steps)
            if taught_by is not None and known % start_times:
                raise ValueError(
                    f"start_times[{steps}]={start_times}: from some of these times the teacher of {teacher_steps} "
                    f"steps would have to jump where it never learned to; give it start_times too "
                    f"({{{teacher_steps}: {math.lcm(start_times, teacher_steps)}}})"
                )
            if self.trajectory_inputs and taught_by is not None:
                raise ValueError(
                    f"start_times[{steps}]={start_times} cannot be used with trajectory_inputs: from pure noise down "
                    "to these times its teacher would make jumps that it never learned; leave out one"
                )
        for key, given, wanted in (
            ("trajectory_inputs", self.trajectory_inputs, {"deterministic"}),
            ("start_times", bool(self.start_times), {"deterministic"}),
            ("pure_noise_at_end", self.pure_noise_at_end, {"deterministic", "stochastic"}),
            ("guided_share", self.guided_share != 1.0, {"naive"}),
        ):
            if given and not kinds & wanted:
                raise ValueError(
                    f"{key} has no effect on the ladders {list(self.kinds)}: it is for {' and '.join(sorted(wanted))} "
                    "students; leave it out, or add such a ladder to kinds"
                )
        others = {steps: kind for steps, kind in self.prediction_type.items() if kind != "v_prediction"}
        if others and "encoder" in self.kinds:
            raise ValueError(
                f"prediction_type {others} cannot be used for encoders, which output v_prediction: near the clean "
                "picture an error of x̂ or eps-hat would be multiplied by thousands; leave out encoder or the types"
            )
        for key, unwanted in (
            ("error=features", self.error == "features"),
            ("lora", self.lora is not None),
            ("prediction_type", bool(self.prediction_type)),
        ):
            if unwanted and "naive" in self.kinds:
                raise ValueError(
                    f"{key} is not for the naive ladder, and kinds is {list(self.kinds)}: leave out one of the two"
                )
        if self.feature_weight != 1.0 and self.error != "features":
            raise ValueError(
                f"feature_weight={self.feature_weight:g} has no effect with error={self.error}: set error=features"
            )
        if self.trajectory_inputs and self.denoising_weight:
            raise ValueError(
                f"denoising_weight={self.denoising_weight:g} cannot be used with trajectory_inputs: a state of the "
                "teacher's own sampler comes from no picture of the data that could be its target; leave out one"
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


def student_kind(ladder: LadderKind) -> StudentKind:
    """Return how the students of a ladder are sampled."""
    return "deterministic" if ladder == "single_w" else ladder


def student_label(kind: LadderKind, num_inference_steps: int, *, w: float | None = None) -> str:
    """Return how a student is called in stages, runs and reports: "4", "stochastic-4", "naive-4", "single_w-1-4"."""
    if w is not None:
        return f"{kind}-{w:g}-{num_inference_steps}"
    return str(num_inference_steps) if kind == "deterministic" else f"{kind}-{num_inference_steps}"
