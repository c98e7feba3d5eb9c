"""One run through parquet files, with a count of what is left out; row groups that hold no row of use are not read.

Reading is pyarrow.dataset's: of each row group the filters' columns first, and the others only where a row passes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.fs

from fewstep.data.metadata.conditions import check_type, failures, row_group_condition
from fewstep.data.metadata.normal import digests, normal_captions, normal_urls
from fewstep.data.metadata.settings import CAPTION, URL, MetadataSettings
from fewstep.data.samples import FieldFilter
from fewstep.errors import DataError, StorageError
from fewstep.storage import Storage

#: Columns of the digests, in what `scan` returns.
URL_DIGEST, CAPTION_DIGEST = "__url__", "__caption__"
NO_URL, NO_CAPTION, SAME_URL, SAME_CAPTION = "no url", "no caption", "duplicate url", "duplicate caption"
_FOOTERS_AT_ONCE = 16
_END_BYTES = 1 << 16


@dataclass(frozen=True)
class RowGroups:
    """Some row groups of one parquet file, from `first` up to `last`, not included."""

    path: str
    first: int
    last: int
    num_rows: int


@dataclass
class Counts:
    """What became of rows.

    Attributes:
        rows: looked at, those of row groups that were not read included.
        not_read: of them, those of row groups that the statistics exclude.
        removed: rows that were left out, by reason.
        values: field of a filter -> least and greatest value before that filter.
    """

    rows: int = 0
    not_read: int = 0
    removed: dict[str, int] = field(default_factory=dict)
    values: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def left(self) -> int:
        return self.rows - sum(self.removed.values())

    def remove(self, reason: str, count: int) -> None:
        """Count rows that are left out; also none, so that every reason shows."""
        self.removed[reason] = self.removed.get(reason, 0) + count

    def add(self, other: Counts) -> None:
        """Count what another has counted."""
        self.rows += other.rows
        self.not_read += other.not_read
        for reason, count in other.removed.items():
            self.remove(reason, count)
        for name, (low, high) in other.values.items():
            self.see(name, low, high)

    def see(self, name: str, low: float, high: float) -> None:
        """Note values of a field."""
        before = self.values.get(name, (low, high))
        self.values[name] = (min(low, before[0]), max(high, before[1]))


def reasons(settings: MetadataSettings) -> list[str]:
    """Return all reasons for which a scan leaves rows out, in the order in which they are looked at."""
    tests = [rule.reasons() for rule in settings.filters]
    return [*(words for rule in tests for test, words in rule.items() if test != "number"), NO_URL, NO_CAPTION]


class ParquetSource:
    """The parquet files of a folder, or one file. Picklable.

    Args:
        settings: which columns and filters.
        storage: where s3:// addresses lie.
    """

    def __init__(self, settings: MetadataSettings, storage: Storage) -> None:
        self._settings, self._storage = settings, storage

    def paths(self) -> list[tuple[str, str]]:
        """Return (URI, fingerprint of content) of the files, sorted by name.

        A local file has none, so its end is taken: there a parquet file has the sizes of its parts and, as a rule, the
        least and greatest values of their columns.

        Raises:
            DataError: there are none.
        """
        source = self._settings.source
        if source.endswith(".parquet") and self._storage.exists(source):
            head = self._storage.read_range(source, 0, 1)
            return [(source, head.etag or self._end_of(source, head.size_bytes))]
        found = [
            (info.uri, info.etag or self._end_of(info.uri, info.size_bytes))
            for info in self._storage.list(source)
            if info.uri.endswith(".parquet")
        ]
        if not found:
            raise DataError(
                f"prepare_metadata.source={source}: there are no parquet files (*.parquet) there. Check the address"
            )
        return found

    def _end_of(self, path: str, size_bytes: int) -> str:
        if not size_bytes:
            return "empty"
        end = self._storage.read_range(path, max(0, size_bytes - _END_BYTES), size_bytes)
        return f"{size_bytes}-{hashlib.sha256(end.data).hexdigest()[:32]}"

    def units(self, paths: Sequence[str]) -> list[RowGroups]:
        """Return the row groups of the files in runs of at most `rows_per_task` rows, or one row group; the footers
        are read, and the columns checked in each.

        Raises:
            DataError: a file is no parquet file, lacks a column, or a filter does not fit the type of its column; or a
                column that is kept is of unlike types in two files.
        """
        with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as pool:
            found = list(zip(paths, pool.map(self._units, paths), strict=True))
        # A file without rows, whose types are often none, clashes with nothing.
        _check_alike((path, types) for path, (units, types) in found if any(unit.num_rows for unit in units))
        return [unit for _, (units, _) in found for unit in units]

    def scan(self, unit: RowGroups) -> tuple[pa.Table | None, Counts]:
        """Return the rows that pass all filters, with their digests, in the order of the file; None: there are none.

        Columns: url, caption, what else is kept, URL_DIGEST, CAPTION_DIGEST (uint64).
        """
        settings, counts = self._settings, Counts()
        fragment = self._open(unit.path)
        schema = fragment.physical_schema
        groups = [group for group in fragment.row_groups if unit.first <= group.id < unit.last]
        counts.rows = sum(group.num_rows for group in groups)
        for reason in reasons(settings):
            counts.remove(reason, 0)
        for rule in settings.filters:
            groups = _without_excluded(rule, settings.column_of(rule.field), schema, fragment, groups, counts)
        tables = [
            table
            for group in groups
            if (table := self._read(fragment.subset(row_group_ids=[group.id]), counts)) is not None
        ]
        return (pa.concat_tables(tables) if tables else None), counts

    def _open(self, path: str) -> ds.ParquetFileFragment:
        file_system: pa.fs.FileSystem
        if path.startswith("s3://"):
            file_system, path = self._storage.arrow_filesystem()[0], path.removeprefix("s3://")
        else:
            file_system = pa.fs.LocalFileSystem()
            path = unquote(urlsplit(path).path) if path.startswith("file://") else path
        read = ds.ParquetFragmentScanOptions(pre_buffer=True)
        return ds.ParquetFileFormat(default_fragment_scan_options=read).make_fragment(path, filesystem=file_system)

    def _units(self, path: str) -> tuple[list[RowGroups], dict[str, pa.DataType]]:
        """Return the runs of row groups of a file, and the types of the columns that are kept."""
        try:
            fragment = self._open(path)
            schema, groups = fragment.physical_schema, fragment.row_groups
        except (OSError, pa.ArrowInvalid) as error:
            raise _explained(path, error) from error
        self._check(path, schema)
        units: list[RowGroups] = []
        for group in groups:
            last = units[-1] if units else None
            if last is not None and last.num_rows + group.num_rows <= self._settings.rows_per_task:
                units[-1] = RowGroups(path, last.first, group.id + 1, last.num_rows + group.num_rows)
            else:
                units.append(RowGroups(path, group.id, group.id + 1, group.num_rows))
        return units, {column: schema.field(column).type for column in self._settings.kept().values()}

    def _check(self, path: str, schema: pa.Schema) -> None:
        settings = self._settings
        wanted = {**settings.columns, **settings.kept()}
        for name, column in wanted.items():
            if column not in schema.names:
                raise DataError(
                    f"{path} has no column {column}, which prepare_metadata takes for {name}; it has "
                    f"{', '.join(schema.names)}. Name the right one under columns"
                )
        for name in (URL, CAPTION):
            type_ = schema.field(settings.columns[name]).type
            if not _is_text(type_):
                raise DataError(
                    f"{path}: the column {settings.columns[name]} is of type {type_}, and {name} must be text"
                )
        for rule in settings.filters:
            column = settings.column_of(rule.field)
            try:
                check_type(rule, column, schema.field(column).type)
            except DataError as error:
                raise DataError(f"{path}: {error}") from error
        for name, column in settings.kept().items():
            type_ = schema.field(column).type
            if not _has_json_form(type_):
                raise DataError(
                    f"{path}: the column {column} is of type {type_}, which pictures cannot keep as {name}; text, "
                    "numbers, booleans and times can be kept. Take it out of columns and filters"
                )

    def _read(self, fragment: ds.ParquetFileFragment, counts: Counts) -> pa.Table | None:
        """Return the rows of a row group that pass, or None."""
        settings = self._settings
        asked = list(dict.fromkeys(settings.column_of(rule.field) for rule in settings.filters))
        try:
            tested = fragment.to_table(columns=asked)
            passing = np.flatnonzero(self._passing(tested, counts))
            if not len(passing):
                return None
            others = [
                column
                for column in dict.fromkeys([*settings.columns.values(), *settings.kept().values()])
                if column not in asked
            ]
            table = fragment.to_table(columns=others)
        except (OSError, pa.ArrowInvalid) as error:
            raise _explained(fragment.path, error) from error
        for column in asked:
            table = table.append_column(column, tested[column])
        del tested
        table = table.take(pa.array(passing))
        columns = {name: _plain(table[settings.columns[name]], text=True) for name in (URL, CAPTION)}
        columns |= {name: _plain(table[column]) for name, column in settings.kept().items()}
        return self._with_digests(pa.table(columns), counts)

    def _passing(self, table: pa.Table, counts: Counts) -> np.ndarray[Any, np.dtype[np.bool_]]:
        passing = np.ones(table.num_rows, bool)
        for rule in self._settings.filters:
            column = table[self._settings.column_of(rule.field)]
            if rule.min is not None or rule.max is not None:
                seen = pc.min_max(column.filter(pa.array(passing)))
                if seen["min"].is_valid:
                    counts.see(rule.field, float(seen["min"].as_py()), float(seen["max"].as_py()))
            for reason, fails in failures(rule, column):
                failed = passing & fails.to_numpy()
                counts.remove(reason, int(failed.sum()))
                passing &= ~failed
        return passing

    def _with_digests(self, table: pa.Table, counts: Counts) -> pa.Table | None:
        settings = self._settings
        address = pc.match_substring_regex(table[URL], r"(?i)^\s*https?://[^\s/?#]")
        counts.remove(NO_URL, table.num_rows - (pc.sum(address).as_py() or 0))
        table = table.filter(address)
        captions = table[CAPTION]
        worded = pc.greater(pc.utf8_length(pc.utf8_trim_whitespace(captions)), 0)
        counts.remove(NO_CAPTION, table.num_rows - (pc.sum(worded).as_py() or 0))
        table = table.filter(worded)
        if not table.num_rows:
            return None
        urls, captions = table[URL].combine_chunks(), table[CAPTION].combine_chunks()
        near_urls, near_captions = settings.duplicate_urls == "near", settings.duplicate_captions == "near"
        url_digests = digests(normal_urls(urls) if near_urls else urls, seed=settings.seed, purpose="url")
        table = table.append_column(URL_DIGEST, pa.array(url_digests))
        if settings.duplicate_captions != "keep":
            forms = normal_captions(captions) if near_captions else captions
            # A caption of signs alone has no normal form; it is like itself only.
            forms = pc.if_else(pc.equal(forms, ""), captions, forms)
            table = table.append_column(CAPTION_DIGEST, pa.array(digests(forms, seed=settings.seed, purpose="caption")))
        return table


def _without_excluded(
    rule: FieldFilter,
    column: str,
    schema: pa.Schema,
    fragment: ds.ParquetFileFragment,
    groups: list[Any],
    counts: Counts,
) -> list[Any]:
    """Return the row groups that may hold a row that passes; the rows of the others are counted without reading."""
    condition = row_group_condition(rule, column, schema.field(column).type)
    if condition is None or not groups:
        return groups
    kept = {group.id for group in fragment.subset(filter=condition, schema=schema).row_groups}
    for group in groups:
        if group.id in kept:
            continue
        seen = (group.statistics or {}).get(column, {})
        low, high = seen.get("min"), seen.get("max")
        words = rule.reasons()
        if low is not None and (rule.min is not None or rule.max is not None):
            counts.see(rule.field, float(low), float(high))
        # Where several tests exclude it, the one that its rows would meet first; statistics do not tell all of them.
        if low is None:
            reason = words["missing"]
        elif rule.min is not None and high < rule.min:
            reason = words["min"]
        elif rule.max is not None and low > rule.max:
            reason = words["max"]
        else:
            reason = words["one_of"]
        counts.remove(reason, group.num_rows)
        counts.not_read += group.num_rows
    return [group for group in groups if group.id in kept]


def _is_text(type_: pa.DataType) -> bool:
    inner = type_.value_type if pa.types.is_dictionary(type_) else type_
    return bool(pa.types.is_string(inner) or pa.types.is_large_string(inner) or pa.types.is_string_view(inner))


def _has_json_form(type_: pa.DataType) -> bool:
    tests = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_decimal, pa.types.is_temporal,
             pa.types.is_null)  # fmt: skip
    return _is_text(type_) or any(test(type_) for test in tests)


def _check_alike(files: Iterable[tuple[str, Mapping[str, pa.DataType]]]) -> None:
    """Raise a DataError where a column has types in two files whose rows cannot be put together."""
    first: dict[str, tuple[str, pa.DataType]] = {}
    for path, types in files:
        for column, type_ in types.items():
            if pa.types.is_null(type_):
                continue
            before, other = first.setdefault(column, (path, type_))
            if _kind(type_) != _kind(other):
                raise DataError(
                    f"the column {column} is of type {other} in {before} and of type {type_} in {path}, which cannot "
                    "be put together. Write the files with one type, or leave the column out of "
                    "prepare_metadata.columns and filters"
                )


def _kind(type_: pa.DataType) -> str:
    """Return what `_plain` makes of a type that has a form in JSON; times become texts."""
    if pa.types.is_integer(type_) or pa.types.is_floating(type_) or pa.types.is_decimal(type_):
        return "number"
    return "boolean" if pa.types.is_boolean(type_) else "text"


def _plain(column: pa.ChunkedArray, *, text: bool = False) -> pa.ChunkedArray:
    """Return a column as a type that JSON has, with 64-bit offsets, so that no number of rows is too many."""
    type_ = column.type
    if text or _is_text(type_):
        column = _valid(pc.cast(column, pa.large_string()))
        type_ = column.type
    if text or _is_text(type_):
        return pc.fill_null(pc.cast(column, pa.large_string()), "") if text else pc.cast(column, pa.large_string())
    tests = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_null)
    if any(test(type_) for test in tests):  # a column of gaps alone takes the type that it has in other files
        return column
    return pc.cast(column, pa.float64() if pa.types.is_decimal(type_) else pa.large_string())


def _valid(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return texts with what is not UTF-8 replaced: Arrow does not look at it when it reads, and fails on it later."""
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        found = pc.cast(column, pa.large_binary()).to_pylist()
        texts = [None if each is None else each.decode("utf-8", errors="replace") for each in found]
        return pa.chunked_array([pa.array(texts, pa.large_string())])
    return column


def _explained(path: str, error: Exception) -> DataError | StorageError:
    said = re.sub(r"\s+", " ", str(error))[:300]
    if isinstance(error, pa.ArrowInvalid) or "Parquet" in said:
        return DataError(f"{path} is no whole parquet file ({said}). Remove it, or write it again")
    return StorageError(f"read {path}: {said}")
