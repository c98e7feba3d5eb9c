"""Rows of parquet tables are chosen as a short program in plain Python chooses them, in however many pieces."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fewstep.data.metadata.normal import digests, normal_captions, normal_urls
from fewstep.data.metadata.scan import Counts, ParquetSource
from fewstep.data.metadata.selection import (
    Take,
    deal_rows,
    drop_same_captions,
    drop_same_urls,
    read_part,
    take_rows,
    takes_of,
)
from fewstep.data.metadata.settings import MetadataSettings
from fewstep.errors import DataError
from fewstep.storage import Storage, join

FILTERS = [{"field": "WIDTH", "min": 512}, {"field": "unsafe", "max": 0.1}, {"field": "LANGUAGE", "one_of": ["en"]}]
COLUMNS = {"url": "URL", "caption": "TEXT", "unsafe": "punsafe"}


def table(num_rows: int, *, seed: int) -> pa.Table:
    """Rows like LAION's, with duplicates, gaps and nonsense among them."""
    drawn = random.Random(seed)
    return pa.table(
        {
            "SAMPLE_ID": pa.array(range(num_rows), pa.int64()),
            "URL": [
                drawn.choice([None, "", "ftp://a.com/x.jpg", "data:image/png;base64,AA"])
                if drawn.random() < 0.02
                else f"http{drawn.choice(['', 's'])}://a.com/{drawn.randrange(num_rows)}.jpg{drawn.choice(['', '?w=5'])}"  # noqa: E501
                for _ in range(num_rows)
            ],
            "TEXT": [
                drawn.choice([None, "", "  "])
                if drawn.random() < 0.02
                else f"{drawn.choice(['A', 'a'])} picture of {drawn.randrange(2 * num_rows)}{drawn.choice(['', '!'])}"
                for _ in range(num_rows)
            ],
            "WIDTH": pa.array([drawn.choice([None, 100, 511, 512, 800, 2000]) for _ in range(num_rows)], pa.int32()),
            "punsafe": pa.array([drawn.random() * 0.2 for _ in range(num_rows)], pa.float32()),
            "LANGUAGE": pa.array([drawn.choice(["en", "en", "en", "de"]) for _ in range(num_rows)]).dictionary_encode(),
        }
    )


def write(tables: list[pa.Table], folder: Path, *, row_group_size: int = 100) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, each in enumerate(tables):
        pq.write_table(each, folder / f"part-{number:05d}.parquet", row_group_size=row_group_size)


