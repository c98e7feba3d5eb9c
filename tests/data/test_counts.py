"""When so much is skipped that a run must stop."""

from __future__ import annotations

import pickle

import pytest

from fewstep.data.counts import SampleCounts
from fewstep.data.pieces import CUT_SHORT, MISSING
from fewstep.errors import DataError


def lose(counts: SampleCounts, shard: str, samples: int, **more: int) -> None:
    counts.seen += samples
    counts.lose(shard, MISSING, "gone", samples=samples, **more)


def test_losses_are_held_against_the_whole_data_however_early_they_come() -> None:
    counts = SampleCounts(0.05, dataset_samples=10_000)
    lose(counts, "a", 500)
    with pytest.raises(DataError, match=r"501 of the 10000 of the data are lost, where max_bad_share allows 0\.05"):
        lose(counts, "b", 1)


def test_by_bytes_where_nobody_has_counted() -> None:
    counts = SampleCounts(0.05, dataset_bytes=1_000_000)
    lose(counts, "a", 1, size_bytes=50_000)
    with pytest.raises(DataError, match="those of 60,000 of the 1,000,000 bytes of the data are lost"):
        lose(counts, "b", 1, size_bytes=10_000)


def test_what_has_no_bytes_is_held_against_those_seen() -> None:
    counts = SampleCounts(0.05, dataset_bytes=1_000_000, seen=95)
    for number in range(4):
        lose(counts, f"empty-{number}", 1)
    counts.seen += 1
    lose(counts, "empty-4", 1)
    with pytest.raises(DataError, match="6 of the 102 seen so far are lost"):
        lose(counts, "empty-5", 1)


def test_each_epoch_is_judged_anew() -> None:
    """Shards are dealt anew in each, so that over many a worker meets all that is lost."""
    counts = SampleCounts(0.05, dataset_samples=1000, is_part=True)
    for epoch in range(10):
        for number in range(2):
            lose(counts, f"{epoch}-{number}", 20, epoch=epoch)
    assert counts.skipped == {MISSING: 400}
    lose(counts, "late", 100, epoch=3)  # of a stream that is behind
    with pytest.raises(DataError, match="60 of the 1000 of this worker's share are lost"):
        lose(counts, "9-2", 20, epoch=9)


def test_one_shard_is_allowed_where_shards_were_dealt_to_many() -> None:
    counts = SampleCounts(0.05, dataset_samples=300, is_part=True)
    for start in range(0, 100, 10):
        lose(counts, "a", 10, start=start)
    with pytest.raises(DataError, match="110 of the 300 of this worker's share are lost"):
        lose(counts, "b", 10)


@pytest.mark.parametrize("known", [{"dataset_samples": 100_000}, {"dataset_bytes": 100_000_000}])
def test_what_was_counted_elsewhere_is_judged_alike(known: dict[str, int]) -> None:
    here, there = SampleCounts(0.05, **known), SampleCounts(0.05, **known)
    here.seen = 700
    lose(here, "a", 300, size_bytes=300_000)
    there.add(1000, {MISSING: 300}, {}, shard="a", lost_bytes=here.bytes_lost_of("a"))
    assert (there.seen, there.skipped, there.shards) == (here.seen, here.skipped, here.shards)
    with pytest.raises(DataError, match=r"× shard cut short.*; in b, a\. Mend"):
        there.add(6000, {CUT_SHORT: 6000}, {}, shard="b", lost_bytes=6_000_000)


def test_runs_that_are_stopped_again_and_again_are_judged_by_what_they_saw() -> None:
    """A tenth of an epoch a life, and a fifth of all shards is gone: never 5 % of the data in one life."""
    counts = SampleCounts(0.05, dataset_samples=1_000_000, shuffled=True)
    for number in range(19):
        counts.seen += 400  # of four heaps that are there
        lose(counts, f"gone-{number}", 100)
    counts.seen += 400
    with pytest.raises(DataError, match=r"2000 of the 10000 seen so far are lost, in 20 shards, where max_bad_share"):
        lose(counts, "gone-19", 100)
    fewer = SampleCounts(0.05, dataset_samples=1_000_000, shuffled=True)
    for number in range(200):  # one in twenty-five
        fewer.seen += 2400
        lose(fewer, f"gone-{number}", 100)


def test_a_run_of_lost_shards_in_an_ordered_pass_is_held_against_the_whole() -> None:
    counts = SampleCounts(0.05, dataset_samples=1_000_000)
    counts.seen = 88_000
    for number in range(12):
        lose(counts, f"gone-{number}", 1000)


def test_what_travels_with_a_batch_does_not_grow_with_the_shards() -> None:
    counts = SampleCounts(1.0, dataset_samples=10_000_000, source="laion")
    for number in range(2000):
        counts.seen += 1
        counts.skip(f"s3://bucket/{number}.tar", "broken picture", "")
        lose(counts, f"s3://bucket/{number}.tar", 1)
    totals = counts.totals()
    assert totals.by_reason() == counts.by_reason() == {"laion: broken picture": 2000, f"laion: {MISSING}": 2000}
    assert len(pickle.dumps(totals)) < 1000
