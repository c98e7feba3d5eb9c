"""GPUs that a plan can be made for: their memory and, from the benchmarks' table, their peak."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fewstep.errors import FewstepError
from fewstep.train.peak import peak_tflops

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU.

    Attributes:
        name: as `fewstep plan --gpu` takes it.
        device_name: as `fewstep.train.peak.PEAK_TFLOPS` knows it.
        memory_bytes: what torch can see of it, in whole GiB rounded down; less than on the data sheet.
    """

    name: str
    device_name: str
    memory_bytes: int

    def flops_per_second(self, precision: Literal["float32", "bfloat16"]) -> float:
        """Return the dense peak by the data sheet; float32 is counted as TF32, as the benchmarks do."""
        peak = peak_tflops(self.device_name, precision)
        assert peak is not None  # every GPU below is in the benchmarks' table
        return peak * 1e12


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h100", "NVIDIA H100", 79 * GIB),
        Gpu("h100-pcie", "NVIDIA H100 PCIe", 79 * GIB),
        Gpu("h100-nvl", "NVIDIA H100 NVL", 93 * GIB),
        Gpu("h200", "NVIDIA H200", 139 * GIB),
        Gpu("b200", "NVIDIA B200", 178 * GIB),
        Gpu("a100-80", "NVIDIA A100", 79 * GIB),
        Gpu("a100-40", "NVIDIA A100", 39 * GIB),
        Gpu("a30", "NVIDIA A30", 23 * GIB),
        Gpu("a10", "NVIDIA A10", 22 * GIB),
        Gpu("l40s", "NVIDIA L40S", 44 * GIB),
        Gpu("l4", "NVIDIA L4", 21 * GIB),
        Gpu("rtx4090", "NVIDIA GeForce RTX 4090", 23 * GIB),
    )
}


def find_gpu(name: str) -> Gpu:
    """Return a GPU by its name.

    Raises:
        FewstepError: it is not in the table.
    """
    if name not in GPUS:
        raise FewstepError(f"--gpu {name}: no such GPU is known here; take one of {', '.join(GPUS)}")
    return GPUS[name]
