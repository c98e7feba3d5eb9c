"""The order of samples: complete, reproducible, and nobody's business how many workers there are."""

from __future__ import annotations

import pytest

from fewstep.data.order import check_streams, cut_blocks, deal_shards, own_streams, shuffle_block
from fewstep.errors import DataError

COUNTS = [5, 1, 7, 3, 3, 9, 2, 4, 6, 8, 1, 5]  # samples of each shard


def order_of(stream: int, *, epoch: int, seed: int, num_streams: int = 4, shuffle_shards: int = 2) -> list[tuple]:
    """(shard, sample) in the order in which the stream gives them."""
    taken = []
    shards = deal_shards(len(COUNTS), num_streams=num_streams, seed=seed, epoch=epoch)[stream]
    for block, members in enumerate(cut_blocks(shards, shuffle_shards=shuffle_shards)):
        samples = [(shard, sample) for shard in members for sample in range(COUNTS[shard])]
        order = shuffle_block(len(samples), seed=seed, epoch=epoch, stream=stream, block=block)
        taken += [samples[number] for number in order]
    return taken


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_every_sample_comes_once_an_epoch(epoch: int) -> None:
    taken = [sample for stream in range(4) for sample in order_of(stream, epoch=epoch, seed=3)]
    assert sorted(taken) == [(shard, sample) for shard, count in enumerate(COUNTS) for sample in range(count)]


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
    assert deal_shards(6, num_streams=2, seed=1, epoch=0) == [[2, 5, 3], [4, 0, 1]]


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_workers_own_each_stream_once(world_size: int) -> None:
    owned = [stream for rank in range(world_size) for stream in own_streams(8, rank=rank, world_size=world_size)]
    assert sorted(owned) == list(range(8))


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ((3, 4, 8, 1), "3 shards for 4 canonical streams.*more shards.*at most 3"),
        ((8, 4, 8, 3), r"3 workers cannot share 4 canonical streams.*\[1, 2, 4\]"),
        ((8, 4, 10, 2), "global_batch_size 10.*Use 8 or 12"),
        ((8, 4, 2, 2), "global_batch_size 2.*Use 4 or 8"),
        ((8, 0, 2, 1), "num_streams is 0"),
    ],
)
def test_what_does_not_divide_is_said(numbers: tuple[int, int, int, int], said: str) -> None:
    num_shards, num_streams, global_batch_size, world_size = numbers
    with pytest.raises(DataError, match=said):
        check_streams(num_shards, num_streams=num_streams, global_batch_size=global_batch_size, world_size=world_size)
