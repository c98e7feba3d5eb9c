"""Shards on the local disk: layout, determinism, index, damage."""

from __future__ import annotations

import io
import json
import logging
import tarfile
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import webdataset

from fewstep.data.counts import SampleCounts
from fewstep.data.sample import BadSampleError
from fewstep.data.shards import read_index, write_metadata, write_shards
from fewstep.data.source import iterate_samples
from fewstep.errors import DataError, StorageError
from fewstep.storage import ObjectInfo, Storage, StorageSettings

LOCAL = Storage(StorageSettings())


def make_samples(count: int) -> Iterator[dict[str, Any]]:
    for number in range(count):
        caption = f"caption {number}"
        yield {
            "__key__": f"{number:09d}",
            "png": b"picture %d" % number * 100,
            "txt": caption.encode(),
            "json": json.dumps({"caption": caption}).encode(),
        }


def decode_text(sample: dict[str, Any]) -> dict[str, Any]:
    if "txt" not in sample:
        raise BadSampleError("no caption")
    return {"key": sample["__key__"], "text": sample["txt"].decode()}


def test_layout_is_that_of_img2dataset(tmp_path: Path) -> None:
    index = write_shards(make_samples(7), str(tmp_path), samples_per_shard=3, storage=LOCAL)
    assert [shard.name for shard in index.shards] == ["00000.tar", "00001.tar", "00002.tar"]
    assert [shard.num_samples for shard in index.shards] == [3, 3, 1]
    with tarfile.open(tmp_path / "00002.tar") as tar:
        assert tar.getnames() == ["000000006.json", "000000006.png", "000000006.txt"]
        assert {member.mtime for member in tar} == {0}
    read = list(webdataset.WebDataset(f"{tmp_path}/00000.tar", shardshuffle=False))
    assert [sample["txt"] for sample in read] == [b"caption 0", b"caption 1", b"caption 2"]


