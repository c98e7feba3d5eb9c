"""From one tar in the store to samples, with whatever is broken counted by reason, logged and skipped."""

from __future__ import annotations

import logging
import math
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO

from webdataset.tariterators import group_by_keys, tar_file_iterator

from fewstep.data.shards import Shard, ShardIndex
from fewstep.errors import DataError
from fewstep.storage import Storage

logger = logging.getLogger(__name__)

CUT_SHORT = "shard cut short"
_SEEN_BEFORE_JUDGING = 100
_ZERO_BLOCK = bytes(tarfile.BLOCKSIZE)

Sample = dict[str, Any]  # "__key__": str, and the members by extension: bytes
Decode = Callable[[Sample], dict[str, Any]]


class BadSampleError(DataError):
    """A sample that cannot be used. `reason` is a short constant text: samples are counted by it."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


@dataclass
class SampleCounts:
    """How many samples were looked at, and how many were skipped, by reason and by shard.

    Too many is a DataError. Samples that cannot be used are judged from 100 seen on, by the share of those seen, with
    room for chance (three standard deviations). Samples lost with a cut shard come in heaps, so they are judged by the
    share of the whole data set, `dataset_samples`, when that is known.
    """

    max_bad_share: float = 0.05
    dataset_samples: int | None = None
    seen: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    shards: dict[str, int] = field(default_factory=dict)
    _lost: dict[str, int] = field(default_factory=dict, repr=False)
    _logged: set[tuple[str, str]] = field(default_factory=set, repr=False)

    @property
    def num_skipped(self) -> int:
        return sum(self.skipped.values())

    def skip(self, shard: str, reason: str, detail: str) -> None:
        """Counts one sample that cannot be used; says so in the log once for each shard and reason."""
        self._count(shard, reason, detail, samples=1)
        allowed = self.max_bad_share * self.seen
        bad = self.num_skipped - self.skipped.get(CUT_SHORT, 0)
        if self.seen >= _SEEN_BEFORE_JUDGING and bad > allowed + 3 * math.sqrt(allowed):
            self._refuse()

    def lose(self, shard: str, detail: str, *, samples: int, of_shard: int) -> None:
        """Counts `samples` of the `of_shard` samples that are missing from a cut shard; logged once a shard."""
        self._count(shard, CUT_SHORT, detail, samples=samples)
        self._lost[shard] = of_shard
        if self.dataset_samples is not None:
            if sum(self._lost.values()) > self.max_bad_share * self.dataset_samples:
                self._refuse()
        elif self.seen >= _SEEN_BEFORE_JUDGING and self.skipped[CUT_SHORT] > self.max_bad_share * self.seen:
            self._refuse()

    def finish(self) -> None:
        """Judges a whole pass, without room for chance."""
        if self.num_skipped > self.max_bad_share * self.seen:
            self._refuse()

    def copy(self) -> SampleCounts:
        """A copy that no longer changes with this one."""
        return replace(
            self, skipped=dict(self.skipped), shards=dict(self.shards), _lost=dict(self._lost), _logged=self._logged
        )

    def _count(self, shard: str, reason: str, detail: str, *, samples: int) -> None:
        self.skipped[reason] = self.skipped.get(reason, 0) + samples
        self.shards[shard] = self.shards.get(shard, 0) + samples
        if (shard, reason) not in self._logged:
            self._logged.add((shard, reason))
            logger.warning("%s: skipped, %s (%s)", shard, reason, detail)

    def _refuse(self) -> None:
        reasons = ", ".join(f"{count} × {reason}" for reason, count in sorted(self.skipped.items()))
        worst = sorted(self.shards, key=lambda shard: -self.shards[shard])
        more = f" and {len(worst) - 5} more shards" if len(worst) > 5 else ""
        raise DataError(
            f"Too many samples cannot be used: {self.num_skipped} of the {self.seen} seen so far, where max_bad_share "
            f"allows {self.max_bad_share:g}: {reasons}; in {', '.join(worst[:5])}{more}. Mend or remove these shards, "
            "or raise max_bad_share."
        )


class ShardReader:
    """Iterates over the samples of one shard as they arrive from the store.

    A tar that is cut short or damaged gives the whole samples before the cut; then `cut` is the reason, otherwise None.
    Errors: StorageError when the shard cannot be read, DataError when its names clash.
    """

    def __init__(self, shard: Shard, storage: Storage) -> None:
        self._shard, self._storage = shard, storage
        self.cut: str | None = None

    def __iter__(self) -> Iterator[Sample]:
        with self._storage.open(self._shard.uri) as stream:
            tracked = _Tracked(stream, self._shard.uri)
            previous: Sample | None = None
            complete: set[str] | None = None
            for sample in self._groups(tracked):
                del sample["__url__"]
                if previous is not None:
                    complete = complete or set(previous)
                    yield previous
                previous = sample
            # After a cut nobody can say whether the last sample is whole, except that the others show its members.
            if previous is not None and (self.cut is None or set(previous) == complete):
                yield previous

    def _groups(self, tracked: _Tracked) -> Iterator[Sample]:
        try:
            yield from group_by_keys(self._members(tracked))
        except ValueError as error:
            raise DataError(f"{self._shard.uri}: {error}. Each member of a sample needs a name of its own.") from error

    def _members(self, tracked: _Tracked) -> Iterator[dict[str, Any]]:
        try:
            for member in tar_file_iterator(tracked):
                yield {**member, "__url__": self._shard.uri}
            if not tracked.ends_well():
                self.cut = "no end mark"
        except (tarfile.TarError, EOFError, zlib.error) as error:
            self.cut = str(error).split(" @ ")[0]  # webdataset adds the address


class _Tracked:
    """A stream that remembers its last bytes: tarfile takes a tar that ends between two members for a whole one."""

    def __init__(self, stream: BinaryIO, uri: str) -> None:
        self._stream, self._uri = stream, uri
        self._head, self._tail = b"", b""

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        if len(self._head) < tarfile.BLOCKSIZE:
            self._head += data[: tarfile.BLOCKSIZE - len(self._head)]
        self._tail = data[-tarfile.BLOCKSIZE :] if len(data) >= tarfile.BLOCKSIZE else (self._tail + data)[-512:]
        return data

    def ends_well(self) -> bool:
        """Whether the rest of the stream ends with tar's end mark; compressed tars have an end mark of their own."""
        while self.read(1 << 20):
            pass
        return self._head[257:262] != b"ustar" or self._tail == _ZERO_BLOCK

    def __str__(self) -> str:  # webdataset adds it to the messages of errors
        return self._uri


