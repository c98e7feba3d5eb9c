"""Samples out of pieces of a tar: each once, whatever the pieces, the tar's dialect and the damage."""

from __future__ import annotations

import io
import itertools
import random
import tarfile
from pathlib import Path
from typing import Any

import pytest
import webdataset
from webdataset.tariterators import group_by_keys, tar_file_iterator

from fewstep.data.counts import SampleCounts
from fewstep.data.pieces import PieceReader
from fewstep.data.shards import read_index
from fewstep.data.source import iterate_samples
from fewstep.data.tar_piece import LEAD_BYTES, PieceContent, parse_piece
from fewstep.errors import DataError
from fewstep.storage import Storage, StorageSettings

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "pax": tarfile.PAX_FORMAT, "gnu": tarfile.GNU_FORMAT}


def make_tar(kind: str, *, seed: int, count: int = 40) -> bytes:
    """Samples of unlike sizes and members; beside ustar with names that need the dialect's long headers."""
    draw = random.Random(seed)
    file = io.BytesIO()
    if kind == "webdataset":
        with webdataset.TarWriter(file) as writer:
            for number in range(count):
                members = {name: draw.randbytes(draw.randint(0, 5000)) for name in ("jpg", "json", "txt")}
                writer.write({"__key__": f"{number:09d}", **members})
        return file.getvalue()
    with tarfile.open(fileobj=file, mode="w", format=FORMATS[kind]) as tar:
        for number in range(count):
            long = "ä" * draw.randint(1, 80) + "x" * draw.randint(1, 90)
            key = f"folder/{number:05d}" if kind == "ustar" else f"{long}/{number:05d}"
            for name in ("JPG", "json", "txt", "seg.png")[: draw.randint(1, 4)]:
                _add(tar, f"{key}.{name}", draw.randbytes(draw.choice([0, 1, 511, 512, 513, draw.randint(0, 9000)])))
            if number % 7 == 0:
                _add(tar, "__meta__.json", b"{}")
                _add(tar, "without-extension", b"?")
    return file.getvalue()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    header = tarfile.TarInfo(name)
    header.size = len(data)
    tar.addfile(header, io.BytesIO(data))


def as_webdataset_reads(data: bytes) -> list[dict[str, Any]]:
    members = ({**member, "__url__": ""} for member in tar_file_iterator(io.BytesIO(data)))  # type: ignore[arg-type]
    return [{name: value for name, value in sample.items() if name != "__url__"} for sample in group_by_keys(members)]


def piece_of(data: bytes, start: int, end: int) -> PieceContent:
    """Reads a little beyond the end, and more where the parser asks for it."""
    base, until = max(0, start - LEAD_BYTES), min(len(data), end + 700)
    while True:
        content = parse_piece(data[base:until], base=base, start=start, end=end, size_bytes=len(data))
        if not content.needed:
            return content
        assert content.needed > until
        until = content.needed


def in_pieces(data: bytes, bounds: list[int]) -> tuple[list[dict[str, Any]], list[str]]:
    samples: list[dict[str, Any]] = []
    damage = []
    for start, end in itertools.pairwise(bounds):
        content = piece_of(data, start, end)
        samples += [{"__key__": s.key, **{n: bytes(v) for n, v in s.members.items()}} for s in content.samples]
        damage += [content.damage] if content.damage else []
    return samples, damage


