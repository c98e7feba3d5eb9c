"""What each worker does of an update: the rows of all are the batch, the passes as many, and the weights add up."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from toy_training import toy_job

from fewstep.data.order import own_streams
from fewstep.errors import DataError
from fewstep.train.job import TrainJob
from fewstep.train.share import share_of


def job(*, streams: int | None, batch_size: int, grouped: bool = False, **settings: Any) -> TrainJob:
    return dataclasses.replace(toy_job(batch_size=batch_size, **settings), num_streams=streams, grouped=grouped)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 7, 8])
@pytest.mark.parametrize(
    ("streams", "batch_size", "micro", "grouped"),
    [
        (8, 16, None, False),
        (8, 48, 4, False),
        (8, 16, 1, False),
        (8, 32, 2, True),
        (8, 32, None, True),
        (None, 9, 3, False),
    ],
)
def test_the_shares_are_the_batch(
    streams: int | None, batch_size: int, micro: int | None, grouped: bool, world_size: int
) -> None:
    training = job(streams=streams, batch_size=batch_size, grouped=grouped, micro_batch_size=micro)
    shares = [share_of(training, rank=rank, world_size=world_size) for rank in range(world_size)]
    each = batch_size // (streams or batch_size)
    owned = [len(own_streams(streams or batch_size, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert [share.rows for share in shares] == [each * count for count in owned]  # what the data hands out
    assert len({len(share.passes) for share in shares}) == 1
    weights = torch.zeros(batch_size)  # of each row in the average over the workers of the losses that are added up
    first = 0
    for share in shares:
        for part in share.passes:
            rows = range(share.rows)[part.rows]
            if micro is not None:
                assert len(rows) <= micro
            if grouped:
                assert rows[0] // each == rows[-1] // each  # of one shape
            for row in rows:
                weights[first + row] += 1 / part.divisor / len(rows) / world_size
        first += share.rows
    assert first == batch_size
    assert torch.allclose(weights, torch.full((batch_size,), 1 / batch_size))


def test_equal_shares_weigh_as_their_number() -> None:
    for world_size in (1, 2, 4):
        share = share_of(job(streams=8, batch_size=48, micro_batch_size=2), rank=0, world_size=world_size)
        assert [part.divisor for part in share.passes] == [24 // world_size] * (24 // world_size)


def test_who_has_fewer_rows_makes_idle_passes() -> None:
    training = job(streams=4, batch_size=8, micro_batch_size=2)
    shares = [share_of(training, rank=rank, world_size=3) for rank in range(3)]
    assert [share.rows for share in shares] == [4, 2, 2]
    assert [[math.isinf(part.divisor) for part in share.passes] for share in shares] == [
        [False, False],
        [False, True],
        [False, True],
    ]


def test_figures_count_by_rows() -> None:
    training = job(streams=4, batch_size=8, micro_batch_size=2)
    values = {0: [1.0, 2.0], 1: [3.0, 99.0], 2: [4.0, 99.0]}  # the idle passes count for nothing
    means = [
        share_of(training, rank=rank, world_size=3).mean([{"loss": torch.tensor(value)} for value in of_rank])["loss"]
        for rank, of_rank in values.items()
    ]
    assert float(torch.stack(means).mean()) == pytest.approx((1 + 2 + 3 + 4) / 4)


def test_more_workers_than_streams_are_refused() -> None:
    with pytest.raises(DataError, match=r"toy: 5 workers cannot share 4 canonical streams: each .* at most 4"):
        share_of(job(streams=4, batch_size=8), rank=0, world_size=5)
    with pytest.raises(DataError, match="toy: 9 workers cannot share 8 rows"):
        share_of(job(streams=None, batch_size=8), rank=0, world_size=9)
