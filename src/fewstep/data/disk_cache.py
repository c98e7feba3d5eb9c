"""Keeps pieces of shards on the local disk, below a size, for the next epoch and the next run."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import struct
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

from fewstep.data.sample import Bytes
from fewstep.data.shards import Shard

logger = logging.getLogger(__name__)

_SUFFIX = ".piece"
_COUNTS = 64  # times that the files are counted while the cache fills: other processes write too
_FOOTER = struct.Struct("<QI")  # length and CRC-32 of the piece before it
_STALE_S = 3600.0


class DiskCache:
    """Files of one piece each, named by what they hold, so that shards written again are other files.

    Any number of processes of a machine may share the folder. When it is full, files that no run has used since this
    one began make room, the longest unused first; what this run itself has read stays: an epoch visits everything
    once, where throwing out the oldest would never leave anything of use. A disk that is full or broken makes the
    cache end, with a warning, and nothing else.

    Args:
        folder: made if it is missing.
        size_bytes: limit of all files together. Each process that writes may exceed it by a 64th.
    """

    def __init__(self, folder: Path, *, size_bytes: int) -> None:
        self._folder, self._limit_bytes = folder, size_bytes
        self._lock = threading.Lock()
        self._on = size_bytes > 0
        self._held_bytes, self._since_bytes = 0, 0
        self._full = False  # nothing here can make room
        self._began = 0.0
        if self._on:
            with self._may_fail():
                folder.mkdir(parents=True, exist_ok=True)
                marker = folder / f".began.{os.getpid()}"
                marker.touch()  # by the clock of the disk, which is that of the files
                self._began = marker.stat().st_mtime
                marker.unlink()
                for partial in folder.glob("??/.*"):  # of processes that were killed
                    with contextlib.suppress(FileNotFoundError):
                        if partial.stat().st_mtime < self._began - _STALE_S:
                            partial.unlink()
                self._count()

    def get(self, shard: Shard, start: int, end: int) -> bytes | None:
        """Return the bytes that were kept for a piece, or None."""
        if not self._on:
            return None
        path = self._path(shard, start, end)
        try:
            content = path.read_bytes()
            if len(content) < _FOOTER.size or _FOOTER.unpack_from(content, len(content) - _FOOTER.size) != _footer(
                content[: -_FOOTER.size]
            ):
                path.unlink()  # cut short, as by a power failure
                return None
            os.utime(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._end(error)
            return None
        return content[: -_FOOTER.size]

    def put(self, shard: Shard, start: int, end: int, data: Bytes) -> None:
        """Keep the bytes of a piece, if there is room."""
        if not self._on or not self._make_room(len(data)):
            return
        path = self._path(shard, start, end)
        partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
        with self._may_fail():
            try:
                path.parent.mkdir(exist_ok=True)
                with partial.open("wb") as file:
                    file.write(data)
                    file.write(_FOOTER.pack(*_footer(data)))
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
            with self._lock:
                self._held_bytes += len(data)
                self._since_bytes += len(data)

    def _path(self, shard: Shard, start: int, end: int) -> Path:
        what = f"{shard.uri}\n{shard.fingerprint}\n{shard.size_bytes}\n{start}\n{end}"
        name = hashlib.sha256(what.encode()).hexdigest()
        return self._folder / name[:2] / f"{name[2:]}{_SUFFIX}"

    def _make_room(self, size_bytes: int) -> bool:
        fits = False
        with self._lock, self._may_fail():
            if self._since_bytes >= self._limit_bytes / _COUNTS:
                self._count()
            if self._held_bytes + size_bytes > self._limit_bytes and not self._full:
                self._remove_unused(size_bytes)
            fits = self._held_bytes + size_bytes <= self._limit_bytes
        return fits

    def _count(self) -> None:
        self._held_bytes, self._since_bytes = sum(size for _, size, _ in self._files()), 0

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


def _footer(data: Bytes) -> tuple[int, int]:
    return len(data), zlib.crc32(data)
