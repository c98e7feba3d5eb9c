"""Endless batches from shards, in an order that resumes exactly, also with another number of workers or processes.

Every global batch holds ``global_batch_size / num_streams`` samples of each canonical stream (`order.py`). The state
after a batch is, for each stream, its position [epoch, block, place], where place counts the samples *attempted* in
that block: a broken sample takes a place too, so skipping one shifts nothing. Where there are several sources, it is
such a position in each of them, and the rows drawn of it (`mixed_stream.py`). Where samples are of several shapes, the
samples that wait for their group belong to it too (`grouped.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, Field

from fewstep.data.counts import SampleCounts
from fewstep.data.mixed_stream import MixedOrder, StreamState
from fewstep.data.mixture import MixedShards
from fewstep.data.order import check_streams, own_streams
from fewstep.data.part import Part, PartBatch, PartReader, join_batches
from fewstep.data.processes import Batches, InProcesses, OnAThread
from fewstep.data.sample import Decode
from fewstep.data.shards import Shard, ShardIndex
from fewstep.data.source import known_samples
from fewstep.errors import CheckpointError, DataError
from fewstep.storage import Storage


@dataclass
class Batch:
    """The samples of one worker for one update.

    data: tensors on the CPU, stacked on dim 0, or lists (of tensors too, where groups of rows have unlike shapes);
    rows: the number of each sample within the global batch; state: the position after this batch (JSON-able); counts:
    samples skipped so far, by reason; drawn: rows so far of each source, since the training began, where there are
    several.
    """

    data: dict[str, Any]
    rows: list[int]
    state: dict[str, Any]
    counts: dict[str, int]
    drawn: dict[str, int] = field(default_factory=dict)


class BatchSource(Protocol):
    """Endless batches that can go on from a state."""

    def __iter__(self) -> Iterator[Batch]: ...

    def load_state(self, state: dict[str, Any]) -> None: ...


class StreamSettings(BaseModel):
    """How shards become batches."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_streams: int = Field(
        8,
        ge=1,
        description="Canonical streams: a number of workers must divide it (the most of {min, max} must not be above "
        "it), and it the global batch.",
    )
    piece_bytes: int = Field(
        8 * 2**20, ge=2**12, description="Shards are read in pieces of about so many bytes, in an order of their own."
    )
    shuffle_bytes: int = Field(
        64 * 2**20,
        ge=1,
        description="Bytes of pieces whose samples are shuffled together; each stream holds up to twice as many. "
        "Several sources share them by their weights, at least one piece each.",
    )
    connections: int = Field(4, ge=1, le=16, description="Pieces that each loading process reads at once.")
    loader_processes: int = Field(
        0, ge=0, description="Processes of each worker that read and decode; 0: a thread of the worker does."
    )
    prefetch_batches: int = Field(2, ge=1, description="Batches made ready ahead of the training loop.")
    max_bad_share: float = Field(0.05, ge=0, le=1, description="Share of broken samples above which a run stops.")
    cache_bytes: int = Field(
        256 * 2**20, ge=0, description="Raw samples kept in memory, so that small data sets are read only once."
    )
    disk_cache: Path | None = Field(None, description="Folder on the local disk in which pieces are kept; null: none.")
    disk_cache_bytes: int = Field(100 * 2**30, ge=0, description="Limit of disk_cache.")


