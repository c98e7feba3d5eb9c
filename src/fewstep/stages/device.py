"""The device of the driver's own work: encoding, measuring, picture grids."""

from __future__ import annotations

import torch

from fewstep.train.settings import ClusterSettings


def driver_device(cluster: ClusterSettings) -> torch.device:
    """Return the GPU when there is one and the recipe does not say `use_gpu: false`, else the CPU."""
    if not (cluster.use_gpu and torch.cuda.is_available()):
        return torch.device("cpu")
    # TF32 in products as cuDNN has it in convolutions: what encodes and measures needs no more, and takes a fraction of
    # the time.
    torch.set_float32_matmul_precision("high")
    return torch.device("cuda")
