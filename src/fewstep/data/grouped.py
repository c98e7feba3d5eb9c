"""One canonical stream in groups of one shape: samples wait until as many of their shape have come as a group takes.

Which samples wait after a group is a function of the stream alone, so they are part of its state: by where they lie in
their shards. On resume they are read again from there, and decoded again.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from torch import Tensor

from fewstep.data.counts import SampleCounts
from fewstep.data.mixed_stream import Drawn, MixedStream, StreamState, Whereabouts
from fewstep.data.pieces import LoadedPiece, PieceSource
from fewstep.data.sample import Decode
from fewstep.data.source import decode_sample


class GroupedStream:
    """Groups without end, each of samples whose tensor `group_by` has one shape.

    Samples are drawn in the order of the stream until some shape has a full group; so at most a group less one waits of
    every shape, decoded, in memory.

    Args:
        stream: where samples come from.
        group_by: name of the tensor.
        source: reads samples that waited when the state was taken.
        pool: its threads do.
        waiting: where those lie, in the order in which they were drawn.
    """

    def __init__(
        self,
        stream: MixedStream,
        group_by: str,
        source: PieceSource,
        pool: ThreadPoolExecutor,
        waiting: Sequence[Whereabouts],
    ) -> None:
        self.number = stream.number
        self._stream, self._group_by = stream, group_by
        self._source, self._pool = source, pool
        self._to_read = tuple(waiting)
        self._waiting: dict[tuple[int, ...], list[tuple[int, Drawn]]] = {}  # by shape, with the number of the draw
        self._number = 0

    @property
    def state(self) -> StreamState:
        """Where the next sample lies, and those that wait."""
        waiting = {number: drawn.whereabouts for group in self._waiting.values() for number, drawn in group}
        return replace(self._stream.state, waiting=(*self._to_read, *(waiting[number] for number in sorted(waiting))))

    def prefetch(self) -> None:
        """Begin to read what comes first."""
        self._stream.prefetch()

    def next_rows(self, count: int, decode: Decode, counts: Sequence[SampleCounts]) -> list[dict[str, Any]]:
        """Return the next group, in the order in which its samples were drawn; raises what `MixedStream` does.

        Args:
            count: rows of a group; the same in every call.
            decode, counts: as of `MixedStream.next_rows`. A sample that waited and can no longer be read is counted.
        """
        if self._to_read:
            self._read_again(decode, counts)
        while True:
            shape = self._wait(self._stream.next_drawn(decode, counts))
            if len(self._waiting[shape]) == count:
                return [drawn.data for _, drawn in self._waiting.pop(shape)]

    def _wait(self, drawn: Drawn) -> tuple[int, ...]:
        shape = tuple(drawn.data[self._group_by].shape)
        # What waits must not keep the pieces that it came in.
        own = {name: value.clone() if isinstance(value, Tensor) else value for name, value in drawn.data.items()}
        drawn = Drawn(own, drawn.whereabouts)
        self._waiting.setdefault(shape, []).append((self._number, drawn))
        self._number += 1
        return shape

    def _read_again(self, decode: Decode, counts: Sequence[SampleCounts]) -> None:
        lie = self._to_read
        shards = [self._stream.shard_of(place) for place in lie]
        loaded: list[LoadedPiece] = list(
            self._pool.map(
                self._source.load_sample, shards, [place.start for place in lie], [place.end for place in lie]
            )
        )
        self._to_read = ()
        for place, shard, read in zip(lie, shards, loaded, strict=True):
            own = counts[place.source]
            if not read.samples:
                own.seen += 1
                own.lose(shard.uri, read.reason, read.detail, samples=1, size_bytes=read.lost_bytes, start=place.start)
                continue
            data = decode_sample(read.samples[0], decode, shard=shard, counts=own)
            if data is not None:
                self._wait(Drawn(data, place))
