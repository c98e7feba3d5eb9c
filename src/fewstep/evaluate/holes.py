"""Inpainting: how far a picture is from the teacher's inside its hole, and from the real one outside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.errors import DataError
from fewstep.evaluate import distances
from fewstep.evaluate.baselines import RowSpec
from fewstep.evaluate.schema import HoleResult, Inpainting
from fewstep.evaluate.settings import EvaluateSettings


@dataclass(frozen=True)
class Holes:
    """The pictures that are inpainted; row i of each belongs together.

    Attributes:
        pictures: whole real pictures, uint8 (N, 3, H, W).
        masks: bool (N, 1, H, W), True where the hole is.
    """

    pictures: Tensor
    masks: Tensor

    def __post_init__(self) -> None:
        wanted = (self.pictures.shape[0], 1, *self.pictures.shape[2:])
        if self.masks.shape != wanted or self.masks.dtype != torch.bool:
            raise DataError(
                f"the masks are {self.masks.dtype} {tuple(self.masks.shape)}, but pictures of the shape "
                f"{tuple(self.pictures.shape)} need torch.bool {wanted}: give one mask of the same size a picture"
            )

    def head(self, count: int) -> Holes:
        """Return the first `count` rows."""
        return Holes(self.pictures[:count], self.masks[:count])

    def shown(self) -> Tensor:
        """Return the pictures with their holes grey, uint8 (N, 3, H, W): what is given."""
        return torch.where(self.masks, torch.full((), 128, dtype=torch.uint8), self.pictures)


def masked_mse(images: Tensor, others: Tensor, masks: Tensor) -> Tensor:
    """Return the mean squared difference of each picture to its partner where its mask is True, (N,) float64.

    Args:
        images, others: uint8 (N, 3, H, W); their pixels count as 0 to 1.
        masks: bool (N, 1, H, W), each with at least one True.
    """
    squared = ((images.double() - others.double()) / 255).square().mean(1, keepdim=True)
    return (squared * masks).flatten(1).sum(1) / masks.flatten(1).sum(1)


def measure_holes(
    spec: RowSpec, images: Tensor, *, teacher: Tensor, holes: Holes, settings: EvaluateSettings
) -> HoleResult:
    """Return how well a row fills the holes and keeps what is around them.

    Args:
        spec: the row.
        images: its pictures, uint8 (N, 3, H, W).
        teacher: the reference's, of the same prompts, holes and noise.
        holes: N of them.
        settings: of the comparison.
    """
    draws: dict[str, Any] = {"num_bootstrap": settings.num_bootstrap, "seed": settings.seed}
    hole = distances.mean_with_interval(masked_mse(images, teacher, holes.masks), **draws)
    known = distances.mean_with_interval(masked_mse(images, holes.pictures, ~holes.masks), **draws)
    return HoleResult(
        method=spec.method,
        num_inference_steps=spec.num_inference_steps,
        hole_mse=hole.value,
        hole_mse_ci=hole.interval,
        known_mse=known.value,
        known_mse_ci=known.interval,
    )


def summarise_holes(
    results: list[HoleResult], holes: Holes, *, through_vae: Tensor, settings: EvaluateSettings
) -> Inpainting:
    """Return the report's part on inpainting.

    Args:
        results: of all rows.
        holes: N of them.
        through_vae: the N real pictures through the VAE and back, uint8.
        settings: of the comparison.
    """
    draws: dict[str, Any] = {"num_bootstrap": settings.num_bootstrap, "seed": settings.seed}
    vae = distances.mean_with_interval(masked_mse(through_vae, holes.pictures, ~holes.masks), **draws)
    return Inpainting(
        results=results,
        hole_share=float(holes.masks.double().mean()),
        vae_known_mse=vae.value,
        vae_known_mse_ci=vae.interval,
    )
