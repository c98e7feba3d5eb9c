"""The order of samples: a pure function of (seed, epoch, shard list), whatever the number of workers.

An epoch's shards are shuffled and dealt, like cards, over a fixed number of canonical streams. Each stream cuts its
shards into pieces of some megabytes, shuffles the pieces, takes as many as its buffer holds for a block, and shuffles
all samples of the block. So what lies side by side in a shard comes far apart, and the buffer has its size in bytes,
whatever the size of shards and samples. A worker owns whole streams, so the samples
that stream *s* gives do not depend on who reads it, and a position in a stream says exactly what comes next. The idea
is that of mosaicml/streaming (``py1e`` shuffle over canonical nodes).

Within an epoch, the streams together give every sample once. Streams run through their epochs at their own pace:
when shards differ in size, one stream may begin its next epoch a little before another.

Where there are several sources with weights, each has such an order of its own, and a stream of the mixture is made of
that stream of each source: which of them gives a row is a pure function of the stream and the number of the row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fewstep.errors import DataError

_DEAL, _SHUFFLE, _PIECES = 0, 1, 2  # keep the random numbers of the uses apart
_BLOCK = 512  # of a tar
_LONGEST_PERIOD = 10_000  # of the order of sources; a rarer one is not spread over the streams


def _permutation(size: int, *key: int) -> list[int]:
    # Raw bits of a bit generator are the same in every numpy version; Generator.permutation is not promised to be.
    bits = np.random.PCG64(np.random.SeedSequence(key)).random_raw(size)
    return [int(index) for index in np.argsort(bits, kind="stable")]


def check_streams(
    num_shards: int, *, num_streams: int, global_batch_size: int, world_size: int, source: str = ""
) -> None:
    """DataError unless there are shards for the streams, streams for the workers, and the batch divides.

    `source` is the name of the shards' source, where there are several.
    """
    if num_streams < 1 or world_size < 1:
        raise DataError(
            f"num_streams is {num_streams} and the number of workers {world_size}: both must be at least 1."
        )
    if num_shards < num_streams:
        of_source = f" in the source {source}" if source else ""
        raise DataError(
            f"There are {num_shards} shards{of_source} for {num_streams} canonical streams, and each stream needs at "
            f"least one. Write more shards (a smaller samples_per_shard), or set num_streams to at most {num_shards}."
        )
    if world_size > num_streams:
        raise DataError(
            f"{world_size} workers cannot share {num_streams} canonical streams, as each needs one. Use at most "
            f"{num_streams} workers, or more num_streams (which changes the order of samples)."
        )
    if global_batch_size < 1 or global_batch_size % num_streams:
        lower = max(num_streams, global_batch_size // num_streams * num_streams)
        raise DataError(
            f"global_batch_size {global_batch_size} is not a multiple of the {num_streams} canonical streams. "
            f"Use {lower} or {lower + num_streams}, or another num_streams."
        )


def own_streams(num_streams: int, *, rank: int, world_size: int) -> list[int]:
    """The streams that worker `rank` of `world_size` reads: those with ``stream % world_size == rank``.

    Where the workers do not divide the streams, some have one more than others.
    """
    return list(range(rank, num_streams, world_size))


def deal_shards(num_shards: int, *, num_streams: int, seed: int, epoch: int) -> list[list[int]]:
    """For each stream, the numbers of the shards that it reads in this epoch, in reading order."""
    order = _permutation(num_shards, seed, _DEAL, epoch)
    return [order[stream::num_streams] for stream in range(num_streams)]


def cut_pieces(size_bytes: int, *, piece_bytes: int) -> list[tuple[int, int]]:
    """The pieces that a tar is read in, as (start, end): of about `piece_bytes`, at borders of tar's blocks."""
    count = max(1, round(size_bytes / piece_bytes))
    bounds = [size_bytes * number // count // _BLOCK * _BLOCK for number in range(count)]
    return list(zip(bounds, [*bounds[1:], size_bytes], strict=True))


def shuffle_pieces(num_pieces: int, *, seed: int, epoch: int, stream: int) -> list[int]:
    """The order in which a stream reads the pieces 0 … `num_pieces` − 1 of its shards (one shard after another)."""
    return _permutation(num_pieces, seed, _PIECES, epoch, stream)


def cut_blocks(sizes: Sequence[int], *, shuffle_bytes: int) -> list[range]:
    """The pieces of one stream and epoch, of `sizes` bytes, in blocks that are shuffled together.

    A block is as many pieces as are needed to reach its bytes: one piece at first, so that the first sample does not
    wait for a full buffer, then twice as many bytes each time, up to `shuffle_bytes`.
    """
    blocks: list[range] = []
    start, held, wanted = 0, 0, min(1, shuffle_bytes)
    for number, size in enumerate(sizes):
        held += size
        if held >= wanted:
            blocks.append(range(start, number + 1))
            start, held, wanted = number + 1, 0, min(2 * max(held, wanted), shuffle_bytes)
    if start < len(sizes):
        blocks.append(range(start, len(sizes)))
    return blocks


def shuffle_block(num_samples: int, *, seed: int, epoch: int, stream: int, block: int) -> list[int]:
    """The order in which the samples 0 … `num_samples` − 1 of a block (its shards one after another) are taken."""
    return _permutation(num_samples, seed, _SHUFFLE, epoch, stream, block)


def next_source(shares: Sequence[int], drawn: Sequence[int]) -> int:
    """The source of the next row of a mixture, of which `drawn` rows came from each: the one furthest behind its share.

    That is the greatest w·(n + 1) − drawn with the weights w = share / sum of shares, for the n-th row, and the first
    of equals. In whole numbers: rounding decides nothing, however many rows there are.
    """
    row, total = sum(drawn) + 1, sum(shares)
    return max(range(len(shares)), key=lambda source: shares[source] * row - drawn[source] * total)


def source_starts(shares: Sequence[int], *, num_streams: int) -> list[tuple[int, ...]]:
    """For each stream, how many rows of each source come before its first one in the order that `next_source` gives.

    All streams follow that order, each from another place of its period on. From the same place they would all take a
    row of the rare source at once, and the other batches would have none of it.
    """
    period = min(sum(shares), _LONGEST_PERIOD)
    starts, drawn = [], [0] * len(shares)
    for stream in range(num_streams):
        while sum(drawn) < stream * period // num_streams:
            drawn[next_source(shares, drawn)] += 1
        starts.append(tuple(drawn))
    return starts
