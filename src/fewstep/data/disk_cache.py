"""Keeps pieces of shards on the local disk, below a size, for the next epoch and the next run."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from fewstep.data.shards import Shard

logger = logging.getLogger(__name__)

_SUFFIX = ".piece"
_COUNT_AGAIN_AFTER = 256  # writes; other processes write too


class DiskCache:
    """Files of one piece each, named by what they hold, so that shards written again are other files.

    Any number of processes of a machine may share the folder. When it is full, files that no run has used since this
    one began make room, the longest unused first; what this run itself has read stays: an epoch visits everything
    once, where throwing out the oldest would never leave anything of use. A disk that is full or broken makes the
    cache end, with a warning, and nothing else.

    Args:
        folder: made if it is missing.
        size_bytes: limit of all files together. Processes that write at the same moment may exceed it by a piece each.
    """

    def __init__(self, folder: Path, *, size_bytes: int) -> None:
        self._folder, self._limit_bytes = folder, size_bytes
        self._lock = threading.Lock()
        self._on = size_bytes > 0
        self._held_bytes, self._writes = 0, 0
        self._full = False  # nothing here can make room
        self._began = 0.0
        if self._on:
            with self._may_fail():
                folder.mkdir(parents=True, exist_ok=True)
                marker = folder / f".began.{os.getpid()}"
                marker.touch()  # by the clock of the disk, which is that of the files
                self._began = marker.stat().st_mtime
                marker.unlink()
                self._count()

    def get(self, shard: Shard, start: int, end: int) -> bytes | None:
        """Return the bytes that were kept for a piece, or None."""
        if not self._on:
            return None
        path = self._path(shard, start, end)
        try:
            data = path.read_bytes()
            os.utime(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._end(error)
            return None
        return data

    def put(self, shard: Shard, start: int, end: int, data: bytes | bytearray) -> None:
        """Keep the bytes of a piece, if there is room."""
        if not self._on or not self._make_room(len(data)):
            return
        path = self._path(shard, start, end)
        partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
        with self._may_fail():
            try:
                path.parent.mkdir(exist_ok=True)
                partial.write_bytes(data)
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
            with self._lock:
                self._held_bytes += len(data)

    def _path(self, shard: Shard, start: int, end: int) -> Path:
        what = f"{shard.uri}\n{shard.fingerprint}\n{shard.size_bytes}\n{start}\n{end}"
        name = hashlib.sha256(what.encode()).hexdigest()
        return self._folder / name[:2] / f"{name[2:]}{_SUFFIX}"

    def _make_room(self, size_bytes: int) -> bool:
        fits = False
        with self._lock, self._may_fail():
            self._writes += 1
            if self._writes % _COUNT_AGAIN_AFTER == 0:
                self._count()
            if self._held_bytes + size_bytes > self._limit_bytes and not self._full:
                self._remove_unused(size_bytes)
            fits = self._held_bytes + size_bytes <= self._limit_bytes
        return fits

    def _count(self) -> None:
        self._held_bytes = sum(size for _, size, _ in self._files())

    def _remove_unused(self, size_bytes: int) -> None:
        old = sorted(entry for entry in self._files() if entry[0] < self._began)
        for _, size, path in old:
            if self._held_bytes + size_bytes <= self._limit_bytes:
                return
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
            self._held_bytes -= size
        self._full = True

    def _files(self) -> list[tuple[float, int, Path]]:
        found = []
        for path in self._folder.glob(f"??/*{_SUFFIX}"):
            with contextlib.suppress(FileNotFoundError):  # another process made room
                facts = path.stat()
                found.append((facts.st_mtime, facts.st_size, path))
        return found

    @contextlib.contextmanager
    def _may_fail(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._end(error)

    def _end(self, error: OSError) -> None:
        if self._on:
            self._on = False
            logger.warning(
                "%s: the disk cache of shards is off from here on (%s). Shards are read from the store each time.",
                self._folder, error.strerror or error,
            )  # fmt: skip
