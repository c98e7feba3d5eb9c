"""Endless batches from shards, in an order that resumes exactly, also with another number of workers.

Every global batch holds ``global_batch_size / num_streams`` samples of each canonical stream (`order.py`). The state
after a batch is, for each stream, [epoch, position], where position counts the samples *attempted* in that epoch: a
broken sample takes a place too, so skipping one shifts nothing.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field

from fewstep.data.order import check_streams, cut_blocks, deal_shards, own_streams, shuffle_block
from fewstep.data.shards import Shard, ShardIndex
from fewstep.data.source import Decode, Sample, SampleCounts, ShardReader, decode_sample, known_samples, lost_samples
from fewstep.errors import CheckpointError, DataError
from fewstep.storage import Storage

Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]


@dataclass
class Batch:
    """The samples of one worker for one update.

    data: tensors on the CPU, stacked on dim 0, or lists; rows: the number of each sample within the global batch;
    state: the position after this batch (JSON-able); counts: samples skipped so far, by reason.
    """

    data: dict[str, Any]
    rows: list[int]
    state: dict[str, Any]
    counts: dict[str, int]


class BatchSource(Protocol):
    """Endless batches that can go on from a state."""

    def __iter__(self) -> Iterator[Batch]: ...

    def load_state(self, state: dict[str, Any]) -> None: ...


def stack_samples(samples: list[dict[str, Any]]) -> dict[str, Any]:
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


class _ShardCache:
    """Raw samples of whole shards by URI, up to a number of bytes; what is in it stays.

    Epochs visit all shards in turn, where a cache that throws out the oldest would never be of use.
    """

    def __init__(self, storage: Storage, cache_bytes: int) -> None:
        self._storage, self._left_bytes = storage, cache_bytes
        self._kept: dict[str, tuple[list[Sample], str | None]] = {}
        self._counted: dict[str, int] = {}
        self._lock = threading.Lock()

    def load(self, shard: Shard) -> tuple[list[Sample], str | None]:
        """The samples of the shard and, when it is cut short, why."""
        if shard.uri in self._kept:
            return self._kept[shard.uri]
        reader = ShardReader(shard, self._storage)
        loaded = list(reader), reader.cut
        size_bytes = sum(len(data) for sample in loaded[0] for data in sample.values())
        with self._lock:
            if size_bytes <= self._left_bytes and shard.uri not in self._kept:
                self._left_bytes -= size_bytes
                self._kept[shard.uri] = loaded
            self._counted[shard.uri] = len(loaded[0]) + lost_samples(shard, found=len(loaded[0]), cut=loaded[1])
        return loaded

    def num_places(self, shard: Shard) -> int:
        """Places that the shard takes in the order: its samples, lost ones included. Reads it if nobody counted."""
        if shard.num_samples is not None:
            return shard.num_samples
        if shard.uri not in self._counted:
            self.load(shard)
        return self._counted[shard.uri]


@dataclass
class _Place:
    """One place in the order: a sample (None when the shard was cut before it) and where it comes from."""

    shard: Shard
    sample: Sample | None
    cut: str = ""
    lost: int = 0  # samples that the shard lost


class _Stream:
    """One canonical stream: hands out its places from [epoch, position] on, and reads the next block ahead."""

    def __init__(self, number: int, owner: ShardStream, pool: ThreadPoolExecutor, start: tuple[int, int]) -> None:
        self.number, self._owner, self._pool = number, owner, pool
        self.epoch, self.position = start
        self._places: list[_Place] = []
        self._block = -1
        self._ahead: tuple[int, int, Future[list[_Place]]] | None = None
        self._seek()

    def next_place(self) -> _Place:
        while not self._places:
            self._enter(*self._after(self.epoch, self._block))
        self.position += 1
        place = self._places.pop()
        if self._ahead is None and len(self._places) <= self._half:
            epoch, block = self._after(self.epoch, self._block)
            self._ahead = epoch, block, self._pool.submit(self._read, epoch, block)
        return place

    def _seek(self) -> None:
        left = self.position
        for block, shards in enumerate(self._blocks(self.epoch)):
            size = sum(self._owner.cache.num_places(shard) for shard in shards)
            if left < size or (left == size == 0):
                self._enter(self.epoch, block)
                del self._places[len(self._places) - left :]
                return
            left -= size
        if left > 0:
            raise CheckpointError(
                f"The data state is at sample {self.position} of epoch {self.epoch} in stream {self.number}, but that "
                f"stream has only {self.position - left}. The shards are not those of the checkpoint."
            )
        self._block = len(self._blocks(self.epoch)) - 1  # exactly at the end: the next place is the next epoch's first

    def _enter(self, epoch: int, block: int) -> None:
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[:2] == (epoch, block):
            self._places = ahead[2].result()
        else:
            self._places = self._read(epoch, block)
        self._block, self._half = block, len(self._places) // 2

    def _after(self, epoch: int, block: int) -> tuple[int, int]:
        return (epoch, block + 1) if block + 1 < len(self._blocks(epoch)) else (epoch + 1, 0)

    def _blocks(self, epoch: int) -> list[list[Shard]]:
        owner = self._owner
        dealt = deal_shards(len(owner.shards), num_streams=owner.num_streams, seed=owner.seed, epoch=epoch)
        blocks = cut_blocks(dealt[self.number], shuffle_shards=owner.shuffle_shards)
        return [[owner.shards[number] for number in block] for block in blocks]

    def _read(self, epoch: int, block: int) -> list[_Place]:
        """The places of a block, last one first."""
        places: list[_Place] = []
        for shard in self._blocks(epoch)[block]:
            samples, cut = self._owner.cache.load(shard)
            lost = lost_samples(shard, found=len(samples), cut=cut)
            places += [_Place(shard, sample) for sample in samples]
            places += [_Place(shard, None, cut or "fewer samples than its index says", lost)] * lost
        order = shuffle_block(len(places), seed=self._owner.seed, epoch=epoch, stream=self.number, block=block)
        return [places[number] for number in reversed(order)]


class StreamSettings(BaseModel):
    """How shards become batches."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_streams: int = Field(
        8, ge=1, description="Canonical streams: the number of workers must divide it, and it the global batch."
    )
    shuffle_shards: int = Field(
        1,
        ge=1,
        description="Shards shuffled together; each stream holds up to twice as many in memory.",
    )
    prefetch_batches: int = Field(2, ge=1, description="Batches made ready ahead of the training loop.")
    max_bad_share: float = Field(0.05, ge=0, le=1, description="Share of broken samples above which a run stops.")
    cache_bytes: int = Field(
        256 * 2**20, ge=0, description="Raw samples kept in memory, so that small data sets are read only once."
    )


