"""Clean latents of a batch, drawn from the VAE's posterior."""

from __future__ import annotations

from torch import Tensor

from fewstep.diffusion.random import RowRandom
from fewstep.distill.objective import Batch


def draw_latents(batch: Batch, random: RowRandom) -> Tensor:
    """Return latents x ~ N(mean, std²) of the batch, (B, C, h, w), float32, already scaled."""
    mean = batch["latent_mean"].float()
    return mean + batch["latent_std"].float() * random.normal(*mean.shape[1:])
