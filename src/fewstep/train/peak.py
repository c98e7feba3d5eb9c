"""What GPUs compute at most, by their data sheets: what a share of the peak (MFU) relates to."""

from __future__ import annotations

import re
from typing import NamedTuple

from fewstep.train.precision import Precision


class PeakTflops(NamedTuple):
    """Dense peak of one GPU by its data sheet, in TFLOP/s; float32 products run as TF32 where that is allowed."""

    bfloat16: float
    tf32: float


#: By a pattern of `torch.cuda.get_device_name()`; the first that matches counts.
PEAK_TFLOPS: tuple[tuple[str, PeakTflops], ...] = (
    (r"\bB200\b", PeakTflops(2250.0, 1125.0)),
    (r"\bG?H200\b", PeakTflops(989.4, 494.7)),
    (r"\bH100 NVL\b", PeakTflops(835.5, 417.5)),
    (r"\bH100 PCIe\b", PeakTflops(756.0, 378.0)),
    (r"\bH100\b", PeakTflops(989.4, 494.7)),
    (r"\bA100\b", PeakTflops(312.0, 156.0)),
    (r"\bA30\b", PeakTflops(165.0, 82.0)),
    (r"\bA10\b", PeakTflops(125.0, 62.5)),
    (r"\bL40S\b", PeakTflops(362.0, 183.0)),
    (r"\bL4\b", PeakTflops(121.0, 60.0)),
    (r"\bRTX 4090\b", PeakTflops(165.2, 82.6)),
)


def peak_tflops(device_name: str, precision: Precision) -> float | None:
    """Return the dense peak of a GPU in TFLOP/s, or None when it is not in the table (no CPU is).

    float32 has TF32's peak: torch's convolutions use TF32 by default, and a share must not come out above what is true.
    """
    for pattern, peak in PEAK_TFLOPS:
        if re.search(pattern, device_name):
            return peak.bfloat16 if precision == "bfloat16" else peak.tf32
    return None
