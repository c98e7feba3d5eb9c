"""Cached latents and what the network is told beside them: the members of a latent shard, written and read."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.data.sample import BadSampleError, Sample

_NPY_PREFIX = 10  # magic, version and length of the rest of the head
LATENTS_MEMBER = "latents.npy"


def condition_member(name: str) -> str:
    """Return the member of a latent shard that holds a part of the condition, such as text.npy."""
    return f"{name}.npy"


def latent_sample(
    key: str, caption: str, mean: Tensor, std: Tensor, condition: Mapping[str, Tensor] | None = None
) -> dict[str, Any]:
    """Return the sample of a latent shard: mean and standard deviation of the scaled latents, condition and caption.

    Args:
        key: key of the picture's sample.
        caption: its caption, or the name of its class.
        mean, std: (C, h, w).
        condition: what the network is told, by name, each without the batch dimension: text (L, D), label (), …; None
            when the text encoder is still being trained.
    """
    return {
        "__key__": key,
        LATENTS_MEMBER: _to_bytes(torch.stack([mean, std])),
        "txt": caption.encode(),
        "json": json.dumps({"key": key, "caption": caption}).encode(),
        **{condition_member(name): _to_bytes(value) for name, value in (condition or {}).items()},
    }


def decode_latents(
    sample: Sample,
    *,
    condition_names: Sequence[str] = ("text",),
    token_ids: Mapping[str, Callable[[list[str]], Tensor]] | None = None,
) -> dict[str, Any]:
    """Return latent_mean and latent_std (C, h, w), caption, and the parts of the condition by name.

    Args:
        sample: of a latent shard.
        condition_names: the parts to read from the shard.
        token_ids: further parts that are made of the caption: name -> tokenizer, list of texts -> (B, L) ids.

    Raises:
        BadSampleError: a member is missing or damaged.
    """
    latents = _from_bytes(sample, LATENTS_MEMBER)
    if latents.ndim != 4 or latents.shape[0] != 2:
        raise BadSampleError("latents of another shape", f"{tuple(latents.shape)} is not (2, C, h, w)")
    caption = sample.get("txt", b"").decode("utf-8", errors="replace")
    decoded = {"latent_mean": latents[0], "latent_std": latents[1], "caption": caption}
    decoded |= {name: _from_bytes(sample, condition_member(name)) for name in condition_names}
    decoded |= {name: tokenize([caption])[0] for name, tokenize in (token_ids or {}).items()}
    return decoded


def _to_bytes(tensor: Tensor) -> bytes:
    buffer = io.BytesIO()
    value = tensor.detach().cpu()
    # float16 holds latents of unit scale to 3 decimal digits, at half the bytes.
    np.save(buffer, (value.half() if value.is_floating_point() else value).numpy(), allow_pickle=False)
    return buffer.getvalue()


def _from_bytes(sample: Sample, member: str) -> Tensor:
    if member not in sample:
        raise BadSampleError(f"no {member}", "these are not latent shards, or they were written without it")
    data = sample[member]
    try:
        head = _npy_head(bytes(data[: _NPY_PREFIX + int.from_bytes(data[8:_NPY_PREFIX], "little")]))
        if head is None:
            return torch.from_numpy(np.load(io.BytesIO(data), allow_pickle=False))
        dtype, shape, offset = head
        values = np.frombuffer(data, dtype, math.prod(shape), offset)
        # Bytes cannot be written to, as a tensor's memory must; what the stream hands out can.
        return torch.from_numpy((values if values.flags.writeable else values.copy()).reshape(shape))
    except (ValueError, TypeError, OSError, EOFError) as error:
        raise BadSampleError(f"broken {member}", str(error)) from error


@lru_cache(maxsize=256)
def _npy_head(head: bytes) -> tuple[np.dtype[Any], tuple[int, ...], int] | None:
    """Return type, shape and begin of the values of a .npy file by its head; None for what numpy must read.

    numpy takes longer to read the head, which is the same for all samples of a data set, than the values.
    """
    file = io.BytesIO(head)
    if np.lib.format.read_magic(file) != (1, 0):
        return None
    shape, column_major, dtype = np.lib.format.read_array_header_1_0(file)
    return None if column_major or dtype.hasobject else (dtype, shape, len(head))
