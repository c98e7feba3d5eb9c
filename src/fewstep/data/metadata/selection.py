"""Which rows of the metadata are taken: no address and no caption twice, and as many as wanted, by their digests.

A row's digest depends on its address and the seed alone. Rows lie in the order of their digests, which is a random one;
the first `num_train` are trained on and the last are held out. So the draw does not depend on the order of the table
(but for which of several rows of one address stays: the first), and a larger one holds the smaller one. What has to be
compared lies in one bucket (`buckets.py`), so memory does not grow with the table:

1. `deal_rows`, a task for some row groups: filter, compute digests, deal the rows over buckets by the address's digest.
2. `drop_same_urls`, a task a bucket: keep the first row of each address; deal the captions' digests over buckets.
3. `drop_same_captions`, a task a bucket: of each caption keep the row with the least digest; deal the others' digests.
4. `take_rows`, a task a bucket: the rows that are left and drawn, in tables for one shard each.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fewstep.data.metadata.buckets import Dealt, Span, deal, gather
from fewstep.data.metadata.scan import CAPTION_DIGEST, URL_DIGEST, Counts, ParquetSource, RowGroups
from fewstep.data.metadata.settings import KEY
from fewstep.data.splits import Split
from fewstep.errors import DataError
from fewstep.storage import Storage, join


@dataclass(frozen=True)
class DealtRows:
    """What `deal_rows` leaves: its counts, the rows, and their digests alone; None where no row passed."""

    counts: Counts
    rows: Dealt | None
    digests: Dealt | None


@dataclass(frozen=True)
class DistinctUrls:
    """What `drop_same_urls` leaves: how many addresses a bucket has, how many rows more, and the captions' digests."""

    num_urls: int
    num_same: int
    captions: Dealt | None


@dataclass(frozen=True)
class SameCaptions:
    """What `drop_same_captions` leaves: the addresses' digests of the rows that go."""

    num_same: int
    lost: Dealt | None


@dataclass(frozen=True)
class Take:
    """Rows of a bucket that are drawn: from its `start`-th on, up to `stop`, not included."""

    split: Split
    start: int
    stop: int


@dataclass(frozen=True)
class Part:
    """A table of rows for one shard; `digest` is that of all that they hold, so of what pictures keep of them."""

    split: Split
    name: str
    uri: str
    num_rows: int
    digest: str


def deal_rows(source: ParquetSource, unit: RowGroups, uri: str, *, num_buckets: int, storage: Storage) -> DealtRows:
    """Scan the row groups, and store the rows that pass below `uri`."""
    table, counts = source.scan(unit)
    if table is None:
        return DealtRows(counts, None, None)
    names = [name for name in (URL_DIGEST, CAPTION_DIGEST) if name in table.column_names]
    rows = deal(
        table.drop_columns([name for name in names if name != URL_DIGEST]),
        URL_DIGEST, join(uri, "rows.arrow"), num_buckets=num_buckets, storage=storage,
    )  # fmt: skip
    digests = deal(
        table.select(names), URL_DIGEST, join(uri, "digests.arrow"), num_buckets=num_buckets, storage=storage
    )
    return DealtRows(counts, rows, digests)


def drop_same_urls(spans: Sequence[Span], uri: str, *, num_buckets: int, storage: Storage) -> DistinctUrls:
    """Compare the addresses of a bucket, whose digests lie at `spans`, in the order of the units; store the captions'
    digests at `uri`."""
    table = gather(spans, storage=storage)
    if table is None:
        return DistinctUrls(0, 0, None)
    urls, first = np.unique(table[URL_DIGEST].to_numpy(), return_index=True)
    captions = None
    if CAPTION_DIGEST in table.column_names:
        kept = table.take(pa.array(first))
        captions = deal(kept, CAPTION_DIGEST, uri, num_buckets=num_buckets, storage=storage)
    return DistinctUrls(len(urls), table.num_rows - len(urls), captions)


def drop_same_captions(spans: Sequence[Span], uri: str, *, num_buckets: int, storage: Storage) -> SameCaptions:
    """Compare the captions of a bucket, whose digests lie at `spans`; store the addresses of the rows that go at
    `uri`."""
    table = gather(spans, storage=storage)
    if table is None:
        return SameCaptions(0, None)
    urls, captions = table[URL_DIGEST].to_numpy(), table[CAPTION_DIGEST].to_numpy()
    order = np.lexsort((urls, captions))
    again = np.flatnonzero(captions[order][1:] == captions[order][:-1]) + 1
    if not len(again):
        return SameCaptions(0, None)
    lost = pa.table({URL_DIGEST: np.sort(urls[order[again]])})
    return SameCaptions(len(again), deal(lost, URL_DIGEST, uri, num_buckets=num_buckets, storage=storage))


