"""The order of samples: complete, reproducible, and nobody's business how many workers there are."""

from __future__ import annotations

import itertools

import pytest

from fewstep.data.canonical import ShardOrder
from fewstep.data.order import (
    check_streams,
    cut_blocks,
    cut_pieces,
    deal_shards,
    own_streams,
    shuffle_block,
    shuffle_pieces,
)
from fewstep.data.shards import Shard
from fewstep.errors import DataError

SIZES = [512 * size for size in (500, 1, 700, 30, 3, 90, 20, 40, 6, 8, 1, 5)]  # of the shards, in bytes
SHARDS = tuple(Shard(f"s3://b/{number}.tar", None, size) for number, size in enumerate(SIZES))


def order_of(stream: int, *, epoch: int, seed: int) -> list[tuple[int, int, int]]:
    """(shard, start, end) of the pieces in the order in which the stream reads them."""
    order = ShardOrder(SHARDS, num_streams=4, seed=seed, piece_bytes=20_000, shuffle_bytes=60_000)
    return [(p.shard, p.start, p.end) for block in order.blocks(epoch, stream) for p in block]


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_every_byte_comes_once_an_epoch(epoch: int) -> None:
    taken = sorted(piece for stream in range(4) for piece in order_of(stream, epoch=epoch, seed=3))
    for shard, size in enumerate(SIZES):
        pieces = [(start, end) for number, start, end in taken if number == shard]
        assert pieces[0][0] == 0
        assert pieces[-1][1] == size
        assert all(before[1] == after[0] for before, after in itertools.pairwise(pieces))
        assert all(start % 512 == 0 for start, _ in pieces)
    assert len(taken) > 40


def test_pieces_are_of_about_the_size_asked_for() -> None:
    for size in (0, 1, 511, 512, 10_240, 29_000, 31_000, 1_000_000):
        pieces = cut_pieces(size, piece_bytes=20_000)
        assert pieces[0][0] == 0
        assert pieces[-1][1] == size
        if size >= 31_000:
            assert all(13_000 < end - start < 30_512 for start, end in pieces)


def test_blocks_grow_to_the_size_of_the_buffer() -> None:
    blocks = cut_blocks([10] * 40 + [500, 1, 2], shuffle_bytes=100)
    assert [len(block) for block in blocks] == [1, 2, 4, 8, 10, 10, 6, 2]
    assert [number for block in blocks for number in block] == list(range(43))
    assert [len(block) for block in cut_blocks([10] * 3, shuffle_bytes=1)] == [1, 1, 1]
    assert cut_blocks([], shuffle_bytes=100) == []


def test_order_changes_with_epoch_and_seed_and_is_the_same_again() -> None:
    first = order_of(0, epoch=0, seed=3)
    assert first == order_of(0, epoch=0, seed=3)
    assert first != order_of(0, epoch=1, seed=3)
    assert first != order_of(0, epoch=0, seed=4)


def test_samples_of_a_block_are_mixed() -> None:
    order = shuffle_block(1000, seed=0, epoch=0, stream=0, block=0)
    assert sorted(order) == list(range(1000))
    assert order != shuffle_block(1000, seed=0, epoch=0, stream=0, block=1)
    assert order != shuffle_block(1000, seed=0, epoch=0, stream=1, block=0)
    first_half = sum(number < 500 for number in order[:500])
    assert 200 < first_half < 300


def test_order_is_fixed_for_all_time() -> None:
    """A checkpoint written by an older release must go on with the same samples."""
    assert shuffle_block(8, seed=1, epoch=2, stream=3, block=4) == [1, 6, 7, 0, 4, 5, 3, 2]
    assert shuffle_pieces(6, seed=1, epoch=2, stream=3) == [1, 4, 5, 3, 2, 0]
    assert deal_shards(6, num_streams=2, seed=1, epoch=0) == [[2, 5, 3], [4, 0, 1]]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 8])
def test_workers_own_each_stream_once(world_size: int) -> None:
    owned = [stream for rank in range(world_size) for stream in own_streams(8, rank=rank, world_size=world_size)]
    assert sorted(owned) == list(range(8))


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ((3, 4, 8, 1), "3 shards for 4 canonical streams.*more shards.*at most 3"),
        ((8, 4, 8, 5), r"5 workers cannot share 4 canonical streams.*at most 4 workers"),
        ((8, 4, 10, 2), "global_batch_size 10.*Use 8 or 12"),
        ((8, 4, 2, 2), "global_batch_size 2.*Use 4 or 8"),
        ((8, 0, 2, 1), "num_streams is 0"),
    ],
)
def test_what_does_not_divide_is_said(numbers: tuple[int, int, int, int], said: str) -> None:
    num_shards, num_streams, global_batch_size, world_size = numbers
    with pytest.raises(DataError, match=said):
        check_streams(num_shards, num_streams=num_streams, global_batch_size=global_batch_size, world_size=world_size)
