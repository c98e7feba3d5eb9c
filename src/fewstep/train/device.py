"""Memory of the GPU that one process leaves to another."""

from __future__ import annotations

import gc

import torch


def free_device_memory() -> None:
    """Give what torch keeps of the GPU back: the next training's worker may need all of it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
