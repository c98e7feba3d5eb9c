"""Batches whose groups have one shape each: what is given, what waits, and exact resume with it."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.data.mixture import MixedShards, Mixture, Source, list_shards, named_sources
from fewstep.data.part import join_batches
from fewstep.data.pieces import PieceReader
from fewstep.data.shards import read_index, write_shards
from fewstep.data.stream import Batch, ShardStream, StreamSettings
from fewstep.errors import CheckpointError, DataError
from fewstep.storage import Storage, StorageSettings
from fewstep.train.checkpoint import merge_streams
from stream_samples import decode, make_samples

LOCAL = Storage(StorageSettings())
SIZES = ((8, 8), (4, 16), (16, 4), (6, 10), (10, 6))

#: Samples of the sources; of some sizes there are few.
COUNTS = {"big": 240, "small": 56}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sources")
    for name, count in COUNTS.items():
        draw = random.Random(name)
        sizes = draw.choices(SIZES, (10, 3, 3, 2, 1), k=count)
        samples = [{**each, "txt": f"{name} {n}".encode()} for n, each in enumerate(make_samples(count, sizes=sizes))]
        if name == "small":
            del samples[3]["txt"]
            samples[17]["png"] = b"broken"
        write_shards(samples, str(root / name), samples_per_shard=count // 8, storage=LOCAL)
    return root


def mixed(folder: Path) -> MixedShards:
    sources = [Source(uri=str(folder / "big"), weight=3), Source(uri=str(folder / "small"))]
    return list_shards(Mixture(named_sources(sources)), storage=LOCAL)


def single(folder: Path) -> MixedShards:
    return MixedShards.of(read_index(str(folder / "big"), storage=LOCAL))


def make_stream(shards: MixedShards, **changes: Any) -> ShardStream:
    settings = {"num_streams": 4, "shuffle_bytes": 25_000, "max_bad_share": 1.0, "piece_bytes": 4096}
    values: dict[str, Any] = {"global_batch_size": 16, "seed": 5, "decode": decode, "group_by": "pixels"}
    for name, value in changes.items():
        (settings if name in StreamSettings.model_fields else values)[name] = value
    return ShardStream(shards, storage=LOCAL, settings=StreamSettings.model_validate(settings), **values)


def take(stream: ShardStream, count: int) -> list[Batch]:
    with stream:
        return list(itertools.islice(stream, count))


def groups(batch: Batch) -> list[list[tuple[int, ...]]]:
    shapes = [tuple(pixels.shape) for pixels in batch.data["pixels"]]
    return [shapes[start : start + 4] for start in range(0, len(shapes), 4)]


def merged(*workers: list[Batch]) -> list[dict[int, str]]:
    """The global batches, as {row: caption}, from those of all workers."""
    return [
        dict(sorted((row, text) for batch in batches for row, text in zip(batch.rows, batch.data["text"], strict=True)))
        for batches in zip(*workers, strict=True)
    ]


def same(a: Batch, b: Batch) -> bool:
    """Whether two batches are the same to the bit, with what comes after them."""
    pixels = zip(a.data["pixels"], b.data["pixels"], strict=True)
    return (a.rows, a.state, a.drawn, a.data["text"]) == (b.rows, b.state, b.drawn, b.data["text"]) and all(
        torch.equal(x, y) for x, y in pixels
    )


def test_each_group_has_one_shape_and_all_shapes_come(folder: Path) -> None:
    batches = take(make_stream(mixed(folder)), 30)
    seen: Counter[tuple[int, ...]] = Counter()
    for batch in batches:
        assert batch.rows == list(range(16))
        for group in groups(batch):
            assert len(set(group)) == 1
            seen.update(group)
    assert set(seen) == {(3, height, width) for width, height in SIZES}
    assert any(isinstance(batch.data["pixels"], list) for batch in batches)
    for state in batches[-1].state["streams"].values():
        assert len(state["waiting"]) <= len(SIZES) * 3
    assert json.loads(json.dumps(batches[-1].state)) == batches[-1].state


def test_nothing_is_lost_or_doubled_over_epochs(folder: Path) -> None:
    """What was given and what waits, together, are the samples of the ungrouped stream at the same position."""
    batches = take(make_stream(single(folder)), 45)
    state = batches[-1].state["streams"]
    assert all(each["position"][0] >= 2 for each in state.values()), "in the third epoch"
    for stream in range(4):
        given = [text for batch in batches for text in batch.data["text"][4 * stream : 4 * stream + 4]]
        alone = take(make_stream(single(folder), group_by=None, decode=only_text), 60)
        drawn = [text for batch in alone for text in batch.data["text"][4 * stream : 4 * stream + 4]]
        waiting = state[str(stream)]["waiting"]
        drawn = drawn[: len(given) + len(waiting)]
        left = Counter(drawn)
        left.subtract(given)
        assert min(left.values()) >= 0
        assert sum(left.values()) == len(waiting)


def only_text(sample: dict[str, Any]) -> dict[str, Any]:
    return {"text": sample["txt"].decode()}


def test_where_all_are_of_one_shape_groups_change_nothing(folder: Path, tmp_path: Path) -> None:
    write_shards(make_samples(64), str(tmp_path), samples_per_shard=8, storage=LOCAL)
    shards = MixedShards.of(read_index(str(tmp_path), storage=LOCAL))
    with_groups, without = take(make_stream(shards), 9), take(make_stream(shards, group_by=None), 9)
    for a, b in zip(with_groups, without, strict=True):
        assert torch.equal(a.data["pixels"], b.data["pixels"])
        assert {name: each["position"] for name, each in a.state["streams"].items()} == b.state["streams"]


@pytest.mark.parametrize("cache", [{"cache_bytes": 0}, {}, {"cache_bytes": 0, "disk_cache": True}])
@pytest.mark.parametrize("sources", [single, mixed])
def test_resume_at_any_step_is_exact_with_any_number_of_workers(
    folder: Path, tmp_path: Path, sources: Any, cache: dict[str, Any]
) -> None:
    shards = sources(folder)
    options = {**cache, "disk_cache": tmp_path} if "disk_cache" in cache else cache
    wanted = take(make_stream(shards, **options), 55)
    assert any(state["waiting"] for state in wanted[20].state["streams"].values())
    for step in random.Random(2).sample(range(53), 50 if cache else 10):
        world_size = (1, 2, 3, 4)[step % 4]
        streams = [make_stream(shards, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
        for stream in streams:
            stream.load_state(json.loads(json.dumps(wanted[step].state)))
        taken = [take(stream, min(3, 54 - step)) for stream in streams]
        expected = wanted[step + 1 : step + 4]
        assert merged(*taken) == merged(expected)
        assert merge_streams([batches[-1].state for batches in taken]) == expected[-1].state
        if world_size == 1:
            assert all(same(a, b) for a, b in zip(taken[0], expected, strict=True))
        if sources is mixed:
            given = Counter(
                text.split()[0] for batch in wanted[: step + 1 + len(expected)] for text in batch.data["text"]
            )
            drawn: Counter[str] = Counter()
            for batches in taken:
                drawn.update(batches[-1].drawn)
            assert drawn == given


@pytest.mark.slow
def test_one_two_four_then_three_processes_give_the_same_batches(folder: Path, tmp_path: Path) -> None:
    shards = mixed(folder)
    wanted = take(make_stream(shards), 28)
    got: list[Batch] = []
    for processes in (1, 2, 4, 3):
        stream = make_stream(shards, loader_processes=processes, disk_cache=tmp_path)
        if got:
            stream.load_state(json.loads(json.dumps(got[-1].state)))
        got += take(stream, 7)
    assert all(same(a, b) for a, b in zip(got, wanted, strict=True))
    assert not multiprocessing.active_children()


def _copy(folder: Path, target: Path) -> MixedShards:
    target.mkdir()
    for path in (folder / "big").iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return MixedShards.of(read_index(str(target), storage=LOCAL))


def test_what_waited_in_a_shard_that_is_gone_is_counted(folder: Path, tmp_path: Path) -> None:
    shards = _copy(folder, tmp_path / "copy")
    before = take(make_stream(shards), 9)
    waiting = [place for state in before[-1].state["streams"].values() for place in state["waiting"]]
    shard, lost = Counter(place[1] for place in waiting).most_common(1)[0]
    Path(shards.shards[0][shard].uri).unlink()
    stream = make_stream(shards, cache_bytes=0)
    stream.load_state(before[-1].state)
    (after,) = take(stream, 1)
    assert after.counts["shard missing"] >= lost
    assert all(len(set(group)) == 1 for group in groups(after))
    left = [place for state in after.state["streams"].values() for place in state["waiting"]]
    assert left
    assert all(place[1] != shard for place in left)
    strict = make_stream(shards, max_bad_share=0.0)
    strict.load_state(before[-1].state)
    with pytest.raises(DataError, match="Too many samples cannot be used"):
        take(strict, 1)


def test_one_sample_is_read_again_or_said_to_be_lost(folder: Path, tmp_path: Path) -> None:
    (shard, *_) = _copy(folder, tmp_path / "copy").shards[0]
    reader, path = PieceReader(LOCAL), Path(shard.uri)
    for sample in reader.load(shard, 0, shard.size_bytes).samples:
        again = reader.load_sample(shard, sample.start, sample.end)
        assert again.samples == [sample]
        assert not again.lost
    wrong = reader.load_sample(shard, sample.start + 512, sample.end)
    path.write_bytes(path.read_bytes()[: sample.end - 512])
    short = reader.load_sample(shard, sample.start, sample.end)
    path.write_bytes(bytes(sample.end))
    empty = reader.load_sample(shard, sample.start, sample.end)
    for lost in (wrong, short, empty):
        assert (lost.samples, lost.lost, lost.reason) == ([], 1, "shard cut short")
    path.unlink()
    assert reader.load_sample(shard, sample.start, sample.end).reason == "shard missing"


def test_states_of_other_kinds_are_refused(folder: Path) -> None:
    state = take(make_stream(single(folder)), 5)[-1].state
    plain = take(make_stream(single(folder), group_by=None, decode=only_text), 2)[-1].state
    assert all(len(position) == 3 for position in plain["streams"].values())
    with pytest.raises(CheckpointError, match=r"is not of rows in groups of one shape, and this run groups them"):
        make_stream(single(folder)).load_state(plain)
    with pytest.raises(CheckpointError, match=r"is of rows in groups of one shape, and this run groups nothing"):
        make_stream(single(folder), group_by=None).load_state(state)
    for waiting in ([[0, 1, 2]], [[0, 1, 2, "x"]], [[1, 0, 0, 512]], 7):
        damaged = {**state, "streams": {**state["streams"], "0": {**state["streams"]["0"], "waiting": waiting}}}
        with pytest.raises(CheckpointError, match=r"each sample that waits: it is damaged"):
            make_stream(single(folder)).load_state(damaged)
    damaged = {**state, "streams": {**state["streams"], "0": {**state["streams"]["0"], "waiting": [[0, 99, 0, 512]]}}}
    stream = make_stream(single(folder))
    stream.load_state(damaged)
    with pytest.raises(CheckpointError, match=r"names shard 99 in stream 0, and there are 8"):
        take(stream, 1)


def test_unlike_shapes_need_groups(folder: Path) -> None:
    with pytest.raises(DataError, match="do not fit together in 'pixels'"):
        take(make_stream(single(folder), group_by=None), 3)
    batches: list[dict[str, Any]] = [
        {"x": torch.zeros(2, 3), "k": ["a", "b"]},
        {"x": torch.zeros(2, 4), "k": ["c", "d"]},
    ]
    with pytest.raises(DataError, match="do not fit together in 'x'"):
        join_batches(batches)
    joined = join_batches(batches, grouped=True)
    assert [tuple(row.shape) for row in joined["x"]] == [(3,), (3,), (4,), (4,)]
    assert joined["k"] == ["a", "b", "c", "d"]
