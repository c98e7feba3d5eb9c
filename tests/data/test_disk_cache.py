"""The disk cache: what it keeps, what makes room, and that a broken disk costs nothing but time."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import pytest

from fewstep.data.disk_cache import DiskCache
from fewstep.data.shards import Shard

SHARD = Shard("s3://b/0.tar", 10, 4096, "one")


def test_what_was_put_is_there_for_the_same_shard_only(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, size_bytes=10_000)
    cache.put(SHARD, 0, 4096, b"x" * 4096)
    assert DiskCache(tmp_path, size_bytes=10_000).get(SHARD, 0, 4096) == b"x" * 4096
    assert cache.get(SHARD, 0, 2048) is None
    assert cache.get(Shard("s3://b/0.tar", 10, 4096, "written again"), 0, 4096) is None
    assert not list(tmp_path.rglob(".*"))


def test_a_full_cache_keeps_what_this_run_has_and_drops_what_older_ones_left(tmp_path: Path) -> None:
    old = DiskCache(tmp_path, size_bytes=3100)
    for start in range(3):
        old.put(SHARD, start, 9, bytes(1000))
    for path in tmp_path.glob("??/*"):
        os.utime(path, (time.time() - 100, time.time() - 100))
    new = DiskCache(tmp_path, size_bytes=3100)
    assert new.get(SHARD, 0, 9) is not None  # used by this run: it stays
    for start in range(10, 15):
        new.put(SHARD, start, 9, bytes(1000))
    kept = [start for start in (*range(3), *range(10, 15)) if new.get(SHARD, start, 9) is not None]
    assert kept == [0, 10, 11]
    assert sum(path.stat().st_size for path in tmp_path.glob("??/*")) <= 3100


def test_size_zero_keeps_nothing(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "none", size_bytes=0)
    cache.put(SHARD, 0, 1, b"x")
    assert cache.get(SHARD, 0, 1) is None
    assert not (tmp_path / "none").exists()


def test_a_disk_that_fails_ends_the_cache_and_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("no folder")
    with caplog.at_level(logging.WARNING):
        cache = DiskCache(tmp_path / "file", size_bytes=1000)
        for start in range(3):
            cache.put(SHARD, start, 9, b"x")
            assert cache.get(SHARD, start, 9) is None
    assert len([record for record in caplog.records if "disk cache of shards is off" in record.getMessage()]) == 1


@pytest.mark.parametrize("size", [0, 5, 2000, 4106])
def test_a_file_that_is_not_whole_is_no_piece(tmp_path: Path, size: int) -> None:
    cache = DiskCache(tmp_path, size_bytes=10_000)
    cache.put(SHARD, 0, 4096, b"x" * 4096)
    (path,) = tmp_path.glob("??/*")
    content = path.read_bytes()
    path.write_bytes(content[:size])
    assert cache.get(SHARD, 0, 4096) is None
    assert not path.exists()
    path.write_bytes(b"y" + content[1:])
    assert cache.get(SHARD, 0, 4096) is None


def test_several_processes_keep_to_the_limit_together(tmp_path: Path) -> None:
    caches = [DiskCache(tmp_path, size_bytes=100_000) for _ in range(4)]
    for start in range(60):
        for number, cache in enumerate(caches):
            cache.put(SHARD, start, 100 + number, bytes(1000))
    assert sum(path.stat().st_size for path in tmp_path.glob("??/*")) < 110_000
