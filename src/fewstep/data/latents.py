"""Cached latents and text embeddings: the members of a latent shard, written and read."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.data.source import BadSampleError, Sample

LATENTS_MEMBER = "latents.npy"
TEXT_MEMBER = "text.npy"


def latent_sample(key: str, caption: str, mean: Tensor, std: Tensor, text: Tensor | None) -> dict[str, Any]:
    """Return the sample of a latent shard: mean and standard deviation of the scaled latents, text embedding, caption.

    Args:
        key: key of the picture's sample.
        caption: its caption.
        mean, std: (C, h, w).
        text: (L, D), or None when the text encoder is still being trained.
    """
    sample = {
        "__key__": key,
        LATENTS_MEMBER: _to_bytes(torch.stack([mean, std])),
        "txt": caption.encode(),
        "json": json.dumps({"key": key, "caption": caption}).encode(),
    }
    if text is not None:
        sample[TEXT_MEMBER] = _to_bytes(text)
    return sample


def decode_latents(sample: Sample, *, token_ids: Callable[[list[str]], Tensor] | None = None) -> dict[str, Any]:
    """Return latent_mean and latent_std (C, h, w), caption, and text (L, D) or, with a tokenizer, token_ids (L,).

    Raises:
        BadSampleError: a member is missing or damaged.
    """
    latents = _from_bytes(sample, LATENTS_MEMBER)
    if latents.ndim != 4 or latents.shape[0] != 2:
        raise BadSampleError("latents of another shape", f"{tuple(latents.shape)} is not (2, C, h, w)")
    caption = sample.get("txt", b"").decode("utf-8", errors="replace")
    decoded = {"latent_mean": latents[0], "latent_std": latents[1], "caption": caption}
    if token_ids is None:
        decoded["text"] = _from_bytes(sample, TEXT_MEMBER)
    else:
        decoded["token_ids"] = token_ids([caption])[0]
    return decoded


def _to_bytes(tensor: Tensor) -> bytes:
    buffer = io.BytesIO()
    # float16 holds latents of unit scale to 3 decimal digits, at half the bytes.
    np.save(buffer, tensor.detach().to("cpu", torch.float16).numpy(), allow_pickle=False)
    return buffer.getvalue()


def _from_bytes(sample: Sample, member: str) -> Tensor:
    if member not in sample:
        raise BadSampleError(f"no {member}", "these are not latent shards, or they were written without it")
    try:
        return torch.from_numpy(np.load(io.BytesIO(sample[member]), allow_pickle=False))
    except (ValueError, OSError, EOFError) as error:
        raise BadSampleError(f"broken {member}", str(error)) from error
