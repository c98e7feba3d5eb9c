"""Training batches that cost no reading."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fewstep.data.stream import Batch
from fewstep.plan.shapes import WHOLE_NUMBERS


class SyntheticBatches:
    """Endless batches of a sample's shape, made once and kept in memory: a BatchSource that costs no reading.

    Args:
        sample_shape: (C, h, w) of what is diffused.
        conditions: what the network is told of a sample, name -> shape of a row; whole numbers are 0.
        in_pixels: samples are pictures; otherwise latents.
        global_batch_size: samples per update over all workers.
        seed: seed of the made samples.
        num_distinct: batches that differ; then they come round again.
        rank, world_size: this worker takes every world_size-th row.
    """

    def __init__(
        self,
        *,
        sample_shape: tuple[int, int, int],
        conditions: Mapping[str, tuple[int, ...]],
        global_batch_size: int,
        in_pixels: bool = False,
        seed: int = 0,
        num_distinct: int = 4,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._rows = list(range(rank, global_batch_size, world_size))
        self._batches = []
        for number in range(num_distinct):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
            made = make_samples(global_batch_size, sample_shape, in_pixels=in_pixels, generator=generator)
            made |= make_condition(global_batch_size, conditions, generator=generator)
            self._batches.append({name: value[self._rows] for name, value in made.items()})
        self._position = 0

    def load_state(self, state: dict[str, Any]) -> None:
        self._position = int(state["streams"]["0"][1])

    def __iter__(self) -> Iterator[Batch]:
        while True:
            data = self._batches[self._position % len(self._batches)]
            self._position += 1
            yield Batch(data=dict(data), rows=self._rows, state={"streams": {"0": [0, self._position]}}, counts={})


def make_samples(
    rows: int, shape: tuple[int, int, int], *, in_pixels: bool, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return clean samples as shards keep them: pixels (uint8), or latent_mean and latent_std (float16)."""
    if in_pixels:
        return {"pixels": torch.randint(0, 256, (rows, *shape), dtype=torch.uint8, generator=generator)}
    mean = torch.randn(rows, *shape, generator=generator)
    return {"latent_mean": mean.half(), "latent_std": torch.full_like(mean, 0.1).half()}


def make_condition(
    rows: int, conditions: Mapping[str, tuple[int, ...]], *, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """Return a condition of that shape, float16, or int64 where it is of whole numbers."""
    return {
        name: torch.zeros(rows, *shape, dtype=torch.int64)
        if name in WHOLE_NUMBERS
        else torch.randn(rows, *shape, generator=generator).half()
        for name, shape in conditions.items()
    }