def take_rows(
    bucket: int,
    spans: Sequence[Span],
    lost: Sequence[Span],
    takes: Sequence[Take],
    uri: str,
    *,
    rows_per_shard: int,
    storage: Storage,
) -> list[Part]:
    """Store the rows of a bucket that are drawn as parquet tables below `uri`, by split; each has the column `key`, the
    digest in 16 hex digits, and is in the order of it.

    Args:
        bucket: its number, for names.
        spans: where its rows lie, in the order of the units.
        lost: where the digests lie of those that go for their captions.
        takes: what is drawn, counted among the rows that are left.
        uri: folder.
        rows_per_shard: most rows of a table.
        storage: the store.
    """
    table = gather(spans, storage=storage)
    assert table is not None
    digests, first = np.unique(table[URL_DIGEST].to_numpy(), return_index=True)
    gone = gather(lost, storage=storage)
    if gone is not None:
        left = ~np.isin(digests, gone[URL_DIGEST].to_numpy())
        digests, first = digests[left], first[left]
    parts = []
    for take in takes:
        drawn = table.take(pa.array(first[take.start : take.stop])).drop_columns([URL_DIGEST])
        keys = pa.array([f"{digest:016x}" for digest in digests[take.start : take.stop].tolist()])
        drawn = drawn.add_column(0, KEY, keys)
        count = -(-drawn.num_rows // rows_per_shard)
        for number in range(count):
            begin, end = (drawn.num_rows * edge // count for edge in (number, number + 1))
            name = f"{bucket:05d}-{number:04d}"
            rows = drawn.slice(begin, end - begin)
            part = Part(
                take.split, name, join(uri, take.split, f"{name}.parquet"), rows.num_rows, _content_digest(rows)
            )
            _write(rows, part.uri, storage)
            parts.append(part)
    return parts


def read_part(uri: str, *, storage: Storage) -> pa.Table:
    """Return the rows of a part."""
    return pq.read_table(pa.BufferReader(storage.read_bytes(uri)))


def takes_of(
    left: Sequence[int], *, num_train: int | None, num_evaluate: int, num_alignment: int, splits: Sequence[Split]
) -> list[list[Take]]:
    """Return what is drawn of each bucket: train from the first row on, evaluate from the last one back, alignment
    before it.

    Args:
        left: rows that each bucket has left.
        num_train, num_evaluate, num_alignment: how many are drawn; num_train None: all that the others leave.
        splits: those that are wanted; the others' rows stay theirs.

    Raises:
        DataError: there are not as many rows.
    """
    total = sum(left)
    rest = total - num_evaluate - num_alignment
    if rest < (num_train or 1):
        wanted = f"num_train={num_train}, " if num_train is not None else "at least one of training, "
        raise DataError(
            f"prepare_metadata: {total} rows are left, fewer than {wanted}num_evaluate={num_evaluate} and "
            f"num_alignment={num_alignment} need together: lower these, or loosen the filters"
        )
    ranges: dict[Split, tuple[int, int]] = {
        "train": (0, rest if num_train is None else num_train),
        "alignment": (rest, rest + num_alignment),
        "evaluate": (rest + num_alignment, total),
    }
    takes: list[list[Take]] = []
    before = 0
    for rows in left:
        found = []
        for split in splits:
            start, stop = (min(max(edge - before, 0), rows) for edge in ranges[split])
            if start < stop:
                found.append(Take(split, start, stop))
        takes.append(found)
        before += rows
    return takes


def _content_digest(rows: pa.Table) -> str:
    """Return a digest of names, types and values, in their order, however the rows lie in chunks and files."""
    content = hashlib.sha256()
    for name, column in zip(rows.column_names, rows.columns, strict=True):
        texts = pc.cast(column, pa.large_string())
        # With the lengths no two columns of texts are alike when they are joined; a gap has none.
        lengths = pc.fill_null(pc.binary_length(texts), -1).to_numpy().astype("<i8")
        content.update(f"{name}\n{column.type}\n{len(column)}\n".encode())
        content.update(lengths.tobytes())
        content.update("".join(pc.fill_null(texts, "").to_pylist()).encode())
    return content.hexdigest()


def _write(table: pa.Table, uri: str, storage: Storage) -> None:
    buffer = io.BytesIO()
    strings = {
        index: pc.cast(column, pa.string())
        for index, column in enumerate(table.columns)
        if pa.types.is_large_string(column.type) or pa.types.is_null(column.type)
    }
    for index, column in strings.items():  # what other programs read best
        table = table.set_column(index, table.column_names[index], column)
    pq.write_table(table, buffer, compression="zstd")
    storage.write_bytes(uri, buffer.getvalue())