def chosen(settings: MetadataSettings, storage: Storage, uri: str) -> tuple[Counts, dict[str, list[dict[str, Any]]]]:
    """The counts, and the rows of each split in their order: the tasks of the stage, one after another."""
    source = ParquetSource(settings, storage)
    units = source.units([path for path, _ in source.paths()])
    buckets = max(1, -(-sum(unit.num_rows for unit in units) // settings.rows_per_task))
    dealt = [
        deal_rows(source, unit, join(uri, f"{n}"), num_buckets=buckets, storage=storage) for n, unit in enumerate(units)
    ]
    counts = Counts()
    for each in dealt:
        counts.add(each.counts)
    spans = [[s for each in dealt if each.digests and (s := each.digests.span(b))] for b in range(buckets)]
    rows = [[s for each in dealt if each.rows and (s := each.rows.span(b))] for b in range(buckets)]
    more = partial(join, uri)
    urls = [drop_same_urls(spans[b], more(f"u{b}"), num_buckets=buckets, storage=storage) for b in range(buckets)]
    captions = [[s for each in urls if each.captions and (s := each.captions.span(b))] for b in range(buckets)]
    same = [
        drop_same_captions(captions[b], more(f"c{b}"), num_buckets=buckets, storage=storage) for b in range(buckets)
    ]
    counts.remove("duplicate url", sum(each.num_same for each in urls))
    counts.remove("duplicate caption", sum(each.num_same for each in same))
    left = [urls[b].num_urls - sum(each.lost.rows[b] for each in same if each.lost) for b in range(buckets)]
    assert sum(left) == counts.left
    takes = takes_of(
        left, num_train=settings.num_train, num_evaluate=settings.num_evaluate,
        num_alignment=settings.num_alignment, splits=("train", "evaluate", "alignment"),
    )  # fmt: skip
    found: dict[str, list[dict[str, Any]]] = {"train": [], "evaluate": [], "alignment": []}
    for b in range(buckets):
        lost = [s for each in same if each.lost and (s := each.lost.span(b))]
        for part in (
            take_rows(
                b, rows[b], lost, takes[b], more("drawn"), rows_per_shard=settings.rows_per_shard, storage=storage
            )
            if takes[b]
            else []
        ):
            read = read_part(part.uri, storage=storage)
            assert read.num_rows == part.num_rows <= settings.rows_per_shard
            found[part.split] += read.to_pylist()
    return counts, found


def expected(tables: list[pa.Table], settings: MetadataSettings) -> list[dict[str, Any]]:
    """The rows that are left, in their order, by plain Python."""
    kept: dict[int, dict[str, Any]] = {}
    for row in (row for each in tables for row in each.to_pylist()):
        if row["WIDTH"] is None or row["WIDTH"] < 512 or row["punsafe"] > 0.1 or row["LANGUAGE"] != "en":
            continue
        if not (row["URL"] or "").startswith("http") or not (row["TEXT"] or "").strip():
            continue
        form = normal_urls(pa.array([row["URL"]]))
        digest = int(digests(form, seed=settings.seed, purpose="url")[0])
        kept.setdefault(digest, row)
    captions: set[str] = set()
    rows = []
    for digest in sorted(kept):
        caption = normal_captions(pa.array([kept[digest]["TEXT"]]))[0].as_py()
        if caption not in captions:
            captions.add(caption)
            row = kept[digest]
            rows.append(
                {"key": f"{digest:016x}", "url": row["URL"], "caption": row["TEXT"], "unsafe": row["punsafe"],
                 "WIDTH": row["WIDTH"], "LANGUAGE": row["LANGUAGE"]}
            )  # fmt: skip
    return rows


@pytest.mark.parametrize("rows_per_task", [100, 333, 10_000])
def test_the_rows_are_those_of_a_plain_program(
    rows_per_task: int, tmp_path: Path, storage: Storage, bucket_uri: str
) -> None:
    tables = [table(700, seed=1), table(500, seed=2), table(300, seed=1)]  # the third repeats addresses of the first
    write(tables, tmp_path)
    settings = MetadataSettings(
        source=str(tmp_path), columns=COLUMNS, filters=FILTERS, num_evaluate=20, num_alignment=10,
        rows_per_task=rows_per_task, rows_per_shard=64, seed=3,
    )  # fmt: skip
    counts, found = chosen(settings, storage, bucket_uri)
    rows = expected(tables, settings)
    assert 100 < len(rows) < 700
    assert found["train"] == rows[:-30]
    assert found["alignment"] == rows[-30:-20]
    assert found["evaluate"] == rows[-20:]
    assert counts.rows == 1500
    assert counts.left == len(rows)
    assert counts.removed["WIDTH below 512"] > counts.removed["unsafe above 0.1"] > counts.removed["no url"] > 0
    assert counts.removed["duplicate url"] > 0 < counts.removed["duplicate caption"]


def test_a_larger_draw_holds_the_smaller_one_and_the_order_of_files_changes_nothing(
    tmp_path: Path, storage: Storage, bucket_uri: str
) -> None:
    tables = [table(300, seed=1), table(300, seed=2)]
    write(tables, tmp_path / "a")
    write([each.take(pa.array(range(299, -1, -1))) for each in reversed(tables)], tmp_path / "b")
    settings = MetadataSettings(source=str(tmp_path / "a"), num_train=40, num_evaluate=5, duplicate_captions="keep")
    _, small = chosen(settings, storage, join(bucket_uri, "1"))
    _, large = chosen(settings.model_copy(update={"num_train": 90}), storage, join(bucket_uri, "2"))
    _, other = chosen(settings.model_copy(update={"source": str(tmp_path / "b")}), storage, join(bucket_uri, "3"))
    assert large["train"][:40] == small["train"]
    assert large["evaluate"] == small["evaluate"]
    assert [row["key"] for row in other["train"]] == [row["key"] for row in small["train"]]
    _, shuffled = chosen(settings.model_copy(update={"seed": 1}), storage, join(bucket_uri, "4"))
    assert {row["url"] for row in shuffled["train"]} != {row["url"] for row in small["train"]}


def test_row_groups_that_statistics_exclude_are_counted_and_not_read(tmp_path: Path, storage: Storage) -> None:
    sizes = pa.array([100] * 100 + [600] * 100 + [5000] * 100, pa.int32())
    urls = [f"https://a.com/{number}" for number in range(300)]
    texts = [f"number {number}" for number in range(300)]
    write([pa.table({"URL": urls, "TEXT": texts, "WIDTH": sizes})], tmp_path)
    rule = {"field": "WIDTH", "min": 512, "max": 1024}
    settings = MetadataSettings(source=str(tmp_path), filters=[rule])
    source = ParquetSource(settings, storage)
    (unit,) = source.units([path for path, _ in source.paths()])
    rows, counts = source.scan(unit)
    assert rows is not None
    assert rows.num_rows == 100
    assert counts.not_read == 200
    assert counts.rows == 300
    assert counts.removed["WIDTH below 512"] == counts.removed["WIDTH above 1024"] == 100
    assert counts.values == {"WIDTH": (100.0, 5000.0)}


def test_files_in_s3_are_read_like_files_on_disk(tmp_path: Path, storage: Storage, bucket_uri: str) -> None:
    write([table(300, seed=1)], tmp_path)
    uri = join(bucket_uri, "metadata", "part-00000.parquet")
    storage.write_bytes(uri, (tmp_path / "part-00000.parquet").read_bytes())
    here = MetadataSettings(source=str(tmp_path), filters=FILTERS, columns=COLUMNS)
    there = here.model_copy(update={"source": uri})
    assert chosen(here, storage, join(bucket_uri, "1")) == chosen(there, storage, join(bucket_uri, "2"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"columns": {"url": "url", "caption": "TEXT"}}, r"no column url, .* it has SAMPLE_ID, URL, TEXT"),
        ({"filters": [{"field": "AESTHETIC_SCORE", "min": 5}]}, "no column AESTHETIC_SCORE"),
        ({"columns": {"url": "SAMPLE_ID", "caption": "TEXT"}}, "SAMPLE_ID is of type int64, and url must be text"),
        ({"filters": [{"field": "LANGUAGE", "min": 5}]}, "only numbers have an order"),
    ],
)
def test_a_table_that_does_not_fit_is_told_before_it_is_read(
    settings: dict[str, Any], words: str, tmp_path: Path, storage: Storage
) -> None:
    write([table(10, seed=1)], tmp_path)
    source = ParquetSource(MetadataSettings(source=str(tmp_path), **settings), storage)
    with pytest.raises(DataError, match=words):
        source.units([path for path, _ in source.paths()])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (pa.array([["a"], ["b", "c"]]), "EXTRA is of type list<element: string>"),
        (pa.array([{"a": 1}, {"a": 2}]), "EXTRA is of type struct<a: int64>"),
        (pa.array([b"a", b"b"]), "EXTRA is of type binary"),
    ],
)
def test_a_column_that_json_cannot_have_is_told_before_it_is_read(
    values: pa.Array, words: str, tmp_path: Path, storage: Storage
) -> None:
    write([pa.table({"URL": ["https://a.com/1", "https://a.com/2"], "TEXT": ["a", "b"], "EXTRA": values})], tmp_path)
    columns = {"url": "URL", "caption": "TEXT", "tags": "EXTRA"}
    source = ParquetSource(MetadataSettings(source=str(tmp_path), columns=columns), storage)
    with pytest.raises(DataError, match=rf"{words}, which pictures cannot keep as tags"):
        source.units([path for path, _ in source.paths()])