class ShardStream:
    """The BatchSource over tar shards: reads, decodes, collates, one batch after another, ahead of the consumer.

    Iterating again goes on after the last batch that was handed out. `close`, or use as a context manager, ends the
    thread or the processes. Errors there are raised where the batch would have come.

    Args:
        shards: all shards of the data set, or of every source of a mixture; the same on every worker.
        storage: where they lie.
        decode: a sample (``{"__key__": str, extension: bytes}``) to named values, BadSampleError for one that cannot be
            used. It runs on a thread; with loader_processes it must pickle.
        settings: see there. The world size must not be above num_streams, num_streams must divide global_batch_size,
            and there must be at least as many shards as streams, in every source.
        global_batch_size: samples of all workers together.
        seed: of the order.
        rank, world_size: which of how many workers this is.
        group_by: name of a tensor whose shape differs between samples: each stream then gives its rows of a batch in
            one shape, and samples wait until they make a group (`grouped.py`); None: all samples are of one shape.

    Raises:
        DataError: the numbers do not fit together.
    """

    def __init__(
        self,
        shards: ShardIndex | Sequence[Shard] | MixedShards,
        *,
        storage: Storage,
        decode: Decode,
        settings: StreamSettings,
        global_batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        group_by: str | None = None,
    ) -> None:
        self._grouped = group_by is not None
        self._mixed = mixed = shards if isinstance(shards, MixedShards) else MixedShards.of(shards)
        self._digests = mixed.digests
        for name, of_source in zip(mixed.names, mixed.shards, strict=True):
            check_streams(
                len(of_source), num_streams=settings.num_streams, global_batch_size=global_batch_size,
                world_size=world_size, source=name,
            )  # fmt: skip
        if not 0 <= rank < world_size:
            raise DataError(f"rank is {rank}: it must be from 0 to {world_size - 1}.")
        own = own_streams(settings.num_streams, rank=rank, world_size=world_size)
        if settings.loader_processes > len(own):
            raise DataError(
                f"stream.loader_processes is {settings.loader_processes}, but each of the {world_size} workers has "
                f"{len(own)} of the {settings.num_streams} canonical streams, and a process needs one: set it to at "
                f"most {len(own)}, or raise stream.num_streams (which changes the order of samples)."
            )
        self._settings = settings
        self._reader = PartReader(
            order=MixedOrder(
                mixed, num_streams=settings.num_streams, seed=seed, piece_bytes=settings.piece_bytes,
                shuffle_bytes=settings.shuffle_bytes,
            ),
            storage=storage,
            decode=decode,
            rows_per_stream=global_batch_size // settings.num_streams,
            connections=settings.connections,
            cache_bytes=settings.cache_bytes // max(1, settings.loader_processes),
            disk_cache=(settings.disk_cache, settings.disk_cache_bytes) if settings.disk_cache is not None else None,
            group_by=group_by,
        )  # fmt: skip
        known = [known_samples(of_source) for of_source in mixed.shards]
        sizes = [sum(shard.size_bytes for shard in of_source) for of_source in mixed.shards]
        self._parts = [
            Part(
                dict.fromkeys(streams, StreamState.begin(len(mixed.names))),
                # Each part judges by its own share of the data set, and each source by itself.
                tuple(
                    SampleCounts(
                        settings.max_bad_share,
                        dataset_samples=count and count * len(streams) // settings.num_streams,
                        dataset_bytes=size_bytes * len(streams) // settings.num_streams,
                        is_part=len(streams) < settings.num_streams,
                        shuffled=True,
                        source=name,
                    )
                    for name, count, size_bytes in zip(mixed.names, known, sizes, strict=True)
                ),
            )
            for streams in _share(own, max(1, settings.loader_processes))
        ]
        self._batches: Batches | None = None

    def load_state(self, state: dict[str, Any]) -> None:
        """Go to a `Batch.state`, one worker's or the union of all workers'; it takes what is its own.

        Raises:
            CheckpointError: the state is not of this number of streams, or of other shards, sources or weights.
        """
        self.close()
        found, wanted = state.get("sources"), self._mixed.sources_to_json()
        if found != wanted:
            # What these would have drawn until now is not what was drawn.
            raise CheckpointError(
                f"The data state is of {_in_words(found)}, and this run has {_in_words(wanted)}. Sources and weights "
                "must stay as they were when the checkpoint was written; a training with others begins anew."
            )
        for name, before, now in zip(self._mixed.names, state.get("shards", self._digests), self._digests, strict=True):
            if before != now:
                raise CheckpointError(
                    f"The shards{f' of the source {name}' if name else ''} are not those of the checkpoint (digest "
                    f"{before[:12]}, now {now[:12]}): some were added, removed or written again since, and their list "
                    "says in which order samples come. Bring the old list back; or give data.version another word, "
                    "which begins the training anew."
                )
        own = [stream for part in self._parts for stream in part.streams]
        num_streams = self._settings.num_streams
        streams: Mapping[str, Any] = state.get("streams", {})
        missing = [stream for stream in own if str(stream) not in streams]
        strange = [name for name in streams if not name.isdigit() or int(name) >= num_streams]
        if missing or strange:
            raise CheckpointError(
                f"The data state is for streams {sorted(streams)}; this run has {num_streams} streams and needs "
                f"{own} here. num_streams must stay as it was when the checkpoint was written."
            )
        for part in self._parts:
            part.streams = {
                stream: StreamState.from_json(
                    streams[str(stream)], stream=stream, num_sources=len(self._mixed.names), grouped=self._grouped
                )
                for stream in part.streams
            }

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        ahead = self._settings.prefetch_batches
        batches: Batches = (
            InProcesses(self._reader, self._parts, ahead=ahead)
            if self._settings.loader_processes
            else OnAThread(self._reader, self._parts[0], ahead=ahead)
        )
        self._batches = batches
        try:
            for parts in batches:
                self._parts = [made.after for made in parts]
                yield self._whole_batch(parts)
        finally:
            batches.close()

    def close(self) -> None:
        """End the thread or the processes. Iterating afterwards starts anew at the same place."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def _whole_batch(self, parts: Sequence[PartBatch]) -> Batch:
        states = {stream: state for part in parts for stream, state in part.after.streams.items()}
        sources = self._mixed.sources_to_json()
        skipped: dict[str, int] = {}
        for part in parts:
            for counts in part.after.counts:
                for reason, count in counts.by_reason().items():
                    skipped[reason] = skipped.get(reason, 0) + count
        drawn = [sum(each) for each in zip(*(state.given for state in states.values()), strict=True)]
        streams = {str(stream): state.to_json(grouped=self._grouped) for stream, state in states.items()}
        return Batch(
            data=join_batches([data for part in parts for data in part.data], grouped=self._grouped),
            rows=[row for part in parts for row in part.rows],
            state={"streams": streams, "shards": self._digests} | ({} if sources is None else {"sources": sources}),
            counts=skipped,
            drawn={} if sources is None else dict(zip(self._mixed.names, drawn, strict=True)),
        )

    def __enter__(self) -> ShardStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _share(streams: Sequence[int], count: int) -> list[Sequence[int]]:
    """The streams in `count` runs, so that the rows of all runs together keep their order."""
    return [streams[len(streams) * n // count : len(streams) * (n + 1) // count] for n in range(count)]


def _in_words(sources: list[list[Any]] | None) -> str:
    if sources is None:
        return "a single source"
    return "the sources " + ", ".join(f"{name} (share {share})" for name, share in sources)
