"""precision: auto takes bfloat16 where the device computes in it."""

from __future__ import annotations

import pytest
import torch

from fewstep.train.precision import resolve_precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("avx512", "amx", "expected"), [(False, False, "float32"), (True, False, "bfloat16"), (False, True, "bfloat16")]
)
def test_auto_asks_the_processor(monkeypatch: pytest.MonkeyPatch, avx512: bool, amx: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert resolve_precision("auto", CPU) == expected


@pytest.mark.parametrize("supported", [True, False])
def test_auto_asks_the_gpu_without_its_emulation(monkeypatch: pytest.MonkeyPatch, supported: bool) -> None:
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda *, including_emulation: supported or including_emulation
    )
    assert resolve_precision("auto", CUDA) == ("bfloat16" if supported else "float32")


def test_a_torch_that_cannot_tell_gives_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    assert resolve_precision("auto", CPU) == "float32"


def test_what_is_asked_for_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert resolve_precision("bfloat16", CPU) == "bfloat16"
    assert resolve_precision("float32", CUDA) == "float32"
