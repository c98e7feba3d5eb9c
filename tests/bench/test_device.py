"""Names, peaks and switches of devices."""

from __future__ import annotations

import pytest
import torch

from fewstep.bench.device import (
    Stopwatch,
    device_name,
    measure_matmul_tflops,
    prepare_network,
    resolve_device,
    tuned,
)
from fewstep.bench.settings import Tuning
from fewstep.errors import FewstepError
from fewstep.train.peak import peak_tflops

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA A10G", None),
        ("NVIDIA L40", None),
        ("AMD EPYC, 1 thread", None),
    ],
)
def test_peaks_by_name(name: str, peak: float | None) -> None:
    assert peak_tflops(name, "bfloat16") == peak
    full = peak_tflops(name, "float32")
    assert full is None if peak is None else full is not None and full < peak


def test_cuda_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(FewstepError, match=r"torch sees no CUDA device.*--device cpu"):
        resolve_device("cuda", Tuning())
    assert resolve_device("auto", Tuning()) == CPU


def test_options_without_effect_are_refused() -> None:
    with pytest.raises(FewstepError, match="tf32, cudnn_benchmark would have no effect on a CPU"):
        resolve_device("cpu", Tuning(tf32=True, cudnn_benchmark=True))
    assert resolve_device("cpu", Tuning(channels_last=True, compile=True)) == CPU


def test_switches_are_put_back() -> None:
    backends = torch.backends
    before = (backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32, backends.cudnn.benchmark)
    with tuned(Tuning(tf32=True, cudnn_benchmark=True)):
        assert backends.cuda.matmul.allow_tf32
        assert backends.cudnn.benchmark
    assert (backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32, backends.cudnn.benchmark) == before


def test_channels_last_keeps_the_names_of_the_weights() -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3))
    names = list(network.state_dict())
    prepare_network(network, Tuning(channels_last=True, compile=True))
    assert list(network.state_dict()) == names
    assert network[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_matmul_and_stopwatch() -> None:
    watch = Stopwatch(CPU)
    size, tflops = measure_matmul_tflops(CPU, "float32", size=128)
    elapsed = watch.stop()
    assert size == 128
    assert 0 < tflops < 100
    assert elapsed.seconds > 0
    assert elapsed.cpu_seconds > 0
    assert "1 thread" in device_name(CPU)
