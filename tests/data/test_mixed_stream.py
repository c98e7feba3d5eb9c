"""Batches from a mixture: its shares, exact resume with any number of workers and processes, and what goes wrong."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.data.mixture import MixedShards, Mixture, Source, list_shards, named_sources
from fewstep.data.shards import read_index, write_shards
from fewstep.data.stream import Batch, ShardStream, StreamSettings
from fewstep.errors import CheckpointError, DataError
from fewstep.storage import Storage, StorageSettings
from fewstep.train.checkpoint import merge_streams
from stream_samples import decode, make_samples

LOCAL = Storage(StorageSettings())

#: Samples of the sources; broken ones in the small source.
SIZES = {"big": 160, "small": 24, "third": 50}
WEIGHTS = {"big": 5, "small": 2, "third": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sources")
    for name, count in SIZES.items():
        samples = [{**each, "txt": f"{name} {n}".encode()} for n, each in enumerate(make_samples(count))]
        if name == "small":
            del samples[3]["txt"]
            samples[17]["png"] = b"broken"
        write_shards(samples, str(root / name), samples_per_shard=count // 8, storage=LOCAL)
    return root


def mixed(folder: Path, weights: dict[str, float] = WEIGHTS) -> MixedShards:
    sources = [Source(uri=str(folder / name), weight=weight) for name, weight in weights.items()]
    return list_shards(Mixture(named_sources(sources)), storage=LOCAL)


def make_stream(shards: MixedShards, **changes: Any) -> ShardStream:
    settings = {"num_streams": 4, "shuffle_bytes": 25_000, "max_bad_share": 1.0, "piece_bytes": 4096}
    values: dict[str, Any] = {"global_batch_size": 16, "seed": 5, "decode": decode}
    for name, value in changes.items():
        (settings if name in StreamSettings.model_fields else values)[name] = value
    return ShardStream(shards, storage=LOCAL, settings=StreamSettings.model_validate(settings), **values)


def take(stream: ShardStream, count: int) -> list[Batch]:
    with stream:
        return list(itertools.islice(stream, count))


def by_source(texts: list[str]) -> dict[str, int]:
    return {name: sum(text.startswith(name) for text in texts) for name in SIZES}


def merged(*workers: list[Batch]) -> list[dict[int, str]]:
    """The global batches, as {row: caption}, from those of all workers."""
    return [
        dict(sorted((row, text) for batch in batches for row, text in zip(batch.rows, batch.data["text"], strict=True)))
        for batches in zip(*workers, strict=True)
    ]


def test_batches_hold_the_shares_at_every_step(folder: Path) -> None:
    seen: list[str] = []
    for batch in take(make_stream(mixed(folder)), 60):
        seen += batch.data["text"]
        drawn = by_source(seen)
        assert batch.drawn == drawn
        assert all(abs(drawn[name] - len(seen) * WEIGHTS[name] / 8) <= 4 for name in SIZES)  # one for each stream
    assert batch.state["sources"] == [["big", 5], ["small", 2], ["third", 1]]
    positions = batch.state["streams"]["0"]
    assert positions[1][0] > positions[0][0], "the small source is in a later epoch"
    assert [sum(stream[n][3] for stream in batch.state["streams"].values()) for n in range(3)] == list(drawn.values())
    assert json.loads(json.dumps(batch.state)) == batch.state


def test_each_source_gives_each_sample_once_an_epoch_in_an_order_of_its_own(folder: Path) -> None:
    seen = [text for batch in take(make_stream(mixed(folder)), 16) for text in batch.data["text"]]
    big = [text for text in seen if text.startswith("big")]
    assert len(set(big)) == len(big) == SIZES["big"]
    equal = Mixture(named_sources([Source(uri=str(folder / "third"), name=name) for name in ("a", "b")]))
    rows = [text for batch in take(make_stream(list_shards(equal, storage=LOCAL)), 4) for text in batch.data["text"]]
    assert rows[::2] != rows[1::2], "sources of as many shards are not in step"


@pytest.mark.parametrize("weight", [1, 7.5])
def test_a_list_of_one_gives_the_batches_of_its_uri(folder: Path, weight: float) -> None:
    alone = take(make_stream(mixed(folder, {"small": weight})), 20)
    wanted = take(make_stream(read_index(str(folder / "small"), storage=LOCAL)), 20)
    assert [batch.data["text"] for batch in alone] == [batch.data["text"] for batch in wanted]
    assert [batch.state for batch in alone] == [batch.state for batch in wanted]
    assert [batch.counts for batch in alone] == [batch.counts for batch in wanted]
    assert all(len(position) == 3 for position in alone[-1].state["streams"].values())
    assert alone[-1].drawn == {}


def test_resume_at_any_step_is_exact_with_any_number_of_workers(folder: Path) -> None:
    """Over several epochs of the small source, with broken samples in it, in the middle of pieces."""
    shards = mixed(folder)
    wanted = take(make_stream(shards), 52)
    assert wanted[-1].state["streams"]["0"][1][0] >= 4
    assert wanted[-1].state["streams"]["0"][0][0] >= 1
    for step in random.Random(2).sample(range(51), 40):
        world_size = (1, 2, 3, 4)[step % 4]
        streams = [make_stream(shards, rank=rank, world_size=world_size) for rank in range(world_size)]
        for stream in streams:
            stream.load_state(json.loads(json.dumps(wanted[step].state)))
        taken = [take(stream, min(3, 51 - step)) for stream in streams]
        assert merged(*taken) == merged(wanted[step + 1 : step + 4])
        last, after = [batches[-1] for batches in taken], wanted[min(step + 3, 51)]
        assert merge_streams([batch.state for batch in last]) == after.state
        assert {name: sum(batch.drawn[name] for batch in last) for name in SIZES} == after.drawn


@pytest.mark.slow
def test_one_two_four_then_three_processes_give_the_same_batches(folder: Path) -> None:
    shards = mixed(folder)
    wanted = take(make_stream(shards), 28)
    got: list[Batch] = []
    for processes in (1, 2, 4, 3):
        stream = make_stream(shards, loader_processes=processes)
        if got:
            stream.load_state(json.loads(json.dumps(got[-1].state)))
        got += take(stream, 7)
    assert [batch.rows for batch in got] == [batch.rows for batch in wanted]
    assert [batch.state for batch in got] == [batch.state for batch in wanted]
    assert [batch.drawn for batch in got] == [batch.drawn for batch in wanted]
    assert all(torch.equal(a.data["pixels"], b.data["pixels"]) for a, b in zip(got, wanted, strict=True))
    assert not multiprocessing.active_children()


def test_what_is_skipped_is_counted_for_its_source(folder: Path) -> None:
    counts = take(make_stream(mixed(folder)), 30)[-1].counts
    assert set(counts) == {"small: no caption", "small: broken image"}
    with pytest.raises(DataError, match=r"Too many samples of the source small cannot be used"):
        take(make_stream(mixed(folder), max_bad_share=0.05), 300)


def test_a_rotten_source_does_not_hide_behind_a_big_one(folder: Path, tmp_path: Path) -> None:
    samples = [{**each, "png": b"broken"} for each in make_samples(40)]
    write_shards(samples, str(tmp_path / "rotten"), samples_per_shard=10, storage=LOCAL)
    sources = [Source(uri=str(folder / "big"), weight=1000), Source(uri=str(tmp_path / "rotten"))]
    shards = list_shards(Mixture(named_sources(sources)), storage=LOCAL)
    with pytest.raises(DataError, match=r"Stream \d found no usable sample of the source rotten in a whole epoch"):
        take(make_stream(shards), 300)


def test_the_shuffle_buffer_is_shared_by_weight(folder: Path) -> None:
    """The blocks of each source reach their share of the bytes, and hold a piece at least."""
    shards = mixed(folder, {"big": 3, "small": 1e-6})
    order = make_stream(shards, shuffle_bytes=40_000)._reader._order
    sizes = [[sum(piece.end - piece.start for piece in block) for block in of.blocks(0, 0)] for of in order.orders]
    assert 36_000 < max(sizes[0]) < 40_000 + 8192
    assert 0 < max(sizes[1]) <= 8192


def test_a_state_of_other_sources_or_weights_is_refused(folder: Path) -> None:
    state = take(make_stream(mixed(folder)), 2)[-1].state
    more = r"Sources and weights must stay as they were"
    with pytest.raises(
        CheckpointError, match=r"big \(share 5\), .*and this run has the sources big \(share 4\).*" + more
    ):
        make_stream(mixed(folder, {**WEIGHTS, "big": 4})).load_state(state)
    make_stream(mixed(folder, {name: 10 * weight for name, weight in WEIGHTS.items()})).load_state(state)
    with pytest.raises(CheckpointError, match=r"of the sources .*and this run has a single source.*" + more):
        make_stream(mixed(folder, {"big": 1})).load_state(state)
    single = take(make_stream(mixed(folder, {"big": 1})), 2)[-1].state
    with pytest.raises(CheckpointError, match=r"of a single source, and this run has the sources.*" + more):
        make_stream(mixed(folder)).load_state(single)
    state["streams"]["0"] = state["streams"]["0"][:2]
    with pytest.raises(CheckpointError, match=r"stream 0 is .* rows of 3 sources: it is damaged"):
        make_stream(mixed(folder)).load_state(state)


def test_a_source_with_too_few_shards_is_named(folder: Path, tmp_path: Path) -> None:
    write_shards(make_samples(20), str(tmp_path / "few"), samples_per_shard=10, storage=LOCAL)
    sources = [Source(uri=str(folder / "big")), Source(uri=str(tmp_path / "few"))]
    with pytest.raises(DataError, match="There are 2 shards in the source few for 4 canonical streams"):
        make_stream(list_shards(Mixture(named_sources(sources)), storage=LOCAL))
