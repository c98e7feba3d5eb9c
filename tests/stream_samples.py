"""Samples of tests of the stream, and their decoder, where loading processes can import it."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from fewstep.data.sample import BadSampleError


def make_samples(
    count: int, *, seed: int = 0, sizes: Sequence[tuple[int, int]] = ((8, 8),)
) -> Iterator[dict[str, Any]]:
    """Yield samples whose pictures have the sizes (width, height) in turn."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        picture = io.BytesIO()
        width, height = sizes[number % len(sizes)]
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(picture, "PNG")
        yield {"__key__": f"{number:09d}", "png": picture.getvalue(), "txt": f"caption {number}".encode()}


def decode(sample: dict[str, Any]) -> dict[str, Any]:
    if "txt" not in sample:
        raise BadSampleError("no caption")
    try:
        picture = np.asarray(Image.open(io.BytesIO(sample["png"])).convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise BadSampleError("broken image", str(error)) from error
    return {"pixels": torch.from_numpy(picture.copy()).permute(2, 0, 1), "text": sample["txt"].decode()}


class LockedError(Exception):
    """An error that does not travel between processes."""

    def __init__(self) -> None:
        super().__init__("held by a lock")
        self.lock = threading.Lock()


def decode_or_die(sample: dict[str, Any]) -> dict[str, Any]:
    """Decode, except one sample, on which an error is raised that cannot be pickled."""
    if sample["__key__"] == "000000005":
        raise LockedError
    return decode(sample)
