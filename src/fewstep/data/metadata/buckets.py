"""Rows dealt over buckets by their digest, so that each bucket can be sorted and compared by itself, in any process.

One object holds the rows that one task deals, a bucket after the other, each an Arrow stream of its own: a bucket is
read from it by one range of bytes.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fewstep.errors import DataError
from fewstep.storage import Storage


@dataclass(frozen=True)
class Dealt:
    """Where the rows of each bucket lie in an object: rows[b] rows in the bytes ends[b - 1] to ends[b]."""

    uri: str
    rows: tuple[int, ...]
    ends: tuple[int, ...]

    def span(self, bucket: int) -> Span | None:
        """Return where a bucket's rows lie; None: it has none here."""
        if not self.rows[bucket]:
            return None
        return Span(self.uri, self.ends[bucket - 1] if bucket else 0, self.ends[bucket])


@dataclass(frozen=True)
class Span:
    """A range of bytes of an object."""

    uri: str
    start: int
    end: int


def bucket_of(digests: npt.NDArray[np.uint64], num_buckets: int) -> npt.NDArray[np.int64]:
    """Return the bucket of each digest (N,): equal parts of their range, in order, so that buckets follow each other as
    the digests do."""
    high = (digests >> np.uint64(32)).astype(np.uint64)
    return ((high * np.uint64(num_buckets)) >> np.uint64(32)).astype(np.int64)


def deal(table: pa.Table, by: str, uri: str, *, num_buckets: int, storage: Storage) -> Dealt:
    """Store the rows of a table by the bucket of their column `by`, within a bucket in the order of the table."""
    buckets = bucket_of(table[by].to_numpy(), num_buckets)
    order = np.argsort(buckets, kind="stable")
    rows = np.bincount(buckets, minlength=num_buckets)
    table = table.take(pa.array(order))
    data, ends, start = io.BytesIO(), [], 0
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    for count in rows.tolist():
        if count:
            with pa.ipc.new_stream(data, table.schema, options=options) as writer:
                writer.write_table(table.slice(start, count))
        start += count
        ends.append(data.tell())
    storage.write_bytes(uri, data.getvalue())
    return Dealt(uri, tuple(rows.tolist()), tuple(ends))


def gather(spans: Sequence[Span], *, storage: Storage) -> pa.Table | None:
    """Return the rows of all the spans, one after the other; None: there are no spans.

    Raises:
        DataError: a span is not what `deal` stored, or columns of one name cannot be put together.
    """
    tables = []
    for span in spans:
        found = storage.read_range(span.uri, span.start, span.end)
        try:
            with pa.ipc.open_stream(pa.py_buffer(bytes(found.data))) as reader:
                tables.append(reader.read_all())
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(
                f"{span.uri}, bytes {span.start} to {span.end}, is damaged ({error}): delete the folder that it lies "
                "in, and run prepare again"
            ) from error
    if not tables:
        return None
    try:
        # A column may be of whole numbers in one file and, for its gaps, of others in the next.
        return pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        # Kinds of types were compared before anything was dealt; whole numbers above 2**53 beside others were not.
        raise DataError(
            f"prepare_metadata: rows of different files cannot be put together ({error}): {_unlike(tables)}. Write the "
            "files with one type, or leave the column out of columns and filters"
        ) from error


def _unlike(tables: Sequence[pa.Table]) -> str:
    types: dict[str, list[str]] = {}
    for table in tables:
        for field in table.schema:
            seen = types.setdefault(field.name, [])
            if str(field.type) not in seen:
                seen.append(str(field.type))
    return "; ".join(f"{name} is of type {' and '.join(seen)}" for name, seen in types.items() if len(seen) > 1)