class ShardStream:
    """The BatchSource over tar shards: reads, decodes, collates, one batch after another, ahead of the consumer.

    shards: all shards of the data set, the same on every worker. decode: a sample (``{"__key__": str, extension:
    bytes}``) to named values, BadSampleError for one that cannot be used; it runs on a thread. The other keywords are
    those of StreamSettings. The world size must divide num_streams, num_streams must divide global_batch_size, and
    there must be at least as many shards as streams.

    Iterating again goes on after the last batch that was handed out. `close`, or use as a context manager, ends the
    thread. Errors of the thread are raised where the batch would have come.
    """

    def __init__(
        self,
        shards: ShardIndex | Sequence[Shard],
        *,
        storage: Storage,
        decode: Decode,
        collate: Collate = stack_samples,
        num_streams: int,
        global_batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle_shards: int = 1,
        prefetch_batches: int = 2,
        max_bad_share: float = 0.05,
        cache_bytes: int = 256 * 2**20,
    ) -> None:
        self.shards = tuple(shards.shards if isinstance(shards, ShardIndex) else shards)
        check_streams(
            len(self.shards), num_streams=num_streams, global_batch_size=global_batch_size, world_size=world_size
        )
        if shuffle_shards < 1 or prefetch_batches < 1:
            raise DataError(
                f"shuffle_shards is {shuffle_shards}, prefetch_batches {prefetch_batches}: both must be at least 1."
            )
        if not 0 <= rank < world_size:
            raise DataError(f"rank is {rank}: it must be from 0 to {world_size - 1}.")
        self.num_streams, self.seed, self.shuffle_shards = num_streams, seed, shuffle_shards
        self.cache = _ShardCache(storage, cache_bytes)
        self._decode, self._collate = decode, collate
        self._rows_per_stream = global_batch_size // num_streams
        self._prefetch_batches = prefetch_batches
        self._positions = dict.fromkeys(own_streams(num_streams, rank=rank, world_size=world_size), (0, 0))
        self._counts = SampleCounts(max_bad_share, known_samples(self.shards))
        self._worker: _Worker | None = None

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes to a `Batch.state`, one worker's or the union of all workers'; it takes what is its own.

        Errors: CheckpointError when the state is not of this number of streams.
        """
        self.close()
        streams: Mapping[str, Sequence[int]] = state.get("streams", {})
        missing = [stream for stream in self._positions if str(stream) not in streams]
        strange = [name for name in streams if not name.isdigit() or int(name) >= self.num_streams]
        if missing or strange:
            raise CheckpointError(
                f"The data state is for streams {sorted(streams)}; this run has {self.num_streams} streams and needs "
                f"{list(self._positions)} here. num_streams must stay as it was when the checkpoint was written."
            )
        for stream in self._positions:
            epoch, position = streams[str(stream)]
            self._positions[stream] = (int(epoch), int(position))

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        worker = self._worker = _Worker(self._batches(self._positions, self._counts.copy()), self._prefetch_batches)
        try:
            for batch, positions, counts in worker:
                self._positions, self._counts = positions, counts
                yield batch
        finally:
            worker.close()

    def close(self) -> None:
        """Ends the thread. Iterating afterwards starts a new one at the same place."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def __enter__(self) -> ShardStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _batches(self, positions: dict[int, tuple[int, int]], counts: SampleCounts) -> Iterator[_Ready]:
        pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="fewstep-shards")
        try:
            streams = list(pool.map(lambda item: _Stream(item[0], self, pool, item[1]), positions.items()))
            while True:
                samples, rows = [], []
                for stream in streams:
                    for k in range(self._rows_per_stream):
                        samples.append(self._next_sample(stream, counts))
                        rows.append(stream.number * self._rows_per_stream + k)
                after = {stream.number: (stream.epoch, stream.position) for stream in streams}
                state = {"streams": {str(number): list(place) for number, place in after.items()}}
                batch = Batch(self._collate(samples), rows, state, dict(counts.skipped))
                yield batch, after, counts.copy()
        finally:
            pool.shutdown(cancel_futures=True)

    def _next_sample(self, stream: _Stream, counts: SampleCounts) -> dict[str, Any]:
        first_epoch = stream.epoch
        while True:
            place = stream.next_place()
            if stream.epoch > first_epoch + 1:
                raise DataError(
                    f"Stream {stream.number} found no usable sample in a whole epoch; skipped: {counts.skipped}. "
                    f"Look at {place.shard.uri}."
                )
            if place.sample is None:
                counts.seen += 1
                counts.lose(place.shard.uri, place.cut, samples=1, of_shard=place.lost)
            else:
                decoded = decode_sample(place.sample, self._decode, shard=place.shard, counts=counts)
                if decoded is not None:
                    return decoded


_Ready = tuple[Batch, dict[int, tuple[int, int]], SampleCounts]


class _Worker:
    """Runs an iterator on a thread, a few items ahead of who iterates over this."""

    def __init__(self, items: Iterator[_Ready], ahead: int) -> None:
        self._queue: queue.Queue[_Ready | BaseException] = queue.Queue(maxsize=ahead)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(items,), name="fewstep-batches", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[_Ready]:
        while not self._stop.is_set():
            try:
                item = self._queue.get(timeout=1.0)
            except queue.Empty:  # look whether another thread called close
                continue
            if isinstance(item, BaseException):
                raise item
            yield item

    def close(self) -> None:
        self._stop.set()
        while self._thread.is_alive():  # it may be waiting for room in the queue
            try:
                self._queue.get_nowait()
            except queue.Empty:
                self._thread.join(0.01)

    def _run(self, items: Iterator[_Ready]) -> None:
        try:
            for item in items:
                self._queue.put(item)
                if self._stop.is_set():
                    return
        except BaseException as error:
            self._queue.put(error)
        finally:
            items.close()  # type: ignore[attr-defined]
