"""Sources with weights: their names and shares, the order of sources, and a pass over all of them."""

from __future__ import annotations

import itertools
import pickle
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fewstep.data.mixture import (
    MixedShards,
    Mixture,
    Source,
    iterate_mixture,
    list_shards,
    named_sources,
    source_seed,
    sources_of,
)
from fewstep.data.order import next_source, source_starts
from fewstep.data.shards import write_shards
from fewstep.errors import DataError
from fewstep.storage import Storage, StorageSettings
from stream_samples import decode, make_samples

LOCAL = Storage(StorageSettings())


def mixture(*weights: float) -> Mixture:
    return Mixture(named_sources([Source(uri=f"s3://b/{n}", weight=weight) for n, weight in enumerate(weights)]))


def order_of(shares: tuple[int, ...], count: int, *, start: tuple[int, ...] | None = None) -> list[int]:
    """The sources of the first rows."""
    drawn, order = list(start or [0] * len(shares)), []
    for _ in range(count):
        order.append(next_source(shares, drawn))
        drawn[order[-1]] += 1
    return order


def test_weights_become_the_smallest_whole_shares() -> None:
    assert mixture(3, 1).shares == mixture(0.75, 0.25).shares == mixture(0.3, 0.1).shares == (3, 1)
    assert mixture(1, 2.5, 1e-3).shares == (1000, 2500, 1)
    assert mixture(0.1, 0.2, 0.3).shares == (1, 2, 3), "no rounding of floating point"


@pytest.mark.parametrize(
    ("uris", "names"),
    [
        (["s3://b/laion", "s3://b/own/"], ["laion", "own"]),
        (["s3://b/laion/train", "s3://b/own/train", "s3://b/coco"], ["laion/train", "own/train", "coco"]),
        (["s3://a/train", "s3://b/train"], ["a/train", "b/train"]),
        (["data/a+b", "../c"], ["a_b", "c"]),
    ],
)
def test_a_name_is_as_much_of_the_uri_as_tells_it_from_the_others(uris: list[str], names: list[str]) -> None:
    assert [source.name for source in named_sources([Source(uri=uri) for uri in uris])] == names


def test_names_that_are_not_different_are_refused() -> None:
    with pytest.raises(ValueError, match="2 sources, of which more than one is named 'own': give each a name"):
        named_sources([Source(uri="s3://b/x", name="own"), Source(uri="s3://b/y", name="own")])
    with pytest.raises(ValueError, match="more than one is named 'b/x'"):
        named_sources([Source(uri="s3://b/x"), Source(uri="s3://b/x")])
    twice = named_sources([Source(uri="s3://b/x"), Source(uri="s3://b/y", name="x")])
    assert [source.name for source in twice] == ["b/x", "x"]


def test_a_mixture_travels_to_workers_and_keeps_its_names_elsewhere() -> None:
    made = mixture(3, 1)
    assert pickle.loads(pickle.dumps(made)) == made
    moved = made.at(["s3://c/latents", "s3://c/others"])
    assert [source.uri for source in moved.sources] == ["s3://c/latents", "s3://c/others"]
    assert (moved.names, moved.shares) == (made.names, made.shares)
    assert [source.uri for source in sources_of("s3://b/x")] == ["s3://b/x"]


def test_the_order_of_sources_is_fixed_for_all_time() -> None:
    """A checkpoint written by an older release must go on with the same samples."""
    assert order_of((3, 1), 8) == [0, 0, 1, 0, 0, 0, 1, 0]
    assert order_of((1, 1), 4) == [0, 1, 0, 1], "the first of equals"
    assert order_of((5, 3, 2), 10) == [0, 1, 2, 0, 0, 1, 0, 2, 1, 0]
    assert source_starts((3, 1), num_streams=4) == [(0, 0), (1, 0), (2, 0), (2, 1)]
    assert source_seed(7, "own") == 4575434460452663081
    assert source_seed(7, "") == 7