def test_a_local_file_that_is_written_again_in_the_same_size_is_another(tmp_path: Path, storage: Storage) -> None:
    def fingerprints(width: int) -> list[tuple[str, str]]:
        rows = {"URL": ["https://a.com/1"], "TEXT": ["a"], "WIDTH": pa.array([width], pa.int32())}
        write([pa.table(rows)], tmp_path)
        return ParquetSource(MetadataSettings(source=str(tmp_path)), storage).paths()

    (_, before), (_, after), (_, again) = fingerprints(512)[0], fingerprints(513)[0], fingerprints(512)[0]
    assert before == again != after
    assert before.split("-")[0] == after.split("-")[0]  # the size


def test_a_file_that_is_no_parquet_and_a_folder_without_any(tmp_path: Path, storage: Storage) -> None:
    source = ParquetSource(MetadataSettings(source=str(tmp_path)), storage)
    with pytest.raises(DataError, match="no parquet files"):
        source.paths()
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no PAR1")
    with pytest.raises(DataError, match=r"x\.parquet is no whole parquet file"):
        source.units([path for path, _ in source.paths()])


def test_more_rows_than_there_are() -> None:
    with pytest.raises(
        DataError, match="30 rows are left, fewer than num_train=25, num_evaluate=5 and num_alignment=1"
    ):
        takes_of([10, 20], num_train=25, num_evaluate=5, num_alignment=1, splits=("train",))
    found = takes_of([10, 0, 20], num_train=12, num_evaluate=5, num_alignment=0, splits=("train", "evaluate"))
    assert found == [[Take("train", 0, 10)], [], [Take("train", 0, 2), Take("evaluate", 15, 20)]]


def test_files_whose_columns_differ_in_type_and_texts_that_are_not_utf8(
    tmp_path: Path, storage: Storage, bucket_uri: str
) -> None:
    broken = pa.array([b"caption \xff one", b"caption two"]).view(pa.string())
    first = pa.table({"URL": ["https://a.com/1", "https://a.com/2"], "TEXT": broken, "WIDTH": pa.array([600, 700])})
    second = pa.table({"URL": ["https://a.com/3"], "TEXT": ["caption three"], "WIDTH": pa.array([800.0])})
    write([first, second], tmp_path)
    settings = MetadataSettings(source=f"file://{tmp_path}", filters=[{"field": "WIDTH", "min": 512}])
    _, found = chosen(settings, storage, bucket_uri)
    assert {row["caption"]: row["WIDTH"] for row in found["train"]} == {
        "caption \ufffd one": 600, "caption two": 700, "caption three": 800
    }  # fmt: skip
