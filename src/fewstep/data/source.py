"""From one tar in the store to samples, with whatever is broken counted by reason, logged and skipped."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fewstep.data.order import cut_pieces
from fewstep.data.pieces import CUT_SHORT, MISSING, PieceReader
from fewstep.data.sample import BadSampleError, Decode, FilteredError, Sample
from fewstep.data.shards import Shard, ShardIndex
from fewstep.data.tar_piece import RawSample
from fewstep.errors import DataError
from fewstep.storage import Storage

logger = logging.getLogger(__name__)

_SEEN_BEFORE_JUDGING = 100
_LARGE = ("npy", "jpg", "jpeg", "png", "webp")
_PIECE_BYTES = 16 << 20  # of a pass through a shard from its begin to its end


@dataclass
class SampleCounts:
    """How many samples were looked at, and how many were skipped, by reason and by shard.

    Too many is a DataError. Samples that cannot be used are judged from 100 seen on, by the share of those seen, with
    room for chance (three standard deviations). Samples lost with a cut shard come in heaps, so they are judged by the
    share of the whole data set: of `dataset_samples` when that is known, otherwise of `dataset_bytes`. What filters
    leave out is counted apart, and not judged, unless nothing remains. Where there are several sources, each has counts
    of its own, with its name.
    """

    max_bad_share: float = 0.05
    dataset_samples: int | None = None
    dataset_bytes: int | None = None
    seen: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    filtered: dict[str, int] = field(default_factory=dict)
    shards: dict[str, int] = field(default_factory=dict)
    source: str = ""
    _lost: dict[tuple[str, int], tuple[int, int]] = field(default_factory=dict, repr=False)
    _logged: set[tuple[str, str]] = field(default_factory=set, repr=False)

    @property
    def num_skipped(self) -> int:
        return sum(self.skipped.values())

    @property
    def num_lost(self) -> int:
        return sum(self.skipped.get(reason, 0) for reason in (CUT_SHORT, MISSING))

    @property
    def of_source(self) -> str:
        """Which source's samples these are, in words; nothing where there is only one."""
        return f" of the source {self.source}" if self.source else ""

    def by_reason(self) -> dict[str, int]:
        """What was skipped and, with "filtered, " before the reason, what was filtered; with the source's name."""
        name = f"{self.source}: " if self.source else ""
        skipped = {f"{name}{reason}": count for reason, count in self.skipped.items()}
        return skipped | {f"filtered, {name}{reason}": count for reason, count in self.filtered.items()}

    def filter(self, reason: str) -> None:
        """Counts one sample that a filter leaves out."""
        self.filtered[reason] = self.filtered.get(reason, 0) + 1

    def skip(self, shard: str, reason: str, detail: str) -> None:
        """Counts one sample that cannot be used; says so in the log once for each shard and reason."""
        self._count(shard, reason, detail, samples=1)
        allowed = self.max_bad_share * self.seen
        bad = self.num_skipped - self.num_lost
        if self.seen >= _SEEN_BEFORE_JUDGING and bad > allowed + 3 * math.sqrt(allowed):
            self._refuse()

    def lose(self, shard: str, reason: str, detail: str, *, samples: int, size_bytes: int = 0, start: int = 0) -> None:
        """Counts samples that are missing from the piece of a shard at byte `start`; logged once a shard.

        They lay in `size_bytes` bytes, and are a guess where nobody knows how many a shard should have. `reason` is
        CUT_SHORT or MISSING. In the next epoch they count again as skipped, but not as missing.
        """
        self._count(shard, reason, detail, samples=samples)
        self._lost[shard, start] = (samples, size_bytes)
        if self.dataset_samples is not None:
            if sum(samples for samples, _ in self._lost.values()) > self.max_bad_share * self.dataset_samples:
                self._refuse()
        elif self.dataset_bytes:
            if sum(size_bytes for _, size_bytes in self._lost.values()) > self.max_bad_share * self.dataset_bytes:
                self._refuse()
        elif self.seen >= _SEEN_BEFORE_JUDGING and self.num_lost > self.max_bad_share * self.seen:
            self._refuse()

    def add(
        self, seen: int, skipped: Mapping[str, int], filtered: Mapping[str, int], *, shard: str | None = None
    ) -> None:
        """Counts what was counted elsewhere, of a shard or of several, and judges it as if it had been here."""
        self.seen += seen
        for counted, more in ((self.skipped, skipped), (self.filtered, filtered)):
            for reason, count in more.items():
                counted[reason] = counted.get(reason, 0) + count
        bad = sum(skipped.values())
        if shard is not None and bad:
            self.shards[shard] = self.shards.get(shard, 0) + bad
        if not bad or self.seen < _SEEN_BEFORE_JUDGING:
            return
        allowed = self.max_bad_share * self.seen
        lost_of = self.seen if self.dataset_samples is None else self.dataset_samples
        if (
            self.num_skipped - self.num_lost > allowed + 3 * math.sqrt(allowed)
            or self.num_lost > self.max_bad_share * lost_of
        ):
            self._refuse()

    def finish(self) -> None:
        """Judges a whole pass, without room for chance."""
        if self.seen and sum(self.filtered.values()) + self.num_skipped >= self.seen and self.filtered:
            raise DataError(
                f"The filters leave nothing of {self.seen} samples{self.of_source}: "
                + ", ".join(f"{count} × {reason}" for reason, count in sorted(self.by_reason().items()))
                + ". Look at data.filters, and at a sample's .json for the names of its fields"
            )
        if self.num_skipped > self.max_bad_share * self.seen:
            self._refuse()

    def copy(self) -> SampleCounts:
        """A copy that no longer changes with this one."""
        return replace(
            self,
            skipped=dict(self.skipped),
            filtered=dict(self.filtered),
            shards=dict(self.shards),
            _lost=dict(self._lost),
            _logged=self._logged,
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
            f"Too many samples{self.of_source} cannot be used: {self.num_skipped} of the {self.seen} seen so far, "
            f"where max_bad_share allows {self.max_bad_share:g}: {reasons}; in {', '.join(worst[:5])}{more}. Mend or "
            "remove these shards, or raise max_bad_share."
        )


