"""What a data set holds: counts, sizes, captions, metadata, bad samples, and some pictures to look at."""

from __future__ import annotations

import io
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from fewstep.data.counts import SampleCounts
from fewstep.data.order import cut_pieces
from fewstep.data.pictures import EXTENSIONS, decode_picture
from fewstep.data.pieces import PieceReader
from fewstep.data.sample import Sample
from fewstep.data.samples import SampleRules
from fewstep.data.shards import Shard, ShardIndex
from fewstep.data.source import decode_sample
from fewstep.data.tar_piece import RawSample
from fewstep.errors import DataError
from fewstep.storage import Storage

_PIECE_BYTES = 16 << 20
_PERCENTILES = (0, 5, 25, 50, 75, 95, 100)
#: Width over height at the middle of each bin of the histogram.
ASPECTS = (0.33, 0.4, 0.5, 0.56, 0.67, 0.75, 0.8, 1.0, 1.25, 1.33, 1.5, 1.78, 2.0, 2.5, 3.0)


@dataclass
class Shown:
    """A sample for the contact sheet: picture (3, H, W) uint8 squared, caption, and its size as text."""

    pixels: Any
    caption: str
    size: str


@dataclass
class Inspection:
    """What was found.

    Attributes:
        facts: JSON-able: counts, bytes, sizes, captions, fields of the metadata, what was skipped and filtered.
        shown: some of the pictures, drawn at random.
    """

    facts: dict[str, Any]
    shown: list[Shown]


@dataclass
class _Tally:
    kinds: Counter[str] = field(default_factory=Counter)
    widths: list[int] = field(default_factory=list)
    heights: list[int] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    characters: list[int] = field(default_factory=list)
    words: list[int] = field(default_factory=list)
    captions: Counter[int] = field(default_factory=Counter)
    fields: dict[str, list[Any]] = field(default_factory=dict)
    keys: Counter[str] = field(default_factory=Counter)


def inspect_shards(
    index: ShardIndex,
    storage: Storage,
    *,
    rules: SampleRules,
    max_samples: int,
    num_shown: int = 48,
    cell: int = 128,
    seed: int = 0,
    progress: Callable[[int], None] = lambda count: None,
) -> Inspection:
    """Read samples and say what they are. Whole shards are taken, drawn by the seed, until there are enough samples.

    Args:
        index: the shards.
        storage: where they lie.
        rules: filters and captions that a recipe would apply; what they leave out is counted and not looked at further.
        max_samples: samples after which no further shard is begun.
        num_shown: pictures that are kept to be looked at.
        cell: their side in pixels.
        seed: of what is drawn.
        progress: takes the number of samples of each piece that was read.

    Raises:
        DataError: not one sample can be used.
        StorageError: the store does not answer.
    """
    draw = random.Random(seed)
    shards = list(index.shards)
    draw.shuffle(shards)
    counts, tally = SampleCounts(max_bad_share=1.0), _Tally()
    shown: list[Shown] = []
    begun = 0
    for shard in shards:
        if counts.seen >= max_samples:
            break
        begun += 1
        for sample in _samples(shard, storage, counts, progress):
            decoded = decode_sample(sample, _Looking(rules, cell, tally), shard=shard, counts=counts)
            if decoded is not None:
                # Each has the same chance, however many come.
                place = len(shown) if len(shown) < num_shown else draw.randrange(len(tally.widths))
                if place < num_shown:
                    shown[place : place + 1] = [Shown(decoded["pixels"], decoded["caption"], decoded["size"])]
    if not tally.widths:
        raise DataError(
            f"Of {counts.seen} samples in {begun} shards not one can be used: "
            + ", ".join(f"{count} × {reason}" for reason, count in sorted(counts.by_reason().items()))
        )
    facts = {
        "shards": len(index.shards), "inspected_shards": begun, "samples": index.num_samples, "seen": counts.seen,
        "bytes": sum(shard.size_bytes for shard in index.shards), "digest": index.digest,
        "skipped": counts.skipped, "filtered": counts.filtered,
        "worst_shards": dict(sorted(counts.shards.items(), key=lambda item: -item[1])[:10]), **_facts(tally),
    }  # fmt: skip
    draw.shuffle(shown)
    return Inspection(facts, shown)


