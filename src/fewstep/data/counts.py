"""Counts of what was skipped, and the judgement whether it is too much."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from fewstep.data.pieces import CUT_SHORT, MISSING
from fewstep.errors import DataError

logger = logging.getLogger(__name__)

_SEEN_BEFORE_JUDGING = 100


@dataclass
class SampleCounts:
    """How many samples were looked at, and how many were skipped, by reason and by shard.

    Too many is a DataError. Samples that cannot be used are judged from 100 seen on, by the share of those seen, with
    room for chance (three standard deviations). Samples lost with a cut shard come in heaps, so they are judged by the
    share of the whole data set, and in each epoch anew; and, as a run that is often stopped may never see so many,
    where shards are shuffled from 100 heaps on by the share of the heaps seen, with the same room. What filters leave
    out is counted apart, and not judged, unless nothing remains.

    Attributes:
        max_bad_share: what is allowed.
        dataset_samples: samples of the data set; None: not known.
        dataset_bytes: bytes of its shards; judged by where samples are not known. None: these are not known either.
        is_part: this counts a part of the streams of a data set, and these two are the part's share. One lost shard is
            then allowed in any case, as parts are dealt whole shards.
        shuffled: shards come in a random order, so that those seen stand for all.
        seen, skipped, filtered, shards: what was counted: all samples; those skipped and filtered, by reason; those
            skipped, by shard.
        source: name of the source whose samples these are, where there are several.
    """

    max_bad_share: float = 0.05
    dataset_samples: int | None = None
    dataset_bytes: int | None = None
    is_part: bool = False
    shuffled: bool = False
    seen: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    filtered: dict[str, int] = field(default_factory=dict)
    shards: dict[str, int] = field(default_factory=dict)
    source: str = ""
    _lost: dict[tuple[str, int], tuple[int, int]] = field(default_factory=dict, repr=False)
    _epoch: int = field(default=0, repr=False)
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
        self._judge_bad()

    def lose(
        self, shard: str, reason: str, detail: str, *, samples: int, size_bytes: int = 0, start: int = 0, epoch: int = 0
    ) -> None:
        """Counts samples that are missing from the piece of a shard at byte `start`; logged once a shard.

        They lay in `size_bytes` bytes, and are a guess where nobody knows how many a shard should have. `reason` is
        CUT_SHORT or MISSING.
        """
        self._count(shard, reason, detail, samples=samples)
        if epoch > self._epoch:  # the next one deals other shards
            self._epoch = epoch
            self._lost.clear()
        if epoch == self._epoch:
            self._lost[shard, start] = (samples, size_bytes)
        self._judge_lost()

    def add(
        self,
        seen: int,
        skipped: Mapping[str, int],
        filtered: Mapping[str, int],
        *,
        shard: str | None = None,
        lost_bytes: int = 0,
    ) -> None:
        """Counts what was counted elsewhere, of a shard or of several, and judges it as if it had been here.

        `lost_bytes` are those of the samples that are missing (`bytes_lost_of`).
        """
        self.seen += seen
        for counted, more in ((self.skipped, skipped), (self.filtered, filtered)):
            for reason, count in more.items():
                counted[reason] = counted.get(reason, 0) + count
        bad = sum(skipped.values())
        if shard is not None and bad:
            self.shards[shard] = self.shards.get(shard, 0) + bad
        if lost := sum(skipped.get(reason, 0) for reason in (CUT_SHORT, MISSING)):
            self._lost[shard or f"#{len(self._lost)}", 0] = (lost, lost_bytes)
            self._judge_lost()
        if bad > lost:
            self._judge_bad()

    def bytes_lost_of(self, shard: str) -> int:
        """How many bytes of a shard were lost in this epoch."""
        return sum(size_bytes for (each, _), (_, size_bytes) in self._lost.items() if each == shard)

    def finish(self) -> None:
        """Judges a whole pass, without room for chance."""
        if self.seen and sum(self.filtered.values()) + self.num_skipped >= self.seen and self.filtered:
            raise DataError(
                f"The filters leave nothing of {self.seen} samples{self.of_source}: "
                + ", ".join(f"{count} × {reason}" for reason, count in sorted(self.by_reason().items()))
                + ". Look at data.filters, and at a sample's .json for the names of its fields"
            )
        if self.num_skipped > self.max_bad_share * self.seen:
            self._refuse(f"{self.num_skipped} of the {self.seen} seen")

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

    def totals(self) -> SampleCounts:
        """A copy without the shards: what travels with every batch must not grow with their number."""
        return SampleCounts(
            self.max_bad_share, self.dataset_samples, self.dataset_bytes, self.is_part, self.shuffled, self.seen,
            dict(self.skipped), dict(self.filtered), source=self.source,
        )  # fmt: skip

    def _count(self, shard: str, reason: str, detail: str, *, samples: int) -> None:
        self.skipped[reason] = self.skipped.get(reason, 0) + samples
        self.shards[shard] = self.shards.get(shard, 0) + samples
        if (shard, reason) not in self._logged:
            self._logged.add((shard, reason))
            logger.warning("%s: skipped, %s (%s)", shard, reason, detail)

    def _judge_bad(self) -> None:
        allowed = self.max_bad_share * self.seen
        bad = self.num_skipped - self.num_lost
        if self.seen >= _SEEN_BEFORE_JUDGING and bad > allowed + 3 * math.sqrt(allowed):
            self._refuse(f"{bad} of the {self.seen} seen so far")

    def _judge_lost(self) -> None:
        heaps = len({shard for shard, _ in self._lost})
        if self.is_part and heaps < 2:
            return
        of = " of this worker's share" if self.is_part else " of the data"
        samples = sum(count for count, _ in self._lost.values())
        heaps_seen = self.seen * heaps / max(1, samples)
        allowed = self.max_bad_share * heaps_seen
        if self.shuffled and heaps_seen >= _SEEN_BEFORE_JUDGING and heaps > allowed + 3 * math.sqrt(allowed):
            self._refuse(f"{samples} of the {self.seen} seen so far are lost, in {heaps} shards")
        if self.dataset_samples is not None:
            if samples > self.max_bad_share * self.dataset_samples:
                self._refuse(f"{samples} of the {self.dataset_samples}{of} are lost")
            return
        size_bytes = sum(size_bytes for _, size_bytes in self._lost.values())
        if self.dataset_bytes and size_bytes > self.max_bad_share * self.dataset_bytes:
            self._refuse(f"those of {size_bytes:,} of the {self.dataset_bytes:,} bytes{of} are lost")
        # An empty shard, say, has no bytes that it could be judged by.
        unmeasured = sum(count for count, size_bytes in self._lost.values() if not size_bytes)
        if self.seen >= _SEEN_BEFORE_JUDGING and unmeasured > self.max_bad_share * self.seen:
            self._refuse(f"{unmeasured} of the {self.seen} seen so far are lost")

    def _refuse(self, what: str) -> None:
        reasons = ", ".join(f"{count} × {reason}" for reason, count in sorted(self.skipped.items()))
        worst = sorted(self.shards, key=lambda shard: -self.shards[shard])
        more = f" and {len(worst) - 5} more shards (the log names each)" if len(worst) > 5 else ""
        raise DataError(
            f"Too many samples{self.of_source} cannot be used: {what}, where max_bad_share allows "
            f"{self.max_bad_share:g}: {reasons}; in {', '.join(worst[:5])}{more}. Mend or remove these shards, or "
            "raise max_bad_share."
        )