def test_same_samples_same_bytes_and_digest(tmp_path: Path) -> None:
    one = write_shards(make_samples(7), str(tmp_path / "one"), samples_per_shard=3, storage=LOCAL)
    two = write_shards(make_samples(7), f"file://{tmp_path}/two", samples_per_shard=3, storage=LOCAL)
    for name in ("00000.tar", "00001.tar", "00002.tar", "index.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert one.digest == two.digest == read_index(str(tmp_path / "two"), storage=LOCAL).digest
    assert one.num_samples == 7
    other = write_shards(make_samples(8), str(tmp_path / "three"), samples_per_shard=3, storage=LOCAL)
    assert other.digest != one.digest


def test_writing_again_with_fewer_shards_leaves_no_old_ones(tmp_path: Path) -> None:
    write_shards(make_samples(9), str(tmp_path), samples_per_shard=1, storage=LOCAL)
    index = write_shards(make_samples(4), str(tmp_path), samples_per_shard=2, storage=LOCAL)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.tar", "00001.tar", "index.json"]
    assert read_index(str(tmp_path), storage=LOCAL) == index


def test_writing_that_was_cut_short_is_not_taken_for_a_data_set(tmp_path: Path) -> None:
    def breaks() -> Iterator[dict[str, Any]]:
        yield from make_samples(4)
        raise RuntimeError("killed")

    write_shards(make_samples(9), str(tmp_path), samples_per_shard=2, storage=LOCAL)
    with pytest.raises(RuntimeError):
        write_shards(breaks(), str(tmp_path), samples_per_shard=2, storage=LOCAL)
    with pytest.raises(DataError, match="cut short"):
        read_index(str(tmp_path), storage=LOCAL)


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        ([], "No samples"),
        ([{"__key__": "a.b", "txt": b""}], r"'a\.b' cannot be a file name"),
        ([{"__key__": "a/b.c", "txt": b""}], r"'a/b\.c' cannot be a file name"),
        ([{"__key__": "a/", "txt": b""}], "'a/' cannot be a file name"),
        ([{"__key__": "../a", "txt": b""}], r"'\.\./a' cannot be a file name"),
        ([{"__key__": "/a", "txt": b""}], "'/a' cannot be a file name"),
        ([{"__key__": "a\0b", "txt": b""}], "cannot be a file name"),
        ([{"__key__": "a\ud800", "txt": b""}], "cannot be a file name in a tar"),
        ([{"__key__": "a", "txt": b""}, {"__key__": "a", "txt": b""}], "'a' comes twice"),
        ([{"__key__": "a"}], "no members"),
        ([{"__key__": "a", "txt": "text"}], "'txt' of sample 'a' is str"),
        ([{"__key__": "a", "TXT": b""}], "lower case"),
    ],
)
def test_bad_samples_are_not_written(tmp_path: Path, samples: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(DataError, match=said):
        write_shards(samples, str(tmp_path), samples_per_shard=3, storage=LOCAL)


def test_folder_of_img2dataset_without_index(tmp_path: Path) -> None:
    write_shards(make_samples(7), str(tmp_path), samples_per_shard=3, storage=LOCAL)
    (tmp_path / "index.json").unlink()
    assert read_index(str(tmp_path), storage=LOCAL).num_samples is None
    for number, successes in enumerate([3, 3, 1]):
        (tmp_path / f"{number:05d}_stats.json").write_text(json.dumps({"count": 10, "successes": successes}))
        (tmp_path / f"{number:05d}.parquet").write_bytes(b"not read")
    index = read_index(str(tmp_path), storage=LOCAL)
    assert [shard.num_samples for shard in index.shards] == [3, 3, 1]


class ListedStorage(Storage):
    """Lists names that are nowhere, and counts how many of what it listed are held at most at any time."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(StorageSettings())
        self.names, self.held, self.held_at_most = names, 0, 0
        self.read: set[str] = set()

    def exists(self, uri: str) -> bool:
        return False

    def list(self, uri: str) -> Iterator[ObjectInfo]:
        for name in self.names:
            info = ObjectInfo(f"{uri}/{name}", 1024, f"etag of {name}")
            self.held += 1
            self.held_at_most = max(self.held, self.held_at_most)
            weakref.finalize(info, self._let_go)
            yield info

    def read_json(self, uri: str) -> Any:
        self.read.add(uri)
        if "bad" in uri:
            raise StorageError(f"read {uri}: not JSON")
        return {"successes": len(self.read)}

    def _let_go(self) -> None:
        self.held -= 1


def test_a_listing_of_many_shards_is_not_held(tmp_path: Path) -> None:
    tars = [f"{number:05d}.tar" for number in range(2500)]
    stats = [f"{number:05d}_stats.json" for number in range(0, 2500, 50)]
    storage = ListedStorage(sorted([*tars, *stats]))
    shards = read_index("s3://bucket/a", storage=storage).shards
    assert storage.held_at_most < 10
    assert [shard.uri for shard in shards] == [f"s3://bucket/a/{name}" for name in tars]
    assert [number for number, shard in enumerate(shards) if shard.num_samples] == list(range(0, 2500, 50))
    assert storage.read == {f"s3://bucket/a/{name}" for name in stats}
    assert {shard.size_bytes for shard in shards} == {1024}
    assert shards[7].etag == shards[7].fingerprint == "etag of 00007.tar"


def test_of_many_damaged_statistics_the_first_is_said() -> None:
    names = [f"{number:04d}bad{end}" for number in range(1200) for end in (".tar", "_stats.json")]
    with pytest.raises(StorageError, match=r"0000bad_stats\.json"):
        read_index("s3://bucket/a", storage=ListedStorage(names))
    with pytest.raises(DataError, match="cut short"):
        read_index("s3://bucket/a", storage=ListedStorage([*names, ".writing"]))


def test_index_that_is_missing_or_damaged_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no shards"):
        read_index(str(tmp_path), storage=LOCAL)
    write_shards(make_samples(3), str(tmp_path), samples_per_shard=3, storage=LOCAL)
    index = json.loads((tmp_path / "index.json").read_text())
    index["shards"][0]["size_bytes"] += 1
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="digest does not fit"):
        read_index(str(tmp_path), storage=LOCAL)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(StorageError, match="not JSON"):
        read_index(str(tmp_path), storage=LOCAL)


def test_metadata_is_parquet(tmp_path: Path) -> None:
    uri = str(tmp_path / "metadata.parquet")
    write_metadata([{"key": "a", "width": 64}, {"key": "b", "width": 32}], uri, storage=LOCAL)
    assert pq.read_table(uri).to_pydict() == {"key": ["a", "b"], "width": [64, 32]}
    with pytest.raises(DataError, match="no metadata rows"):
        write_metadata([], uri, storage=LOCAL)


@pytest.mark.parametrize("with_index", [True, False])
def test_a_shard_cut_at_any_byte_gives_the_samples_before_the_cut(tmp_path: Path, with_index: bool) -> None:
    """Also where tarfile sees nothing wrong: between two members, and within a header."""
    index = write_shards(make_samples(3), str(tmp_path), samples_per_shard=3, storage=LOCAL)
    whole = (tmp_path / "00000.tar").read_bytes()
    if not with_index:
        (tmp_path / "index.json").unlink()
        index = read_index(str(tmp_path), storage=LOCAL)
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        ends = [member.offset_data + member.size for member in tar]
    for size in [*range(1, len(whole), 487), *ends, *((end + 511) // 512 * 512 for end in ends)]:
        (tmp_path / "00000.tar").write_bytes(whole[:size])
        complete = sum(size >= end for end in ends[2::3])
        counts = SampleCounts(max_bad_share=1.0)
        read = list(iterate_samples(index.shards, storage=LOCAL, decode=decode_text, counts=counts))
        texts = [sample["text"] for sample in read]
        # Without an index nobody knows whether a lone first sample is whole, so it may be left out.
        wanted = {tuple(f"caption {n}" for n in range(complete))} | ({()} if complete == 1 else set())
        assert tuple(texts) in wanted, size
        if size <= ends[-1]:
            assert counts.num_skipped >= 1 or (with_index and complete == 3), size
            if with_index:
                assert len(texts) + counts.num_skipped == counts.seen == 3


def test_long_and_foreign_keys_are_written_and_read(tmp_path: Path) -> None:
    keys = ["a" * 200, "é" * 60, "folder/" * 20 + "b", "not-\udcff-utf-8"]
    write_shards(({"__key__": key, "txt": key.encode("utf-8", "replace")} for key in keys), str(tmp_path),
                 samples_per_shard=9, storage=LOCAL)  # fmt: skip
    index = read_index(str(tmp_path), storage=LOCAL)
    read = iterate_samples(index.shards, storage=LOCAL, decode=dict, counts=SampleCounts(max_bad_share=0.0))
    assert [sample["__key__"] for sample in read] == keys


def test_what_is_broken_is_counted_and_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    samples = list(make_samples(200))
    for number in (3, 5, 150):
        del samples[number]["txt"]
    index = write_shards(samples, str(tmp_path), samples_per_shard=100, storage=LOCAL)
    counts = SampleCounts(max_bad_share=0.02)
    with caplog.at_level(logging.WARNING):
        read = list(iterate_samples(index.shards, storage=LOCAL, decode=decode_text, counts=counts))
    assert len(read) == 197
    assert (counts.seen, counts.skipped) == (200, {"no caption": 3})
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert "00000.tar" in messages[0]
    assert "000000003" in messages[0]


def test_too_many_broken_samples_are_an_error(tmp_path: Path) -> None:
    samples = list(make_samples(400))
    for sample in samples[::4]:
        del sample["txt"]
    index = write_shards(samples, str(tmp_path), samples_per_shard=200, storage=LOCAL)
    counts = SampleCounts(max_bad_share=0.1)
    with pytest.raises(DataError, match=r"Too many.*× no caption; in .*00000\.tar.*max_bad_share"):
        list(iterate_samples(index.shards, storage=LOCAL, decode=decode_text, counts=counts))
    assert 100 <= counts.seen < 200


def test_a_share_within_the_limit_passes_although_it_comes_in_heaps(tmp_path: Path) -> None:
    """Half of the first of twenty shards is lost: 2.5 % of the data, although half of what was seen at first."""
    index = write_shards(make_samples(2000), str(tmp_path), samples_per_shard=100, storage=LOCAL)
    path = tmp_path / "00000.tar"
    path.write_bytes(path.read_bytes()[: index.shards[0].size_bytes // 2])
    counts = SampleCounts(max_bad_share=0.05)
    read = list(iterate_samples(index.shards, storage=LOCAL, decode=decode_text, counts=counts))
    assert len(read) + counts.num_skipped == 2000
    assert 40 < counts.skipped["shard cut short"] < 60
    uncounted = [replace(shard, num_samples=None) for shard in index.shards]
    guessed = SampleCounts(max_bad_share=0.05)
    assert len(list(iterate_samples(uncounted, storage=LOCAL, decode=decode_text, counts=guessed))) == len(read)
    assert abs(guessed.skipped["shard cut short"] - counts.skipped["shard cut short"]) <= 5
    for shards in (index.shards, uncounted):
        counts = SampleCounts(max_bad_share=0.01)
        with pytest.raises(DataError, match="shard cut short"):
            list(iterate_samples(shards, storage=LOCAL, decode=decode_text, counts=counts))


def test_local_shards_without_an_index_are_known_by_their_content(tmp_path: Path) -> None:
    def digest_of(text: bytes) -> str:
        sample = {"__key__": "a", "jpg": text * 200_000, "txt": b"a"}
        write_shards([sample], str(tmp_path), samples_per_shard=1, storage=LOCAL)
        (tmp_path / "index.json").unlink()
        return read_index(str(tmp_path), storage=LOCAL).digest

    assert digest_of(b"x") == digest_of(b"x") != digest_of(b"y")


def test_keys_may_have_folders(tmp_path: Path) -> None:
    samples = [{"__key__": f"v1.5/{'x' * 90}/{number}", "txt": b"a"} for number in range(3)]
    index = write_shards(samples, str(tmp_path), samples_per_shard=3, storage=LOCAL)
    read = iterate_samples(index.shards, storage=LOCAL, decode=lambda sample: {"key": sample["__key__"]})
    assert [sample["key"] for sample in read] == [sample["__key__"] for sample in samples]


def test_a_file_that_is_no_tar_loses_all_its_samples(tmp_path: Path) -> None:
    index = write_shards(make_samples(4), str(tmp_path), samples_per_shard=2, storage=LOCAL)
    (tmp_path / "00001.tar").write_bytes(b"<html>not found</html>" * 100)
    counts = SampleCounts(max_bad_share=0.5)
    read = list(iterate_samples(index.shards, storage=LOCAL, decode=decode_text, counts=counts))
    assert len(read) == 2
    assert counts.skipped == {"shard cut short": 2}


def test_a_shard_that_is_not_the_one_of_the_index_is_an_error(tmp_path: Path) -> None:
    index = write_shards(make_samples(2), str(tmp_path), samples_per_shard=2, storage=LOCAL)
    write_shards(make_samples(40), str(tmp_path / "other"), samples_per_shard=40, storage=LOCAL)
    (tmp_path / "other" / "00000.tar").replace(tmp_path / "00000.tar")
    with pytest.raises(DataError, match=r"has \d+ bytes, but the list of shards says 10240: it was written again"):
        list(iterate_samples(index.shards, storage=LOCAL, decode=decode_text))
    shard = index.shards[0]
    write_shards(make_samples(2), str(tmp_path), samples_per_shard=2, storage=LOCAL)
    with pytest.raises(DataError, match="holds 2 samples but its index says 1"):
        list(iterate_samples([replace(shard, num_samples=1)], storage=LOCAL, decode=decode_text))


def test_an_empty_shard_and_one_that_is_shorter_but_whole_are_counted(tmp_path: Path) -> None:
    index = write_shards(make_samples(40), str(tmp_path), samples_per_shard=20, storage=LOCAL)
    write_shards(make_samples(5), str(tmp_path / "other"), samples_per_shard=5, storage=LOCAL)
    (tmp_path / "00000.tar").write_bytes(b"")
    (tmp_path / "other" / "00000.tar").replace(tmp_path / "00001.tar")
    counts = SampleCounts(max_bad_share=1.0)
    read = list(iterate_samples(index.shards, storage=LOCAL, decode=decode_text, counts=counts))
    assert len(read) == 5
    assert counts.skipped == {"shard cut short": 35}
    empty = replace(index.shards[0], size_bytes=0, num_samples=None)
    counts = SampleCounts(max_bad_share=1.0)
    assert list(iterate_samples([empty], storage=LOCAL, decode=decode_text, counts=counts)) == []
    assert counts.skipped == {"shard cut short": 1}
