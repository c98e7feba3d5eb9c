"""One canonical stream of a mixture: a canonical stream of every source, and which of them gives the next row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from fewstep.data.canonical import CanonicalStream, Place, ShardOrder
from fewstep.data.counts import SampleCounts
from fewstep.data.mixture import MixedShards, source_seed
from fewstep.data.order import next_source, source_starts
from fewstep.data.pieces import PieceSource
from fewstep.data.sample import Decode
from fewstep.data.shards import Shard
from fewstep.data.source import decode_sample
from fewstep.errors import CheckpointError, DataError

Position = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """Where a sample lies: source, number of the shard in the list of that source, and bytes there."""

    source: int
    shard: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Drawn:
    """A decoded sample, and where it lies."""

    data: dict[str, Any]
    whereabouts: Whereabouts


@dataclass(frozen=True)
class StreamState:
    """Where a stream is.

    Attributes:
        positions: in each source.
        drawn: samples drawn of each source.
        waiting: those of them that wait for their group, in a stream that gives groups.
    """

    positions: tuple[Position, ...]
    drawn: tuple[int, ...]
    waiting: tuple[Whereabouts, ...] = ()

    @classmethod
    def begin(cls, num_sources: int) -> StreamState:
        """Return the state before the first row."""
        return cls(((0, 0, 0),) * num_sources, (0,) * num_sources)

    @property
    def given(self) -> tuple[int, ...]:
        """Rows that the stream gave of each source."""
        waiting = [place.source for place in self.waiting]
        return tuple(drawn - waiting.count(source) for source, drawn in enumerate(self.drawn))

    def to_json(self, *, grouped: bool = False) -> Any:
        """Return [epoch, block, place] of a single source; of several [epoch, block, place, rows drawn] of each.

        The rows could be computed from their sum, but only by going through all of them. Of a stream that gives groups
        that is the position, and [source, shard, offset, length] of each sample that waits stands beside it.
        """
        if grouped:
            waiting = [[place.source, place.shard, place.start, place.end - place.start] for place in self.waiting]
            return {"position": self.to_json(), "waiting": waiting}
        if len(self.positions) == 1:
            return list(self.positions[0])
        return [[*position, drawn] for position, drawn in zip(self.positions, self.drawn, strict=True)]

    @classmethod
    def from_json(cls, value: Any, *, stream: int, num_sources: int, grouped: bool = False) -> StreamState:
        """Return what `to_json` gave.

        Raises:
            CheckpointError: it is of another format.
        """
        if isinstance(value, Mapping) != grouped:
            raise CheckpointError(
                f"The data state of stream {stream} is {'not ' if grouped else ''}of rows in groups of one shape, and "
                f"this run groups {'them' if grouped else 'nothing'}: the latents are not those of the checkpoint "
                "(encode.buckets). Start the training again."
            )
        if grouped:
            try:
                waiting = tuple(
                    Whereabouts(source, shard, start, start + length)
                    for source, shard, start, length in (tuple(map(int, place)) for place in value["waiting"])
                )
                if not all(0 <= place.source < num_sources for place in waiting):
                    raise ValueError
                position = value["position"]
            except (KeyError, TypeError, ValueError):
                raise CheckpointError(
                    f"The data state of stream {stream} is {dict(value)} and not a position and [source, shard, "
                    "offset, length] of each sample that waits: it is damaged. Start the training again."
                ) from None
            return replace(cls.from_json(position, stream=stream, num_sources=num_sources), waiting=waiting)
        try:
            if num_sources == 1:
                epoch, block, place = map(int, value)
                return cls(((epoch, block, place),), (0,))
            each = [tuple(map(int, source)) for source in value]
            positions = tuple((epoch, block, place) for epoch, block, place, _ in each)
            if len(positions) != num_sources:
                raise ValueError
            return cls(positions, tuple(source[3] for source in each))
        except (TypeError, ValueError):
            wanted = "[epoch, block, place]" + ("" if num_sources == 1 else f" and rows of {num_sources} sources")
            why = "it was written by fewstep before shards were read in pieces" if num_sources == 1 else "it is damaged"
            raise CheckpointError(
                f"The data state of stream {stream} is {list(value)} and not {wanted}: {why}. Start the training again."
            ) from None


class MixedOrder:
    """What every stream of a mixture reads: a pure function of the lists of shards and the settings.

    Each source has an order of its own, by its own seed, and its share of the shuffle buffer. A single source has
    `seed` and all of it.
    """

    def __init__(
        self, mixed: MixedShards, *, num_streams: int, seed: int, piece_bytes: int, shuffle_bytes: int
    ) -> None:
        self.names, self.shares = mixed.names, mixed.shares
        self.orders = [
            ShardOrder(
                shards, num_streams=num_streams, seed=source_seed(seed, name), piece_bytes=piece_bytes,
                # A block is never less than a piece.
                shuffle_bytes=max(1, shuffle_bytes * share // sum(self.shares)),
            )
            for name, share, shards in zip(self.names, self.shares, mixed.shards, strict=True)
        ]  # fmt: skip
        self.starts = source_starts(self.shares, num_streams=num_streams)


class MixedStream:
    """Samples without end, each of the source that is furthest behind its share.

    Args:
        number: of the stream.
        order: what it reads.
        source: reads pieces.
        pool: its threads do.
        state: where it begins.
    """

    def __init__(
        self, number: int, order: MixedOrder, source: PieceSource, pool: ThreadPoolExecutor, state: StreamState
    ) -> None:
        self.number = number
        self._order, self._drawn = order, list(state.drawn)
        self._streams = [
            CanonicalStream(number, own, source, pool, position)
            for own, position in zip(order.orders, state.positions, strict=True)
        ]

    @property
    def state(self) -> StreamState:
        """Where the next row lies."""
        return StreamState(tuple(stream.position for stream in self._streams), tuple(self._drawn))

    def prefetch(self) -> None:
        """Begin to read what comes first."""
        for stream in self._streams:
            stream.prefetch()

    def next_rows(self, count: int, decode: Decode, counts: Sequence[SampleCounts]) -> list[dict[str, Any]]:
        """Return the next samples that can be used; what cannot is counted in the `counts` of its source.

        Raises:
            DataError: too many samples are broken, or a shard is not the one that was listed.
            CheckpointError: the shards have no such position.
        """
        return [self.next_drawn(decode, counts).data for _ in range(count)]

    def next_drawn(self, decode: Decode, counts: Sequence[SampleCounts]) -> Drawn:
        """Return the next sample that can be used, and where it lies; otherwise as `next_rows`."""
        which = self._next() if len(self._streams) > 1 else 0
        place, data = self._of(self._streams[which], decode, counts[which])
        self._drawn[which] += 1
        return Drawn(data, Whereabouts(which, place.number, place.sample.start, place.sample.end))

    def shard_of(self, place: Whereabouts) -> Shard:
        """Return the shard that a sample lies in.

        Raises:
            CheckpointError: there is none.
        """
        shards = self._order.orders[place.source].shards
        if not 0 <= place.shard < len(shards):
            raise CheckpointError(
                f"The data state names shard {place.shard} in stream {self.number}, and there are {len(shards)}. The "
                "shards are not those of the checkpoint."
            )
        return shards[place.shard]

    def _next(self) -> int:
        before = self._order.starts[self.number]
        return next_source(self._order.shares, [a + b for a, b in zip(before, self._drawn, strict=True)])

    def _of(self, stream: CanonicalStream, decode: Decode, counts: SampleCounts) -> tuple[Place, dict[str, Any]]:
        first_epoch = stream.position[0]
        while True:
            place = stream.next_place()
            for lost in stream.take_lost():
                counts.seen += lost.samples
                counts.lose(
                    lost.shard.uri, lost.reason, lost.detail,
                    samples=lost.samples, size_bytes=lost.size_bytes, start=lost.start, epoch=lost.epoch,
                )  # fmt: skip
            if stream.position[0] > first_epoch + 1:
                worst = max(counts.shards, key=lambda shard: counts.shards[shard], default="its shards")
                raise DataError(
                    f"Stream {stream.number} found no usable sample{counts.of_source} in a whole epoch; skipped: "
                    f"{counts.by_reason()}. Look at {worst}."
                )
            if place is None:
                continue
            decoded = decode_sample(place.sample, decode, shard=place.shard, counts=counts)
            if decoded is not None:
                return place, decoded
