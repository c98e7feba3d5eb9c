"""The clean samples of a batch: latents drawn from the VAE's posterior, or the pictures themselves."""

from __future__ import annotations

from torch import Tensor

from fewstep.diffusion.random import RowRandom
from fewstep.distill.objective import Batch


def draw_clean(batch: Batch, random: RowRandom) -> Tensor:
    """Return the clean samples x of a batch, (B, C, h, w), float32.

    Args:
        batch: with latent_mean and latent_std (x ~ N(mean, std²), already scaled), or with pixels, uint8, which become
            numbers in [−1, 1].
        random: draws of the rows; pixels take none.
    """
    if "pixels" in batch:
        return batch["pixels"].float() / 127.5 - 1
    mean, std = batch["latent_mean"].float(), batch["latent_std"].float()
    return mean + std * random.normal(*mean.shape[1:])
