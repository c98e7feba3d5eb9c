"""Rates of the readers, in turns, in a process that is kept on one core."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch

from fewstep.bench.data.readers import DataSet

T = TypeVar("T")
Reader = Callable[[DataSet], Iterator[int]]


def on_one_core(function: Callable[..., T], *arguments: Any) -> T:
    """Return what a function returns in a new process that has the machine's last core for itself.

    Together with `away_from_that_core` around the start of a store: reader and store then take no time from each other.
    On a machine of one core nothing is kept apart.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_settle) as pool:
        return pool.submit(function, *arguments).result()


@contextmanager
def away_from_that_core() -> Iterator[None]:
    """Let the processes that are started in the block keep to the other cores."""
    before = os.sched_getaffinity(0)
    if len(before) > 1:
        os.sched_setaffinity(0, before - {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def rates(data: DataSet, readers: Sequence[Reader], *, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Return samples per second of each reader by round; the readers take turns.

    Each reader begins anew in every round and is measured from its third batch on.

    Args:
        data: what is read.
        readers: functions of `readers`.
        rounds: turns.
        seconds: of one measurement.
    """
    found: dict[str, list[float]] = {reader.__name__: [] for reader in readers}
    for _ in range(rounds):
        for reader in readers:
            found[reader.__name__].append(_rate(reader(data), seconds))
    return found


def _rate(batches: Iterator[int], seconds: float) -> float:
    for _ in range(2):
        next(batches)
    begin = time.perf_counter()
    samples = 0
    while time.perf_counter() - begin < seconds:
        samples += next(batches)
    rate = samples / (time.perf_counter() - begin)
    with suppress(AttributeError):
        batches.close()  # type: ignore[attr-defined]
    return rate


def _settle() -> None:
    allowed = os.sched_getaffinity(0)
    if len(allowed) > 1:
        os.sched_setaffinity(0, {max(allowed)})
    torch.set_num_threads(1)
