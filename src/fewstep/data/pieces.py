"""Reads pieces of shards from the store, and says what was lost where a shard is damaged or missing."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Protocol

from fewstep.data.disk_cache import DiskCache
from fewstep.data.sample import Bytes
from fewstep.data.shards import Shard
from fewstep.data.tar_piece import LEAD_BYTES, PieceContent, RawSample, parse_piece, parse_sample
from fewstep.errors import DataError
from fewstep.storage import ObjectNotFoundError, Storage

CUT_SHORT = "shard cut short"
MISSING = "shard missing"

_FIRST_TAIL_BYTES = 1 << 16
_LEAST_TAIL_BYTES = 1 << 12


@dataclass(frozen=True)
class LoadedPiece:
    """The samples of a piece, and what is missing of it.

    Attributes:
        samples: in the order of the shard.
        size_bytes: bytes held in memory.
        lost: samples that are missing: exact for a whole shard whose number of samples is known, otherwise by the
            bytes that could not be read, and 1 where the number in the shard is not known.
        lost_bytes: bytes of the shard that could not be read.
        reason: CUT_SHORT or MISSING, where samples are lost.
        detail: what is wrong, in words.
    """

    samples: list[RawSample]
    size_bytes: int
    lost: int = 0
    lost_bytes: int = 0
    reason: str = ""
    detail: str = ""


class PieceSource(Protocol):
    """Where pieces come from."""

    def load(self, shard: Shard, start: int, end: int) -> LoadedPiece: ...

    def load_sample(self, shard: Shard, start: int, end: int) -> LoadedPiece: ...


class PieceReader:
    """A PieceSource over the store; thread-safe.

    A connection that breaks, a busy server and a silent one are tried again by the storage; what is wrong with the
    object itself (missing, cut short, damaged) is said in the piece, and for the caller to judge.

    Args:
        storage: the store.
        disk_cache: keeps what was read on the local disk.
    """

    def __init__(self, storage: Storage, *, disk_cache: DiskCache | None = None) -> None:
        self._storage, self._disk = storage, disk_cache
        self._tail_bytes = _FIRST_TAIL_BYTES

    def load(self, shard: Shard, start: int, end: int) -> LoadedPiece:
        """Return the piece `start` to `end` (in bytes) of a shard.

        Raises:
            DataError: the shard is not the one that was listed, or its names clash.
            StorageError: the store does not answer.
        """
        if start >= end:  # a shard of no bytes, as a writer that was killed leaves it
            return LoadedPiece([], 0, shard.num_samples or 1, 0, CUT_SHORT, "it is empty")
        base = max(0, start - LEAD_BYTES)
        kept = self._disk.get(shard, start, end) if self._disk is not None else None
        if kept is not None:
            content = parse_piece(kept, base=base, start=start, end=end, size_bytes=shard.size_bytes)
            if not content.needed and content.damage is None:
                return self._loaded(shard, start, end, kept, content)
        data = memoryview(b"")
        wanted = end if end == shard.size_bytes else min(end + self._tail_bytes, shard.size_bytes)
        while True:
            try:
                part = self._storage.read_range(shard.uri, base + len(data), wanted, etag=shard.etag or None)
            except ObjectNotFoundError as error:
                return LoadedPiece([], 0, _share(shard, start, end), end - start, MISSING, str(error))
            data = memoryview(bytearray().join((data, part.data))) if data else part.data
            size_bytes = part.size_bytes
            _check_size(shard, size_bytes)
            if start >= size_bytes:
                why = f"it ends before byte {start} of {shard.size_bytes}"
                return LoadedPiece([], 0, _share(shard, start, end), end - start, CUT_SHORT, why)
            content = parse_piece(data, base=base, start=start, end=min(end, size_bytes), size_bytes=size_bytes)
            if not content.needed:
                break
            wanted = min(content.needed + self._tail_bytes, size_bytes)
        if content.samples:
            # The next piece's tail is about a sample longer than the piece; a guess too low costs one more request.
            self._tail_bytes = max(_LEAST_TAIL_BYTES, 2 * (end - start) // len(content.samples))
        content.lost_bytes += end - min(end, size_bytes)
        if self._disk is not None and content.damage is None:
            self._disk.put(shard, start, end, data)
        return self._loaded(shard, start, end, data, content)

    def load_sample(self, shard: Shard, start: int, end: int) -> LoadedPiece:
        """Return the one sample at the bytes `start` to `end` of a shard, or none, and why, where it is not there.

        Read from the store and kept nowhere. Raises what `load` raises.
        """
        try:
            part = self._storage.read_range(shard.uri, start, end, etag=shard.etag or None)
        except ObjectNotFoundError as error:
            return LoadedPiece([], 0, 1, end - start, MISSING, str(error))
        _check_size(shard, part.size_bytes)
        sample = parse_sample(part.data, start=start) if len(part.data) == end - start else None
        if sample is None:
            return LoadedPiece([], 0, 1, end - start, CUT_SHORT, f"no whole sample at the bytes {start} to {end}")
        return LoadedPiece([sample], len(part.data))

    def _loaded(self, shard: Shard, start: int, end: int, data: Bytes, content: PieceContent) -> LoadedPiece:
        if content.is_v7 and (start, end) != (0, shard.size_bytes):
            raise DataError(
                f"{shard.uri} is a tar of the old V7 format, whose samples cannot be found from the middle on: write "
                "it again in another, as `tar --format=ustar` does"
            )
        found = len(content.samples)
        detail = content.damage or ""
        if (start, end) == (0, shard.size_bytes) and shard.num_samples is not None:
            lost = shard.num_samples - found
            detail = detail or f"{found} of {shard.num_samples} samples"
            content.lost_bytes = max(content.lost_bytes, lost * shard.size_bytes // max(1, shard.num_samples))
            if lost < 0:
                raise DataError(
                    f"{shard.uri} holds {found} samples but its index says {shard.num_samples}. Write the index again."
                )
        else:
            lost = _lost(shard, content.lost_bytes) if content.damage is not None or content.lost_bytes else 0
            detail = detail or "it has fewer bytes than were listed"
        if not lost:
            return LoadedPiece(content.samples, len(data))
        return LoadedPiece(content.samples, len(data), lost, content.lost_bytes, CUT_SHORT, detail)


class PieceMemory:
    """A PieceSource that keeps whole pieces of another one, up to a number of bytes; what is in it stays.

    Epochs visit all pieces in turn, where a cache that throws out the oldest would never be of use.
    """

    def __init__(self, source: PieceSource, *, size_bytes: int) -> None:
        self._source, self._left_bytes = source, size_bytes
        self._kept: dict[tuple[str, int], LoadedPiece] = {}
        self._lock = threading.Lock()

    def load(self, shard: Shard, start: int, end: int) -> LoadedPiece:
        """Return the piece, from memory or from the source; raises what that raises."""
        place = (shard.uri, start)
        kept = self._kept.get(place)
        if kept is not None:
            return kept
        loaded = self._source.load(shard, start, end)
        with self._lock:
            if loaded.size_bytes <= self._left_bytes and place not in self._kept:
                self._left_bytes -= loaded.size_bytes
                self._kept[place] = loaded
        return loaded

    def load_sample(self, shard: Shard, start: int, end: int) -> LoadedPiece:
        """Return the sample of the source; raises what that raises."""
        return self._source.load_sample(shard, start, end)


def _check_size(shard: Shard, size_bytes: int) -> None:
    if size_bytes > shard.size_bytes:
        raise DataError(
            f"{shard.uri} has {size_bytes} bytes, but the list of shards says {shard.size_bytes}: it was written "
            "again. Write its index again, or list the shards anew"
        )


def _share(shard: Shard, start: int, end: int) -> int:
    """How many samples a piece should have, by its bytes; over all pieces of a shard these are its samples."""
    if shard.num_samples is None:
        return 1
    before, after = (shard.num_samples * place // max(1, shard.size_bytes) for place in (start, end))
    return after - before


def _lost(shard: Shard, lost_bytes: int) -> int:
    """How many samples lie in so many bytes of a shard, by its mean."""
    return max(1, round((shard.num_samples or 0) * lost_bytes / max(1, shard.size_bytes)))
