"""What can be set about a benchmark."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Stage = Literal["guidance", "progressive"]
Precision = Literal["float32", "bfloat16"]


EAGER = "eager"

#: What `bench train --variants` can switch on, as settings of the training itself.
SWITCHES: dict[str, dict[str, Any]] = {
    EAGER: {},
    "channels_last": {"channels_last": True},
    "compile": {"compile": True},
    "checkpoint": {"gradient_checkpointing": True},
}


class Tuning(BaseModel):
    """Ways to make a GPU faster; all are off unless asked for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    channels_last: bool = Field(default=False, description="keep convolution weights and activations as NHWC")
    compile: bool = Field(default=False, description="torch.compile the networks, in place")
    tf32: bool = Field(default=False, description="TF32 for float32 matrix products (convolutions have it anyway)")
    cudnn_benchmark: bool = Field(default=False, description="let cuDNN try its kernels and keep the fastest")

    def names(self) -> list[str]:
        """Return what is switched on."""
        return [name for name, on in self.model_dump().items() if on]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: the GPU where there is one")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="auto: the recipe's for its training, otherwise bfloat16 on a GPU, float32 on a CPU"
    )
    batch_size: int | None = Field(
        default=None, ge=1, description="pictures at once; null: the recipe's, or a usual one"
    )
    rounds: int = Field(default=5, ge=1, description="pairs of (our code, bare network calls) that are compared")
    tuning: Tuning = Field(default_factory=Tuning, description="ways to make a GPU faster")


class TrainBenchSettings(_Settings):
    """`fewstep bench train`."""

    stage: Stage = Field(default="guidance", description="guidance is stage one, progressive a rung of stage two")
    resolution: int = Field(default=512, ge=64, multiple_of=64, description="side in pixels; for the shape sd15 alone")
    updates: int = Field(default=10, ge=2, multiple_of=2, description="measured updates of each round")
    variants: tuple[str, ...] = Field(
        default=(),
        description="ways to train that are compared with each other, not with the bare network calls: eager (always "
        "there), channels_last, compile, checkpoint, or several joined by +",
    )

    @field_validator("variants")
    @classmethod
    def _check_variants(cls, variants: tuple[str, ...]) -> tuple[str, ...]:
        strange = [name for variant in variants for name in variant.split("+") if name not in SWITCHES]
        if strange:
            raise ValueError(
                f"{', '.join(strange)} is no variant; there are {', '.join(SWITCHES)}, and several of them joined by +"
            )
        # Each once, and the one that the others are compared with first.
        return tuple(dict.fromkeys((EAGER, *variants))) if variants else ()

    @model_validator(mode="after")
    def _check_tuning(self) -> Self:
        both = [name for name in ("channels_last", "compile") if self.variants and getattr(self.tuning, name)]
        if both:
            raise ValueError(f"{', '.join(both)} is a variant of its own: name it in variants, or leave variants out")
        return self


class SampleBenchSettings(_Settings):
    """`fewstep bench sample`."""

    resolution: int = Field(default=512, ge=64, multiple_of=64, description="side in pixels; for the shape sd15 alone")
    num_inference_steps: int | None = Field(
        default=None, ge=1, description="steps of the student; null: what it was made for, or else 4"
    )
    teacher_steps: int = Field(default=50, ge=0, description="guided steps of the teacher beside it; 0 leaves it out")
