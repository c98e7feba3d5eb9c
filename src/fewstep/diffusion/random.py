"""Random numbers that belong to a row of the global batch, not to a process."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


class RowRandom:
    """Draws for the rows of one update, each row from a generator of its own.

    A row's numbers depend on (seed, step, row) alone, so they stay the same whatever worker computes the row and
    however many workers there are: that is what makes a resumed or resized run exact. Draws are made on the CPU, in the
    order of the calls, and moved to `device`.

    Args:
        seed: seed of the run.
        step: update index (or any other integer that tells draws apart, such as a validation batch).
        rows: global row ids within the batch, one per local row.
        device: where the drawn tensors go.
    """

    def __init__(self, *, seed: int, step: int, rows: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._generators = [torch.Generator().manual_seed(_row_seed(seed, step, row)) for row in rows]

    def __len__(self) -> int:
        return len(self._generators)

    def normal(self, *shape: int) -> Tensor:
        """Return standard normal noise, (B, *shape), float32."""
        return self._stack([torch.randn(shape, generator=g) for g in self._generators])

    def uniform(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Return numbers uniform in [low, high), (B,), float32."""
        return self._stack([torch.rand((), generator=g) for g in self._generators]) * (high - low) + low

    def integers(self, low: int, high: int) -> Tensor:
        """Return integers uniform in low … high − 1, (B,), int64."""
        return self._stack([torch.randint(low, high, (), generator=g) for g in self._generators])

    def _stack(self, draws: list[Tensor]) -> Tensor:
        return torch.stack(draws).to(self.device, non_blocking=True)


def _row_seed(seed: int, step: int, row: int) -> int:
    # A hash rather than a sum: neighbouring (step, row) pairs must not share a stream.
    digest = hashlib.blake2b(f"{seed}/{step}/{row}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") & (2**63 - 1)