@pytest.mark.parametrize("number", range(20))
def test_at_every_prefix_each_source_has_its_share(number: int) -> None:
    rng = random.Random(number)
    shares = mixture(*(rng.choice([1, 2, 5, 0.37, 30, 0.02]) for _ in range(2 + number % 4))).shares
    total, drawn = sum(shares), [0] * len(shares)
    order = order_of(shares, 3000)
    for row, source in enumerate(order, start=1):
        drawn[source] += 1
        off = [count - share * row / total for count, share in zip(drawn, shares, strict=True)]
        assert max(off) < 1
        assert min(off) > (-1 if len(shares) == 2 else -1.5)
    if total < 2500:
        assert order[:500] == order[total : total + 500], "it repeats itself"
        # Every stream follows the one order, from its own place on.
        for start in source_starts(shares, num_streams=5):
            assert order_of(shares, 200, start=start) == order[sum(start) : sum(start) + 200]


@pytest.mark.parametrize(
    ("shares", "rows"), [((3, 1), 1), ((3, 1), 2), ((99, 1), 4), ((5, 3, 2), 3), ((700, 299, 1), 8)]
)
def test_streams_do_not_draw_the_rare_source_all_at_once(shares: tuple[int, ...], rows: int) -> None:
    """Of 8 streams; batches hold what the weights say, within the rows of few streams."""
    streams = [order_of(shares, 200 * rows, start=start) for start in source_starts(shares, num_streams=8)]
    for batch in range(200):
        drawn = Counter(itertools.chain.from_iterable(stream[batch * rows : (batch + 1) * rows] for stream in streams))
        for source, share in enumerate(shares):
            assert abs(drawn[source] - 8 * rows * share / sum(shares)) <= 2


def written(folder: Path, count: int, *, name: str, **changes: Any) -> str:
    samples = [{**sample, "txt": f"{name} {n}".encode(), **changes} for n, sample in enumerate(make_samples(count))]
    write_shards(samples, str(folder / name), samples_per_shard=10, storage=LOCAL)
    return str(folder / name)


def test_a_pass_gives_all_samples_once_and_the_first_ones_by_weight(tmp_path: Path) -> None:
    uris = [written(tmp_path, 90, name="big"), written(tmp_path, 20, name="small")]
    made = Mixture(named_sources([Source(uri=uri, weight=weight) for uri, weight in zip(uris, (3, 1), strict=True)]))
    listed = list_shards(made, storage=LOCAL)
    assert (listed.names, listed.num_samples) == (("big", "small"), 110)
    read = [sample["text"] for sample in iterate_mixture(listed, storage=LOCAL, decode=decode, max_bad_share=0)]
    assert sorted(read) == sorted([f"big {n}" for n in range(90)] + [f"small {n}" for n in range(20)])
    assert Counter(text.split()[0] for text in read[:40]) == {"big": 30, "small": 10}
    assert [text for text in read if "big" in text] == [f"big {n}" for n in range(90)]


def test_a_pass_over_one_source_is_one_over_its_shards(tmp_path: Path) -> None:
    uri = written(tmp_path, 30, name="one")
    alone = Mixture((Source(uri=uri, weight=5, name="x"),))
    assert list_shards(alone, storage=LOCAL) == list_shards(uri, storage=LOCAL)
    listed = list_shards(uri, storage=LOCAL)
    assert isinstance(listed, MixedShards)
    assert listed.sources_to_json() is None
    read = iterate_mixture(listed, storage=LOCAL, decode=decode, max_bad_share=0)
    assert [sample["text"] for sample in read] == [f"one {n}" for n in range(30)]


def test_a_pass_judges_each_source_by_itself(tmp_path: Path) -> None:
    good = written(tmp_path, 300, name="good")
    rotten = written(tmp_path, 10, name="rotten", png=b"broken")
    listed = list_shards(Mixture(named_sources([Source(uri=good), Source(uri=rotten)])), storage=LOCAL)
    with pytest.raises(DataError, match=r"Too many samples of the source rotten .*: 10 of the 10 seen"):
        list(iterate_mixture(listed, storage=LOCAL, decode=decode, max_bad_share=0.1))
