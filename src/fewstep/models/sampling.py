"""Networks as functions of (z, time), which is what the samplers take."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.models import UNet2DConditionModel
from torch import Tensor

from fewstep.diffusion.guidance import guide
from fewstep.diffusion.samplers import Model
from fewstep.models.embedding import guidance_embedding


def guided_model(unet: UNet2DConditionModel, conditional: Tensor, unconditional: Tensor, w: Tensor | float) -> Model:
    """Return the classifier-free-guided network; both branches run in one batch of 2B.

    Args:
        unet: the teacher.
        conditional: text embeddings of the prompts, (B, L, D).
        unconditional: embedding of the null prompt, (1, L, D) or (B, L, D).
        w: guidance weight, a number or (B,).
    """
    embeddings = torch.cat([conditional, unconditional.expand_as(conditional)])

    def model(z: Tensor, index: Tensor) -> Tensor:
        # In float32: w would otherwise be rounded to the network's precision, which the student's own w is not.
        output = unet(torch.cat([z, z]).to(unet.dtype), torch.cat([index, index]), embeddings).sample.float()
        with_prompt, without = output.chunk(2)
        return guide(with_prompt, without, w)

    return model


def student_model(unet: UNet2DConditionModel, conditional: Tensor, w: Tensor | float) -> Model:
    """Return the w-conditioned student: one evaluation for each picture and step.

    Args:
        unet: a U-Net with `time_cond_proj_dim`.
        conditional: text embeddings of the prompts, (B, L, D).
        w: guidance weight, a number or (B,).
    """
    weights = w if isinstance(w, Tensor) else torch.full((conditional.shape[0],), w, device=conditional.device)
    embedding = guidance_embedding(weights, unet.config["time_cond_proj_dim"]).to(unet.dtype)

    def model(z: Tensor, index: Tensor) -> Tensor:
        return unet(z.to(unet.dtype), index, conditional, timestep_cond=embedding).sample

    return model


def initial_noise(seeds: Sequence[int], shape: tuple[int, ...], *, device: torch.device | str = "cpu") -> Tensor:
    """Return standard normal noise, (B, *shape), each picture from a CPU generator of its own seed."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]).to(device)
