"""The device that a benchmark runs on: its name, its peak, what it reaches on one large matrix product."""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from fewstep.bench.settings import Precision, Tuning
from fewstep.errors import FewstepError


def resolve_device(name: str, tuning: Tuning) -> torch.device:
    """Return the device that a setting names.

    Raises:
        FewstepError: CUDA is asked for and not there, or an option would have no effect.
    """
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise FewstepError(
            "device=cuda, but torch sees no CUDA device: run on a machine with a GPU and torch's CUDA build, "
            "or take --device cpu"
        )
    device = torch.device("cuda" if name == "cuda" or (name == "auto" and has_cuda) else "cpu")
    without_effect = [option for option in ("tf32", "cudnn_benchmark") if getattr(tuning, option)]
    if device.type == "cpu" and without_effect:
        raise FewstepError(f"{', '.join(without_effect)} would have no effect on a CPU: leave it out")
    return device


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or of the processor with the threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(encoding="utf-8"), re.MULTILINE)
        name = found[1].strip() if found else name
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


@contextmanager
def tuned(tuning: Tuning) -> Iterator[None]:
    """Set torch's switches for the block, and put them back."""
    before = (
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.benchmark,
    )
    if tuning.tf32:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = before[2] or tuning.cudnn_benchmark
    try:
        yield
    finally:
        (
            torch.backends.cuda.matmul.allow_tf32,
            torch.backends.cudnn.allow_tf32,
            torch.backends.cudnn.benchmark,
        ) = before


def prepare_network(network: torch.nn.Module, tuning: Tuning) -> None:
    """Change a network's memory format and compile it in place, as asked; its state dict stays as it is."""
    if tuning.channels_last:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if tuning.compile:
        network.compile()


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Elapsed:
    """Time that a piece of work took: on the clock, and in CPU seconds of this process over all its threads.

    CPU seconds say little of a GPU, but on a CPU they hardly change when other programs are at work beside ours.
    """

    seconds: float
    cpu_seconds: float


class Stopwatch:
    """Runs from its making, when the device has nothing left to do."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        synchronize(device)
        self._start_s, self._start_cpu_s = time.perf_counter(), time.process_time()

    def stop(self) -> Elapsed:
        """Return the time until the device has done what was queued."""
        synchronize(self._device)
        return Elapsed(time.perf_counter() - self._start_s, time.process_time() - self._start_cpu_s)


@torch.no_grad()
def measure_matmul_tflops(device: torch.device, precision: Precision, *, size: int | None = None) -> tuple[int, float]:
    """Return (size, TFLOP/s) of the fastest of several square matrix products: what the device gives at best, now.

    The size is 8192 on a GPU and 1024 on a CPU unless given.
    """
    size = size or (8192 if device.type == "cuda" else 1024)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    repeats = 10 if device.type == "cuda" else 1
    best_s = float("inf")
    for attempt in range(8):
        synchronize(device)
        start_s = time.perf_counter()
        for _ in range(repeats):
            a @ b
        synchronize(device)
        if attempt >= 2:
            best_s = min(best_s, (time.perf_counter() - start_s) / repeats)
    return size, 2 * size**3 / best_s / 1e12