def decode_sample(sample: Sample, decode: Decode, *, shard: Shard, counts: SampleCounts) -> dict[str, Any] | None:
    """The decoded sample, or None when `decode` refused it with a DataError or a filter left it out; it is counted."""
    counts.seen += 1
    try:
        return decode(sample)
    except FilteredError as error:
        counts.filter(error.reason)
        return None
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
    if counts.dataset_bytes is None:
        counts.dataset_bytes = sum(shard.size_bytes for shard in shards)
    for shard in shards:
        yield from iterate_shard(shard, storage=storage, decode=decode, counts=counts)
    counts.finish()


def iterate_shard(shard: Shard, *, storage: Storage, decode: Decode, counts: SampleCounts) -> Iterator[dict[str, Any]]:
    """The decoded samples of one shard; a part of a pass, which its caller ends with ``counts.finish()``."""
    reader = PieceReader(storage)
    found, lost, found_bytes, lost_bytes, reason, detail = 0, 0, 0, 0, "", ""
    for start, end in cut_pieces(shard.size_bytes, piece_bytes=_PIECE_BYTES):
        piece = reader.load(shard, start, end)
        found += len(piece.samples)
        lost += piece.lost
        found_bytes += sum(sample.end - sample.start for sample in piece.samples)
        lost_bytes += piece.lost_bytes
        reason, detail = reason or piece.reason, detail or piece.detail
        for sample in piece.samples:
            decoded = decode_sample(as_sample(sample), decode, shard=shard, counts=counts)
            if decoded is not None:
                yield decoded
    if shard.num_samples is not None:
        lost = shard.num_samples - found
    elif lost and found_bytes:  # as many as lie in so many bytes of the rest
        lost = max(lost, round(lost_bytes * found / found_bytes))
    if lost > 0:
        counts.seen += lost
        detail = detail or f"{found} of {shard.num_samples} samples"
        counts.lose(shard.uri, reason or CUT_SHORT, detail, samples=lost, size_bytes=lost_bytes)


def as_sample(raw: RawSample) -> Sample:
    """The sample with copies of its members, but views of pictures and arrays, which are large and copied in decoding.

    Whoever changes an array, or keeps it for long (it keeps its whole piece in memory), makes a copy.
    """
    members = {name: data if name.endswith(_LARGE) else bytearray(data) for name, data in raw.members.items()}
    return {"__key__": raw.key, **members}


def known_samples(shards: Sequence[Shard]) -> int | None:
    """Samples in all these shards, or None when that of some shard is not known."""
    return ShardIndex(tuple(shards)).num_samples