@dataclass(frozen=True)
class _Looking:
    """A decoder that notes what it sees."""

    rules: SampleRules
    cell: int
    tally: _Tally

    def __call__(self, sample: Sample) -> dict[str, Any]:
        sample = self.rules.apply(sample)
        decoded = decode_picture(sample, resolution=self.cell)
        kind = next(extension for extension in EXTENSIONS if extension in sample)
        with Image.open(io.BytesIO(sample[kind])) as picture:
            width, height = picture.size
            mode = picture.mode
        tally, caption = self.tally, decoded["caption"]
        tally.kinds[f"{kind} {mode}"] += 1
        tally.widths.append(width)
        tally.heights.append(height)
        tally.bytes.append(len(sample[kind]))
        tally.characters.append(len(caption))
        tally.words.append(len(caption.split()))
        tally.captions[hash(caption)] += 1
        tally.keys[sample["__key__"]] += 1
        for name, value in _record(sample).items():
            tally.fields.setdefault(name, []).append(value)
        return {**decoded, "size": f"{width} x {height}"}


def _samples(
    shard: Shard, storage: Storage, counts: SampleCounts, progress: Callable[[int], None]
) -> Iterator[RawSample]:
    reader = PieceReader(storage)
    for start, end in cut_pieces(shard.size_bytes, piece_bytes=_PIECE_BYTES):
        piece = reader.load(shard, start, end)
        if piece.lost:
            counts.seen += piece.lost
            counts.lose(
                shard.uri, piece.reason, piece.detail, samples=piece.lost, size_bytes=piece.lost_bytes, start=start
            )
        yield from piece.samples
        progress(len(piece.samples))


def _record(sample: Sample) -> dict[str, Any]:
    try:
        record = json.loads(sample.get("json", b"{}"))
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _facts(tally: _Tally) -> dict[str, Any]:
    count = len(tally.widths)
    ratios = np.log(np.array(tally.widths) / np.array(tally.heights))
    nearest = np.abs(ratios[:, None] - np.log(ASPECTS)).argmin(axis=1)
    return {
        "usable": count,
        "kinds": dict(tally.kinds.most_common()),
        "picture_bytes": percentiles(tally.bytes),
        "width": percentiles(tally.widths),
        "height": percentiles(tally.heights),
        "shorter_side": percentiles(np.minimum(tally.widths, tally.heights)),
        "aspects": {f"{aspect:g}": int((nearest == number).sum()) for number, aspect in enumerate(ASPECTS)},
        "caption_characters": percentiles(tally.characters),
        "caption_words": percentiles(tally.words),
        "captions_seen_before": count - len(tally.captions),
        "keys_seen_before": count - len(tally.keys),
        "fields": {name: _field(values, count) for name, values in sorted(tally.fields.items())},
    }


def _field(values: Sequence[Any], count: int) -> dict[str, Any]:
    given = [value for value in values if value is not None]
    facts: dict[str, Any] = {"share": len(given) / count}
    numbers = [float(value) for value in given if isinstance(value, (int, float)) and not isinstance(value, bool)]
    if numbers and len(numbers) == len(given):
        return facts | {"percentiles": percentiles([number for number in numbers if number == number] or [0.0])}
    texts = Counter(str(value)[:80] for value in given)
    # The values of a field of few (a language, a status); of one that names each sample just an example.
    return facts | {"values": dict(texts.most_common(5 if len(texts) <= max(5, len(given) // 2) else 1))}


def percentiles(values: Any) -> dict[str, float]:
    """Return the least, some percentiles and the greatest of some numbers, by name: "5" is the 5th percentile."""
    found = np.percentile(np.asarray(values, dtype=float), _PERCENTILES)
    return {str(name): round(float(value), 4) for name, value in zip(_PERCENTILES, found, strict=True)}
