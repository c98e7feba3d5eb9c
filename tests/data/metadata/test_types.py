"""Columns whose types differ between files: those that go together are put together, the others told at once."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fewstep.data.metadata.buckets import Span, deal, gather
from fewstep.data.metadata.scan import URL_DIGEST, ParquetSource
from fewstep.data.metadata.selection import Take, deal_rows, read_part, take_rows
from fewstep.data.metadata.settings import MetadataSettings
from fewstep.errors import DataError
from fewstep.storage import Storage, join

COLUMNS = {"url": "URL", "caption": "TEXT", "score": "SCORE"}
TEXTS = pa.array(["low", "high"])
GAPS = pa.nulls(2)


def write(folder: Path, scores: list[pa.Array]) -> None:
    """A file for each column of scores."""
    for number, values in enumerate(scores):
        urls = [f"https://a.com/{number}-{row}" for row in range(len(values))]
        texts = pa.array([f"picture {number} {row}" for row in range(len(values))], pa.string())
        table = pa.table({"URL": pa.array(urls, pa.string()), "TEXT": texts, "SCORE": values})
        pq.write_table(table, folder / f"part-{number}.parquet")


def units_of(folder: Path, storage: Storage, **settings: Any) -> tuple[ParquetSource, list[Any]]:
    source = ParquetSource(MetadataSettings(source=str(folder), **{"columns": COLUMNS, **settings}), storage)
    return source, source.units([path for path, _ in source.paths()])


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (pa.array([1, 2]), TEXTS, "of type int64 in {0} and of type string in {1}"),
        (pa.array([True, False]), pa.array([1, 2]), "of type bool in {0} and of type int64 in {1}"),
        (pa.array([0.5, 1.5]), pa.array([True, False]), "of type double in {0} and of type bool in {1}"),
        (
            TEXTS.dictionary_encode(),
            pa.array([0.5, 1.5], pa.float32()),
            "of type dictionary.* in {0} and of type float",
        ),
        (pa.array([0, 1], pa.timestamp("us")), pa.array([1, 2]), r"of type timestamp\[us\] in {0} and of type int64"),
    ],
)
def test_types_that_cannot_go_together_are_told_before_anything_is_read(
    first: pa.Array, second: pa.Array, words: str, tmp_path: Path, storage: Storage
) -> None:
    write(tmp_path, [first, GAPS, first, second])
    words = words.format(f"{tmp_path}/part-0.parquet", f"{tmp_path}/part-3.parquet")
    with pytest.raises(
        DataError, match=f"the column SCORE is {words}.* one type, or leave the column out of .*columns"
    ):
        units_of(tmp_path, storage)
    units_of(tmp_path, storage, columns={"url": "URL", "caption": "TEXT"})


def test_a_filter_that_does_not_fit_one_file_names_it(tmp_path: Path, storage: Storage) -> None:
    write(tmp_path, [pa.array([1, 2]), TEXTS])
    with pytest.raises(DataError, match=r"part-1\.parquet: the filter on score has min or max.*type string"):
        units_of(tmp_path, storage, filters=[{"field": "score", "min": 1}])


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ([pa.array([1, 2], pa.int32()), pa.array([3, 2**40])], [1, 2, 3, 2**40]),
        ([pa.array([1, 2], pa.uint8()), pa.array([-3, None], pa.int16())], [1, 2, -3, None]),
        ([pa.array([0.5, 1.5], pa.float32()), pa.array([0.1, 0.2])], [0.5, 1.5, 0.1, 0.2]),
        ([pa.array([1, None]), pa.array([0.5, 1.5])], [1.0, None, 0.5, 1.5]),
        ([pa.array([1, 2]), pa.array([Decimal("0.5"), None], pa.decimal128(5, 2))], [1.0, 2.0, 0.5, None]),
        ([TEXTS, pa.array(["a", "b"], pa.large_string())], ["low", "high", "a", "b"]),
        ([TEXTS.dictionary_encode(), pa.array(["a", None])], ["low", "high", "a", None]),
        ([TEXTS, pa.array([0, 1], pa.date32())], ["low", "high", "1970-01-01", "1970-01-02"]),
        ([GAPS, pa.array([1, 2])], [None, None, 1, 2]),
        ([pa.array([0.5, 1.5]), GAPS], [0.5, 1.5, None, None]),
        ([pa.array([True, False]), GAPS, GAPS], [True, False, None, None, None, None]),
        ([TEXTS, GAPS], ["low", "high", None, None]),
        ([GAPS, GAPS], [None] * 4),
        ([pa.array([1, 2]), pa.array([], pa.string())], [1, 2]),
    ],
)
def test_types_that_can_go_together_do(
    columns: list[pa.Array], expected: list[Any], tmp_path: Path, storage: Storage, bucket_uri: str
) -> None:
    write(tmp_path, columns)
    source, units = units_of(tmp_path, storage)
    dealt = [
        deal_rows(source, unit, join(bucket_uri, f"{n}"), num_buckets=1, storage=storage)
        for n, unit in enumerate(units)
    ]
    spans = [span for each in dealt if each.rows and (span := each.rows.span(0))]
    takes = [Take("train", 0, len(expected))]
    (part,) = take_rows(0, spans, [], takes, join(bucket_uri, "drawn"), rows_per_shard=100, storage=storage)
    rows = sorted(read_part(part.uri, storage=storage).to_pylist(), key=lambda row: row["url"])
    found = [row["score"] for row in rows]
    assert found == expected
    assert list(map(type, found)) == list(map(type, expected))


def stored(columns: list[pa.Array], uri: str, storage: Storage) -> list[Span]:
    spans = []
    for number, values in enumerate(columns):
        table = pa.table({URL_DIGEST: pa.array(range(len(values)), pa.uint64()), "score": values})
        span = deal(table, URL_DIGEST, join(uri, str(number)), num_buckets=1, storage=storage).span(0)
        assert span is not None
        spans.append(span)
    return spans


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (pa.array([1]), pa.array(["high"]), "score is of type int64 and string"),
        (pa.array([2**53 + 1]), pa.array([0.5]), "not in range.*score is of type int64 and double"),
    ],
)
def test_rows_that_cannot_be_put_together_after_all_are_an_error_in_words(
    first: pa.Array, second: pa.Array, words: str, storage: Storage, bucket_uri: str
) -> None:
    with pytest.raises(DataError, match=rf"cannot be put together \(.*{words}\. Write the files with one type"):
        gather(stored([first, second], bucket_uri, storage), storage=storage)
