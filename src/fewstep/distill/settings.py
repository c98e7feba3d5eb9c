"""What a recipe may say about the two stages of distillation."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fewstep.diffusion.grid import check_ladder
from fewstep.distill.weights import LossWeight


class GuidanceSettings(BaseModel):
    """Stage one: which guidance weights one network learns."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    w_min: float = Field(0.0, ge=0, description="smallest guidance weight; guidance_scale is 1 + w")
    w_max: float = Field(4.0, ge=0, description="largest guidance weight")
    embedding_dim: int = Field(256, ge=4, description="width of the embedding of w (time_cond_proj_dim)")
    loss_weight: LossWeight = Field("x", description="weight of the loss: x, snr, truncated_snr or snr_plus_one")

    @model_validator(mode="after")
    def _check(self) -> GuidanceSettings:
        if self.w_min >= self.w_max:
            raise ValueError(
                f"w_min={self.w_min:g} is not below w_max={self.w_max:g}: the range of guidance weights is upside down "
                "or empty; the paper uses 0 to 4 in pixel space and 2 to 14 for Stable Diffusion"
            )
        return self


class ProgressiveSettings(BaseModel):
    """Stage two: the halving ladder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ladder: tuple[int, ...] = Field((16, 8, 4, 2, 1), description="step counts of the students, each half of the last")
    loss_weight: LossWeight = Field("truncated_snr", description="weight of the loss, as in stage one")

    @model_validator(mode="after")
    def _check(self) -> ProgressiveSettings:
        check_ladder(self.ladder)
        return self