def random_bounds(data: bytes, pieces: int, *, seed: int) -> list[int]:
    draw = random.Random(seed)
    return sorted({0, len(data), *(draw.randrange(len(data)) // 512 * 512 for _ in range(pieces - 1))})


@pytest.mark.parametrize("kind", ["webdataset", *FORMATS])
@pytest.mark.parametrize("pieces", [1, 2, 7, 150])
def test_pieces_together_give_each_sample_once(kind: str, pieces: int) -> None:
    for seed in range(3):
        data = make_tar(kind, seed=seed)
        samples, damage = in_pieces(data, random_bounds(data, pieces, seed=seed))
        assert samples == as_webdataset_reads(data)
        assert not damage


def test_offsets_are_those_of_the_first_header() -> None:
    data = make_tar("ustar", seed=1)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        offsets: dict[str, int] = {}
        for member in tar:
            offsets.setdefault(member.name.split(".")[0], member.offset)
    found = [sample for start in (0, 20480) for sample in piece_of(data, start, start + 20480).samples]
    assert len(found) > 5
    assert all(sample.offset == offsets[sample.key] for sample in found)


@pytest.mark.parametrize("pieces", [1, 5])
def test_damage_loses_the_samples_beside_it_alone(pieces: int) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(60):
            for name in ("jpg", "json", "txt"):
                _add(tar, f"{number:05d}.{name}", bytes([number]) * 1500)
    whole = file.getvalue()
    wanted = as_webdataset_reads(whole)
    for seed in range(20):
        data = bytearray(whole)
        begin = random.Random(seed).randrange(20_000, 200_000)
        data[begin : begin + 3000] = b"\xff" * 3000  # may hit a header, or pictures alone
        samples, damage = in_pieces(bytes(data), random_bounds(whole, pieces, seed=seed))
        keys = [sample["__key__"] for sample in samples]
        assert keys == sorted(set(keys))
        assert 57 <= len(keys) <= 60
        assert damage or len(keys) == 60
        by_key = {sample["__key__"]: sample for sample in wanted}
        differing = [sample for sample in samples if sample != by_key[sample["__key__"]]]
        assert len(differing) <= 2, "bytes inside a member are for its decoder to find"
        assert all(set(sample) == set(wanted[0]) for sample in samples)


def test_a_ruined_shard_is_not_searched_to_its_end() -> None:
    content = parse_piece(bytes(4096), base=0, start=0, end=4096, size_bytes=4096)
    assert not content.samples
    noise = random.Random(1).randbytes(1 << 20)
    content = parse_piece(noise, base=0, start=0, end=1 << 20, size_bytes=1 << 20)
    assert not content.samples
    assert content.damage == "no header at byte 0"
    assert content.lost_bytes == 1 << 20
    asked = parse_piece(
        noise, base=1 << 30, start=(1 << 30) + LEAD_BYTES, end=(1 << 30) + (1 << 20), size_bytes=1 << 40
    )
    assert asked.needed < (1 << 30) + (1 << 26)


def test_a_sample_with_two_members_of_one_name_is_counted_and_skipped(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", mode="w") as tar:
        for name, data in (("a.jpg", b"1"), ("a.JPG", b"2"), ("b.jpg", b"3"), ("c.jpg", b"4"), ("c.jpg", b"5")):
            _add(tar, name, data)
    storage, counts = Storage(StorageSettings()), SampleCounts(max_bad_share=1.0)
    shards = read_index(str(tmp_path), storage=storage).shards
    found = list(iterate_samples(shards, storage=storage, decode=dict, counts=counts))
    assert [(sample["__key__"], bytes(sample["jpg"])) for sample in found] == [("b", b"3")]
    assert (counts.seen, counts.skipped) == (3, {"two members of one name": 2})


@pytest.mark.parametrize("pieces", [1, 2, 5])
def test_a_hole_of_zeros_is_damage_and_no_end(pieces: int) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(60):
            for name in ("jpg", "json", "txt"):
                _add(tar, f"{number:05d}.{name}", bytes([number + 1]) * 1500)
    whole = file.getvalue()
    for seed in range(10):
        data = bytearray(whole)
        begin = random.Random(seed).randrange(20_000, 200_000) // 512 * 512
        data[begin : begin + 10_240] = bytes(10_240)
        samples, damage = in_pieces(bytes(data), random_bounds(whole, pieces, seed=seed))
        keys = [sample["__key__"] for sample in samples]
        assert keys == sorted(set(keys))
        assert 55 <= len(keys) < 60
        assert damage


@pytest.mark.parametrize("record", [b"0 path=a\n", b"\xff \xff\n", b"99999 path=a\n", b"-3 path=a\n"])
def test_a_damaged_pax_header_is_damage_and_no_endless_loop(record: bytes) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        _add(tar, "a.txt", b"1")
        _add(tar, "b.txt", b"1")
        _add(tar, f"{'ä' * 30}.txt", b"2")
        _add(tar, "c.txt", b"3")
    data = bytearray(file.getvalue())
    at = data.index(b" path=") // 512 * 512
    data[at : at + 512] = record.ljust(512, b"\0")
    content = piece_of(bytes(data), 0, len(data))
    assert content.damage is not None
    keys = [sample.key for sample in content.samples]
    assert {"a", "b", "c"} <= set(keys)
    assert len(keys) <= 4  # the file behind it, perhaps, by the name in its own header


def test_a_tar_of_the_v7_format_is_refused_where_it_is_read_in_pieces(tmp_path: Path) -> None:
    """Pieces that begin within it would find nothing, without a word."""
    with tarfile.open(tmp_path / "0.tar", mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(40):
            _add(tar, f"{number:03d}.txt", b"x" * 700)
    whole = bytearray((tmp_path / "0.tar").read_bytes())
    for at in range(0, 40 * 1536, 1536):
        whole[at + 257 : at + 265] = bytes(8)
        whole[at + 148 : at + 156] = b" " * 8
        whole[at + 148 : at + 156] = b"%06o\0 " % sum(whole[at : at + 512])
    (tmp_path / "0.tar").write_bytes(whole)
    with tarfile.open(tmp_path / "0.tar") as tar:
        assert len(tar.getnames()) == 40
    storage = Storage(StorageSettings())
    (shard,) = read_index(str(tmp_path), storage=storage).shards
    assert len(PieceReader(storage).load(shard, 0, shard.size_bytes).samples) == 40
    with pytest.raises(DataError, match=r"0\.tar is a tar of the old V7 format.* write it again in another"):
        PieceReader(storage).load(shard, 0, 20_000)
