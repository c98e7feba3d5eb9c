"""Which settings would make a training fit a GPU: found by trying them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fewstep.plan.memory import Memory, memory_of, rows_per_worker
from fewstep.plan.shapes import Shape
from fewstep.plan.work import Training
from fewstep.train.settings import TrainSettings


@dataclass(frozen=True)
class Switches:
    """Settings that differ from the recipe's, and the memory with them."""

    changes: dict[str, Any]
    memory: Memory

    def in_words(self) -> str:
        """Return the changes as they stand in a recipe."""
        return ", ".join(f"{key}: {_yaml(value)}" for key, value in self.changes.items())


def what_would_fit(
    training: Training, shape: Shape, *, num_workers: int, memory_bytes: int, most: int = 3
) -> list[Switches]:
    """Return settings with which a training fits, the cheapest first; empty when none do.

    Each has the largest micro-batch that fits. One that only adds to another that fits already is left out, unless it
    lets through a larger micro-batch.

    Args:
        training: one that does not fit as it is.
        shape: of the model.
        num_workers: GPUs that share an update.
        memory_bytes: of one of them.
        most: how many to return.
    """
    found: list[Switches] = []
    for changes in _tries(training, num_workers):
        fitting = _largest_micro_batch(training, changes, shape, num_workers=num_workers, memory_bytes=memory_bytes)
        if fitting is None:
            continue
        size = _micro_batch(fitting, training.settings, num_workers)
        simpler = (each for each in found if _without_size(each.changes).items() <= changes.items())
        if all(_micro_batch(each, training.settings, num_workers) < size for each in simpler):
            found.append(fitting)
    return found[:most]


def _tries(training: Training, num_workers: int) -> Iterator[dict[str, Any]]:
    """Yield changes to try, from what costs nothing to what costs most time: where the average lies, then sharing out
    weights, which sends them about, then computing activations again."""
    settings = training.settings
    averages: list[dict[str, Any]] = [{}]
    if settings.ema_decay is not None and settings.ema_device == "network":
        averages.append({"ema_device": "cpu"})
    shards: list[dict[str, Any]] = [{}]
    if num_workers > 1 and settings.strategy == "ddp":
        shards.append({"strategy": "fsdp", **({"channels_last": False} if settings.channels_last else {})})
    if num_workers > 1 and training.teacher is not None and not settings.shard_frozen:
        shards.append({**shards[-1], "shard_frozen": True})
    again: list[dict[str, Any]] = [{}]
    if not settings.gradient_checkpointing:
        again.append({"gradient_checkpointing": True})
    for recompute in again:
        for shard in shards:
            for average in averages:
                yield {**average, **shard, **recompute}


def _largest_micro_batch(
    training: Training, changes: dict[str, Any], shape: Shape, *, num_workers: int, memory_bytes: int
) -> Switches | None:
    usual = training.settings
    rows = rows_per_worker(usual, num_workers)
    for size in range(usual.micro_batch_size or rows, 0, -1):
        if rows % size or (training.group_rows is not None and training.group_rows % size):
            continue
        own = changes if size == (usual.micro_batch_size or rows) else {**changes, "micro_batch_size": size}
        if not own:
            continue
        settings = usual.model_copy(update=own)
        memory = memory_of(training, settings, shape, num_workers=num_workers)
        if memory.total <= memory_bytes:
            return Switches(own, memory)
    return None


def _without_size(changes: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in changes.items() if key != "micro_batch_size"}


def _micro_batch(switches: Switches, usual: TrainSettings, num_workers: int) -> int:
    size: int = switches.changes.get("micro_batch_size", usual.micro_batch_size or rows_per_worker(usual, num_workers))
    return size


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
