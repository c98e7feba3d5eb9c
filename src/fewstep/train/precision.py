"""Which type the network computes in, on the device at hand."""

from __future__ import annotations

from typing import Literal

import torch

Precision = Literal["float32", "bfloat16"]


def resolve_precision(asked: Literal["auto", "float32", "bfloat16"], device: torch.device) -> Precision:
    """Return the precision to train in; "auto" takes bfloat16 where the device computes in it.

    A processor without such instructions emulates bfloat16, several times slower than float32.
    """
    if asked != "auto":
        return asked
    return "bfloat16" if _computes_in_bfloat16(device) else "float32"


def _computes_in_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # torch asks the processor, but has no public name for the answer; a version without it counts as a no.
    asked = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return device.type == "cpu" and any(ask is not None and bool(ask()) for ask in asked)
