"""One canonical stream: hands out the samples of its shards in their order, from any place on, and reads ahead."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from fewstep.data.order import cut_blocks, cut_pieces, deal_shards, shuffle_block, shuffle_pieces
from fewstep.data.pieces import LoadedPiece, PieceSource
from fewstep.data.shards import Shard
from fewstep.data.tar_piece import RawSample
from fewstep.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Piece:
    """A range of bytes of a shard; `shard` is its number in the list of shards."""

    shard: int
    start: int
    end: int


class ShardOrder:
    """What every stream of a data set reads, by epoch: a pure function of the list of shards and the settings."""

    def __init__(
        self, shards: Sequence[Shard], *, num_streams: int, seed: int, piece_bytes: int, shuffle_bytes: int
    ) -> None:
        self.shards = tuple(shards)
        self.num_streams, self.seed = num_streams, seed
        self._piece_bytes, self._shuffle_bytes = piece_bytes, shuffle_bytes
        self._dealt: dict[int, list[list[int]]] = {}

    def blocks(self, epoch: int, stream: int) -> list[list[Piece]]:
        """Return the blocks of a stream in an epoch, in reading order; never none."""
        pieces = [
            Piece(shard, start, end)
            for shard in self._deal(epoch)[stream]
            for start, end in cut_pieces(self.shards[shard].size_bytes, piece_bytes=self._piece_bytes)
        ]
        order = shuffle_pieces(len(pieces), seed=self.seed, epoch=epoch, stream=stream)
        pieces = [pieces[number] for number in order]
        sizes = [piece.end - piece.start for piece in pieces]
        return [[pieces[number] for number in block] for block in cut_blocks(sizes, shuffle_bytes=self._shuffle_bytes)]

    def _deal(self, epoch: int) -> list[list[int]]:
        dealt = self._dealt.get(epoch)
        if dealt is None:
            dealt = deal_shards(len(self.shards), num_streams=self.num_streams, seed=self.seed, epoch=epoch)
            # Streams are in the same epoch, or in the one after.
            self._dealt = {number: kept for number, kept in self._dealt.items() if number >= epoch - 1} | {epoch: dealt}
        return dealt


@dataclass(frozen=True, slots=True)
class Lost:
    """Samples that a piece should have and has not."""

    shard: Shard
    start: int
    samples: int
    size_bytes: int
    epoch: int
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class Place:
    """A sample, and the shard that it comes from, with its number in the list of shards."""

    shard: Shard
    number: int
    sample: RawSample


class CanonicalStream:
    """Samples without end. Its position is [epoch, block, place]: places are counted within the block.

    While the second half of a block is handed out, the pieces of the next one are read, each by a thread of the pool;
    so it holds at most two blocks.

    Args:
        number: of the stream.
        order: what it reads.
        source: reads pieces.
        pool: its threads do.
        position: where it begins.
    """

    def __init__(
        self,
        number: int,
        order: ShardOrder,
        source: PieceSource,
        pool: ThreadPoolExecutor,
        position: Sequence[int] = (0, 0, 0),
    ) -> None:
        self.number = number
        self._order, self._source, self._pool = order, source, pool
        self._epoch, self._block, self._place = position
        self._plans: dict[int, list[list[Piece]]] = {}
        self._places: list[Place] = []  # of the block, the next one last
        self._size = 0
        self._lost: list[Lost] = []
        self._ahead: list[Future[LoadedPiece]] | None = None
        self._begun = False

    @property
    def position(self) -> tuple[int, int, int]:
        """Where the next sample lies."""
        return self._epoch, self._block, self._place

    def prefetch(self) -> None:
        """Begin to read what comes first."""
        if self._ahead is None and self._block < len(self._plan(self._epoch)):
            self._ahead = self._submit(self._epoch, self._block)

    def next_place(self) -> Place | None:
        """Return the next sample, or None when a block came to its end and the next one turned out to be empty.

        Raises what reading raises, and CheckpointError when there is no such position.
        """
        if not self._begun:
            self._begin()
        if not self._places:
            self._epoch, self._block = self._after()
            self._place = 0
            self._enter(count_lost=True)
        if not self._places:
            return None
        self._place += 1
        place = self._places.pop()
        if self._ahead is None and len(self._places) <= self._size // 2:
            self._ahead = self._submit(*self._after())
        return place

    def take_lost(self) -> list[Lost]:
        """Return what was missing from the blocks that were entered since the last call."""
        lost, self._lost = self._lost, []
        return lost

    def _begin(self) -> None:
        self._begun = True
        if self._block >= len(self._plan(self._epoch)):
            self._refuse(f"block {self._block} of epoch {self._epoch}", f"{len(self._plan(self._epoch))} blocks")
        # What a block lacks was counted before its first sample was handed out.
        whole = self._enter(count_lost=self._place == 0)
        if self._place > self._size and whole:
            self._refuse(
                f"sample {self._place} of block {self._block} of epoch {self._epoch}", f"{self._size} samples there"
            )
        # Where a shard has gone since, what is left of the block may be less than what was handed out of it.
        self._place = min(self._place, self._size)
        del self._places[self._size - self._place :]

    def _refuse(self, wanted: str, there: str) -> None:
        raise CheckpointError(
            f"The data state is at {wanted} in stream {self.number}, but that stream has only {there}. The shards, or "
            "the seed, are not those of the checkpoint."
        )

    def _enter(self, *, count_lost: bool) -> bool:
        """Take up the block; whether nothing is missing from it."""
        pieces = self._plan(self._epoch)[self._block]
        ahead, self._ahead = self._ahead or self._submit(self._epoch, self._block), None
        places: list[Place] = []
        lost: list[tuple[Piece, LoadedPiece]] = []
        for piece, future in zip(pieces, ahead, strict=True):
            loaded, shard = future.result(), self._order.shards[piece.shard]
            places += [Place(shard, piece.shard, sample) for sample in loaded.samples]
            if loaded.lost:
                lost.append((piece, loaded))
        if lost and count_lost:
            found_bytes = sum(place.sample.end - place.sample.start for place in places)
            for piece, loaded in lost:
                shard, count = self._order.shards[piece.shard], loaded.lost
                if shard.num_samples is None and found_bytes:  # as many as lie in so many bytes of the block
                    count = max(count, round(loaded.lost_bytes * len(places) / found_bytes))
                self._lost.append(
                    Lost(shard, piece.start, count, loaded.lost_bytes, self._epoch, loaded.reason, loaded.detail)
                )
        mixed = shuffle_block(
            len(places), seed=self._order.seed, epoch=self._epoch, stream=self.number, block=self._block
        )
        self._places = [places[number] for number in reversed(mixed)]
        self._size = len(places)
        return not lost

    def _submit(self, epoch: int, block: int) -> list[Future[LoadedPiece]]:
        shards = self._order.shards
        return [
            self._pool.submit(self._source.load, shards[piece.shard], piece.start, piece.end)
            for piece in self._plan(epoch)[block]
        ]

    def _after(self) -> tuple[int, int]:
        last = self._block + 1 >= len(self._plan(self._epoch))
        return (self._epoch + 1, 0) if last else (self._epoch, self._block + 1)

    def _plan(self, epoch: int) -> list[list[Piece]]:
        if epoch not in self._plans:
            kept = {number: plan for number, plan in self._plans.items() if number >= self._epoch}
            self._plans = {**kept, epoch: self._order.blocks(epoch, self.number)}
        return self._plans[epoch]
