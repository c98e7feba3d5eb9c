"""The device of the driver's own work: encoding, measuring, picture grids."""

from __future__ import annotations

import gc

import torch

from fewstep.train.settings import ClusterSettings


def driver_device(cluster: ClusterSettings) -> torch.device:
    """Return the GPU when there is one and the recipe does not say `use_gpu: false`, else the CPU."""
    return torch.device("cuda" if cluster.use_gpu and torch.cuda.is_available() else "cpu")


def free_device_memory() -> None:
    """Give what torch keeps of the GPU back: the next training's worker may need all of it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
