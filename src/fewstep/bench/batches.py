"""Training batches that cost no reading."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from fewstep.data.stream import Batch


class SyntheticBatches:
    """Endless batches of cached-latent shape, made once and kept in memory: a BatchSource that costs no reading.

    Args:
        latent_shape: (C, h, w).
        text_shape: (L, D).
        global_batch_size: samples per update over all workers.
        seed: seed of the made samples.
        num_distinct: batches that differ; then they come round again.
        rank, world_size: this worker takes every world_size-th row.
    """

    def __init__(
        self,
        *,
        latent_shape: tuple[int, int, int],
        text_shape: tuple[int, int],
        global_batch_size: int,
        seed: int = 0,
        num_distinct: int = 4,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._rows = list(range(rank, global_batch_size, world_size))
        self._batches = []
        for number in range(num_distinct):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
            mean = torch.randn(global_batch_size, *latent_shape, generator=generator)
            text = torch.randn(global_batch_size, *text_shape, generator=generator)
            self._batches.append(
                {
                    "latent_mean": mean[self._rows].half(),
                    "latent_std": torch.full_like(mean[self._rows], 0.1).half(),
                    "text": text[self._rows].half(),
                }
            )
        self._position = 0

    def load_state(self, state: dict[str, Any]) -> None:
        self._position = int(state["streams"]["0"][1])

    def __iter__(self) -> Iterator[Batch]:
        while True:
            data = self._batches[self._position % len(self._batches)]
            self._position += 1
            yield Batch(data=dict(data), rows=self._rows, state={"streams": {"0": [0, self._position]}}, counts={})
