"""The embedding of the guidance weight."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def guidance_embedding(w: Tensor, embedding_dim: int) -> Tensor:
    """Return the embedding of guidance weights that diffusers' pipelines compute, (B, embedding_dim), float32.

    Equal to `StableDiffusionPipeline.get_guidance_scale_embedding`, which gets w = guidance_scale − 1
    (VDM's sinusoid of 1000 w).

    Args:
        w: (B,) guidance weights in the paper's convention.
        embedding_dim: the network's `time_cond_proj_dim`.
    """
    half = embedding_dim // 2
    frequencies = torch.exp(
        torch.arange(half, dtype=torch.float32, device=w.device) * -(math.log(10000.0) / (half - 1))
    )
    angles = (w.float() * 1000.0)[:, None] * frequencies[None, :]
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.nn.functional.pad(embedding, (0, embedding_dim % 2))
