"""What the loop measures, without waiting for the device more often than it logs."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Meters:
    """Figures of the updates since the last reading, kept as device scalars, and clocks for data and for everything.

    Args:
        samples_per_update: samples per update over all workers.
        seconds, waited_s: time already spent by earlier processes of the same training.
    """

    def __init__(self, *, samples_per_update: int, seconds: float = 0.0, waited_s: float = 0.0) -> None:
        self.samples_per_update = samples_per_update
        self._earlier_s = seconds
        self._waited_s = waited_s
        self._start_s = self._window_start_s = time.perf_counter()
        self._window_waited_s = 0.0
        self._window: dict[str, list[Tensor]] = {}
        self._own_losses: Tensor | None = None

    @property
    def seconds(self) -> float:
        return self._earlier_s + time.perf_counter() - self._start_s

    @property
    def waited_s(self) -> float:
        return self._waited_s

    @property
    def own_losses(self) -> list[float]:
        """This worker's losses of the updates between the last two readings."""
        return [] if self._own_losses is None else self._own_losses.tolist()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        start_s = time.perf_counter()
        yield
        waited_s = time.perf_counter() - start_s
        self._waited_s += waited_s
        self._window_waited_s += waited_s

    def add(self, figures: dict[str, Tensor]) -> None:
        """Take in one update's device scalars; nothing is read."""
        for name, value in figures.items():
            self._window.setdefault(name, []).append(value.detach().float())

    def read(self, mean_over_workers: Callable[[Tensor], Tensor]) -> tuple[dict[str, float], dict[str, list[float]]]:
        """Return the means over the updates since the last reading with speed and memory, and every update's figures.

        Waits for the device, and for the other workers: all of them must read after the same update.
        """
        names = sorted(self._window)
        table = torch.stack([torch.stack(self._window[name]) for name in names])  # (figures, updates)
        self._own_losses = table[names.index("loss")].clone()  # the mean may be taken in place
        rows = mean_over_workers(table).tolist()
        now_s = time.perf_counter()
        window_s = now_s - self._window_start_s
        updates = len(rows[0])
        means = {name: math.fsum(row) / updates for name, row in zip(names, rows, strict=True)}
        means |= {
            "images_per_second": updates * self.samples_per_update / window_s,
            "data_wait_share": self._window_waited_s / window_s,
            "peak_memory_bytes": float(peak_memory_bytes(table.device)),
        }
        self._window, self._window_start_s, self._window_waited_s = {}, now_s, 0.0
        return means, dict(zip(names, rows, strict=True))


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory this process held: allocated on the GPU, or else resident in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
