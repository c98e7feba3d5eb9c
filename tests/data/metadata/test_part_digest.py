"""The digest of a part is that of what its pictures keep of their rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fewstep.data.metadata.scan import ParquetSource
from fewstep.data.metadata.selection import Part, Take, deal_rows, take_rows
from fewstep.data.metadata.settings import MetadataSettings
from fewstep.storage import Storage, join

COLUMNS = {"url": "URL", "caption": "TEXT", "score": "SCORE", "language": "LANGUAGE", "safe": "SAFE"}
ROWS = 60


def rows(**changes: list[Any]) -> pa.Table:
    columns: dict[str, list[Any]] = {
        "URL": [f"https://a.com/{number}" for number in range(ROWS)],
        "TEXT": [f"picture {number}" for number in range(ROWS)],
        "SCORE": [None if number % 7 == 0 else number / 8 for number in range(ROWS)],
        "LANGUAGE": ["en", None, ""] * (ROWS // 3),
        "SAFE": [True, False, None] * (ROWS // 3),
    }
    return pa.table(columns | changes)


def parts_of(
    table: pa.Table, folder: Path, storage: Storage, uri: str, *, row_group_size: int = ROWS, files: int = 1,
    rows_per_task: int = 1000,
) -> list[Part]:  # fmt: skip
    """Shards of 25 rows or fewer, drawn of the table."""
    folder.mkdir()
    for number in range(files):
        own = table.slice(number * ROWS // files, ROWS // files)
        pq.write_table(own, folder / f"{number}.parquet", row_group_size=row_group_size)
    settings = MetadataSettings(source=str(folder), columns=COLUMNS, rows_per_task=rows_per_task)
    source = ParquetSource(settings, storage)
    dealt = [
        deal_rows(source, unit, join(uri, folder.name, str(number)), num_buckets=1, storage=storage)
        for number, unit in enumerate(source.units([path for path, _ in source.paths()]))
    ]
    spans = [span for each in dealt if each.rows and (span := each.rows.span(0))]
    takes = [Take("train", 0, ROWS)]
    return take_rows(0, spans, [], takes, join(uri, folder.name, "drawn"), rows_per_shard=25, storage=storage)


def digests_of(parts: list[Part]) -> list[tuple[str, int, str]]:
    return [(part.name, part.num_rows, part.digest) for part in parts]


@pytest.mark.parametrize(
    "changes",
    [
        {"TEXT": [f"picture {number}" if number else "another" for number in range(ROWS)]},
        {"SCORE": [None if number % 7 == 0 else number / 8 + (number == 1) for number in range(ROWS)]},
        {"SCORE": [None if number % 7 == 0 and number else number / 8 for number in range(ROWS)]},
        {"LANGUAGE": ["en", "", "", *["en", None, ""] * (ROWS // 3 - 1)]},
        {"SAFE": [True, True, None, *[True, False, None] * (ROWS // 3 - 1)]},
    ],
)
def test_one_other_value_makes_another_part_of_its_row_alone(
    changes: dict[str, list[Any]], tmp_path: Path, storage: Storage, bucket_uri: str
) -> None:
    before = parts_of(rows(), tmp_path / "before", storage, bucket_uri)
    after = parts_of(rows(**changes), tmp_path / "after", storage, bucket_uri)
    assert [part.name for part in before] == [part.name for part in after]
    assert sum(first.digest != second.digest for first, second in zip(before, after, strict=True)) == 1


def test_texts_that_are_alike_when_joined_are_not_the_same(tmp_path: Path, storage: Storage, bucket_uri: str) -> None:
    def parts(name: str, *languages: str | None) -> list[Part]:
        return parts_of(rows(LANGUAGE=[*languages] * (ROWS // 3)), tmp_path / name, storage, bucket_uri)

    found = [parts("a", "en", "en", ""), parts("b", "en", "", "en"), parts("c", "en", None, "en")]
    assert len({part.digest for each in found for part in each}) == sum(map(len, found))


def test_how_the_rows_lie_in_row_groups_files_and_tasks_changes_nothing(
    tmp_path: Path, storage: Storage, bucket_uri: str
) -> None:
    before = digests_of(parts_of(rows(), tmp_path / "before", storage, bucket_uri))
    assert len(before) == 3
    small = parts_of(rows(), tmp_path / "small", storage, bucket_uri, row_group_size=7, rows_per_task=10)
    apart = parts_of(rows(), tmp_path / "apart", storage, bucket_uri, files=4)
    encoded = rows().set_column(3, "LANGUAGE", rows()["LANGUAGE"].dictionary_encode())
    assert before == digests_of(small) == digests_of(apart)
    assert before == digests_of(parts_of(encoded, tmp_path / "encoded", storage, bucket_uri))