def decode_sample(sample: Sample, decode: Decode, *, shard: Shard, counts: SampleCounts) -> dict[str, Any] | None:
    """The decoded sample, or None when `decode` refused it with a DataError; either is counted."""
    counts.seen += 1
    try:
        return decode(dict(sample))  # a copy: the sample may stay in the cache
    except DataError as error:
        reason = error.reason if isinstance(error, BadSampleError) else str(error).split(":")[0][:80]
        counts.skip(shard.uri, reason, f"the first is {sample['__key__']}: {error}")
        return None


def iterate_samples(
    shards: Iterable[Shard], *, storage: Storage, decode: Decode, counts: SampleCounts | None = None
) -> Iterator[dict[str, Any]]:
    """One pass over all samples in the order of the shards, decoded; what is broken is counted in `counts`.

    `decode` gets ``{"__key__": key, extension: bytes, …}`` and raises BadSampleError (or another DataError) for a
    sample that cannot be used. Errors: DataError when more than ``counts.max_bad_share`` of the pass is bad.
    """
    shards = list(shards)
    counts = SampleCounts() if counts is None else counts
    if counts.dataset_samples is None:
        counts.dataset_samples = known_samples(shards)
    for shard in shards:
        yield from iterate_shard(shard, storage=storage, decode=decode, counts=counts)
    counts.finish()


def iterate_shard(shard: Shard, *, storage: Storage, decode: Decode, counts: SampleCounts) -> Iterator[dict[str, Any]]:
    """The decoded samples of one shard; a part of a pass, which its caller ends with ``counts.finish()``."""
    reader, found = ShardReader(shard, storage), 0
    for sample in reader:
        found += 1
        decoded = decode_sample(sample, decode, shard=shard, counts=counts)
        if decoded is not None:
            yield decoded
    lost = lost_samples(shard, found=found, cut=reader.cut)
    if lost:
        counts.seen += lost
        detail = reader.cut or f"{found} of {shard.num_samples} samples"
        counts.lose(shard.uri, detail, samples=lost, of_shard=lost)


def known_samples(shards: Sequence[Shard]) -> int | None:
    """Samples in all these shards, or None when that of some shard is not known."""
    return ShardIndex(tuple(shards)).num_samples


def lost_samples(shard: Shard, *, found: int, cut: str | None) -> int:
    """How many samples of the shard are missing: against its index, or 1 when it is cut and nobody counted them."""
    if shard.num_samples is None:
        return int(cut is not None)
    if found > shard.num_samples:
        raise DataError(
            f"{shard.uri} holds {found} samples but its index says {shard.num_samples}. Write the index again."
        )
    return shard.num_samples - found
