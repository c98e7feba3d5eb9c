"""The rows of some canonical streams, batch by batch: what one thread or process reads and decodes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from fewstep.data.counts import SampleCounts
from fewstep.data.disk_cache import DiskCache
from fewstep.data.grouped import GroupedStream
from fewstep.data.mixed_stream import MixedOrder, MixedStream, StreamState
from fewstep.data.pieces import PieceMemory, PieceReader, PieceSource
from fewstep.data.sample import Decode
from fewstep.errors import DataError
from fewstep.storage import Storage


@dataclass
class Part:
    """Some streams, by where they are, and what was skipped in them, by source."""

    streams: dict[int, StreamState]
    counts: tuple[SampleCounts, ...]


@dataclass
class PartBatch:
    """The rows of a part for one update, and the part after it.

    data: as of a `Batch`, in one piece; or, where streams give groups, in one for each stream; rows: as of a `Batch`.
    """

    data: list[dict[str, Any]]
    rows: list[int]
    after: Part


class PartReader:
    """Reads parts of a data set. Picklable, without what it has kept in memory.

    Args:
        order: of the samples.
        storage: where the shards lie.
        decode: as for `ShardStream`.
        rows_per_stream: rows of each stream in a batch.
        connections: pieces read at once.
        cache_bytes: raw pieces kept in memory.
        disk_cache: folder and limit in bytes of what is kept on the local disk.
        group_by: as for `ShardStream`.
    """

    def __init__(
        self,
        *,
        order: MixedOrder,
        storage: Storage,
        decode: Decode,
        rows_per_stream: int,
        connections: int,
        cache_bytes: int,
        disk_cache: tuple[Path, int] | None = None,
        group_by: str | None = None,
    ) -> None:
        self._order, self._storage, self._decode = order, storage, decode
        self._rows_per_stream, self._connections = rows_per_stream, connections
        self._cache_bytes, self._disk_cache = cache_bytes, disk_cache
        self._group_by = group_by
        self._source: PieceSource | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_source": None}

    def read(self, part: Part) -> Iterator[PartBatch]:
        """Yield the batches of a part, without end.

        Raises:
            DataError: too many samples are broken, or a shard is not the one that was listed.
            CheckpointError: the shards have no such position.
            StorageError: the store does not answer.
        """
        source, counts = self._pieces(), [each.copy() for each in part.counts]
        pool = ThreadPoolExecutor(max_workers=self._connections, thread_name_prefix="fewstep-shards")
        try:
            streams = [self._stream(number, state, source, pool) for number, state in part.streams.items()]
            for stream in streams:
                stream.prefetch()
            while True:
                each = self._rows_per_stream
                samples = [stream.next_rows(each, self._decode, counts) for stream in streams]
                rows = [stream.number * each + k for stream in streams for k in range(each)]
                if self._group_by is None:
                    samples = [list(chain.from_iterable(samples))]
                after = Part({stream.number: stream.state for stream in streams}, tuple(c.totals() for c in counts))
                yield PartBatch([stack_samples(together) for together in samples], rows, after)
        finally:
            pool.shutdown(cancel_futures=True)

    def _stream(
        self, number: int, state: StreamState, source: PieceSource, pool: ThreadPoolExecutor
    ) -> MixedStream | GroupedStream:
        stream = MixedStream(number, self._order, source, pool, state)
        return stream if self._group_by is None else GroupedStream(stream, self._group_by, source, pool, state.waiting)

    def _pieces(self) -> PieceSource:
        if self._source is None:
            disk = DiskCache(self._disk_cache[0], size_bytes=self._disk_cache[1]) if self._disk_cache else None
            self._source = PieceMemory(PieceReader(self._storage, disk_cache=disk), size_bytes=self._cache_bytes)
        return self._source


def stack_samples(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Samples as one batch: tensors, arrays and numbers stacked on dim 0, everything else as lists.

    Errors: DataError when the samples have different names or shapes.
    """
    batch: dict[str, Any] = {}
    for name, first in samples[0].items():
        try:
            values = [sample[name] for sample in samples]
            if isinstance(first, torch.Tensor):
                batch[name] = torch.stack(values)
            elif isinstance(first, (bool, int, float)) or hasattr(first, "__array__"):
                batch[name] = torch.stack([torch.as_tensor(value) for value in values])
            else:
                batch[name] = values
        except (KeyError, RuntimeError) as error:
            raise DataError(f"The samples of a batch do not fit together in {name!r}: {error}") from error
    return batch


def join_batches(batches: Sequence[dict[str, Any]], *, grouped: bool = False) -> dict[str, Any]:
    """What `stack_samples` makes of all samples of some batches, one batch after another; DataError as there.

    Grouped batches may differ in the shapes of their tensors: those become lists with a tensor for each row.
    """
    if len(batches) == 1:
        return batches[0]
    joined: dict[str, Any] = {}
    for name, first in batches[0].items():
        try:
            values = [batch[name] for batch in batches]
            unlike = grouped and isinstance(first, torch.Tensor) and len({value.shape[1:] for value in values}) > 1
            joined[name] = (
                torch.cat(values)
                if isinstance(first, torch.Tensor) and not unlike
                else [row for each in values for row in each]
            )
        except (KeyError, RuntimeError) as error:
            raise DataError(f"The samples of a batch do not fit together in {name!r}: {error}") from error
    return joined
