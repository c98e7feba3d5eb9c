"""From one tar in the store to samples, with whatever is broken counted by reason, logged and skipped."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from fewstep.data.counts import SampleCounts
from fewstep.data.order import cut_pieces
from fewstep.data.pieces import CUT_SHORT, PieceReader
from fewstep.data.sample import BadSampleError, Decode, FilteredError, Sample
from fewstep.data.shards import Shard, ShardIndex
from fewstep.data.tar_piece import RawSample
from fewstep.errors import DataError
from fewstep.storage import Storage

logger = logging.getLogger(__name__)

_LARGE = ("npy", "jpg", "jpeg", "png", "webp")

#: Bytes of one request in a pass through a shard from its begin to its end, as `encode` makes it.
PASS_PIECE_BYTES = 16 << 20


def decode_sample(raw: RawSample, decode: Decode, *, shard: Shard, counts: SampleCounts) -> dict[str, Any] | None:
    """The decoded sample, or None when `decode` refused it with a DataError or a filter left it out; it is counted."""
    counts.seen += 1
    try:
        return decode(as_sample(raw))
    except FilteredError as error:
        counts.filter(error.reason)
        return None
    except DataError as error:
        reason = error.reason if isinstance(error, BadSampleError) else str(error).split(":")[0][:80]
        counts.skip(shard.uri, reason, f"the first is {raw.key}: {error}")
        return None


def iterate_samples(
    shards: Iterable[Shard], *, storage: Storage, decode: Decode, counts: SampleCounts | None = None
) -> Iterator[dict[str, Any]]:
    """One pass over all samples in the order of the shards, decoded; what is broken is counted in `counts`.

    `decode` gets a `Sample` and raises BadSampleError (or another DataError) for a
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
    for start, end in cut_pieces(shard.size_bytes, piece_bytes=PASS_PIECE_BYTES):
        piece = reader.load(shard, start, end)
        found += len(piece.samples)
        lost += piece.lost
        found_bytes += sum(sample.end - sample.start for sample in piece.samples)
        lost_bytes += piece.lost_bytes
        reason, detail = reason or piece.reason, detail or piece.detail
        for sample in piece.samples:
            decoded = decode_sample(sample, decode, shard=shard, counts=counts)
            if decoded is not None:
                yield decoded
    if shard.num_samples is not None:
        lost = shard.num_samples - found
        lost_bytes = max(lost_bytes, lost * shard.size_bytes // max(1, shard.num_samples))
    elif lost and found_bytes:  # as many as lie in so many bytes of the rest
        lost = max(lost, round(lost_bytes * found / found_bytes))
    if lost > 0:
        counts.seen += lost
        detail = detail or f"{found} of {shard.num_samples} samples"
        counts.lose(shard.uri, reason or CUT_SHORT, detail, samples=lost, size_bytes=lost_bytes)


def as_sample(raw: RawSample) -> Sample:
    """The sample with copies of its members, but views of pictures and arrays, which are large and copied in decoding.

    Whoever changes an array, or keeps it for long (it keeps its whole piece in memory), makes a copy.

    Errors: BadSampleError when two members have one name, as nobody knows which of them is meant.
    """
    if raw.doubled:
        raise BadSampleError("two members of one name", f"{raw.doubled} comes after another one")
    members = {name: data if name.endswith(_LARGE) else bytearray(data) for name, data in raw.members.items()}
    return {"__key__": raw.key, **members}


def known_samples(shards: Sequence[Shard]) -> int | None:
    """Samples in all these shards, or None when that of some shard is not known."""
    return ShardIndex(tuple(shards)).num_samples
