"""Settings of the comparison."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fewstep.evaluate.baselines import DpmSolverSettings


class EvaluateSettings(BaseModel):
    """What is compared, on how many pictures, and how closely it is timed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_prompts: int = Field(default=1000, ge=20, description="held-out prompts, one picture each for every method")
    steps: tuple[int, ...] = Field(
        default=(8, 4, 2, 1),
        min_length=1,
        description="students to judge, by number of steps; the teacher's plain samplers are run at these and, for "
        "equal network evaluations, at half of them",
    )
    guidance_scale: float = Field(default=4.0, ge=1, description="g = 1 + w, for the teacher and the students alike")
    reference_steps: int = Field(
        default=50, ge=1, description="steps of the guided teacher that all are measured against"
    )
    batch_size: int = Field(default=64, ge=1, description="pictures sampled at a time")
    seed: int = Field(default=0, ge=0, description="of the bootstrap and of the splits")
    num_bootstrap: int = Field(default=1000, ge=100, description="bootstrap draws behind each interval")
    timing_batch_size: int = Field(default=16, ge=1, description="pictures at a time while timing, for every method")
    timing_repeats: int = Field(
        default=6,
        ge=6,
        description="timed rounds over all methods; from 6 on, their range is a 95 % interval of the median",
    )
    grid_prompts: int = Field(default=8, ge=1, description="columns of the picture grid")
    show: tuple[str, ...] = Field(
        default=(),
        description="prompts of your own for the first columns of the picture grid, which no figure counts; held-out "
        "prompts fill the others",
    )
    dpm_solver: DpmSolverSettings = Field(
        default=DpmSolverSettings(),
        description="the DPM-Solver++ baseline; give the teacher the settings that suit it best",
    )
    num_threads: int | None = Field(default=None, ge=1, description="CPU threads for the features; null = torch's own")

    @model_validator(mode="after")
    def _room_for_shown(self) -> Self:
        if len(self.show) > self.grid_prompts:
            raise ValueError(
                f"show has {len(self.show)} prompts and the picture grid grid_prompts={self.grid_prompts} columns: "
                f"set grid_prompts to {len(self.show)}, or show fewer"
            )
        return self

    @field_validator("steps")
    @classmethod
    def _positive_and_different(cls, steps: tuple[int, ...]) -> tuple[int, ...]:
        if min(steps) < 1 or len(set(steps)) != len(steps):
            raise ValueError(f"steps={list(steps)} must be different numbers from 1 on, for example [8, 4, 2, 1]")
        return tuple(sorted(steps, reverse=True))
