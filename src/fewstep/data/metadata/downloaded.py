"""Pictures that img2dataset downloaded, as samples for shards, in the order of the rows that named them."""

from __future__ import annotations

import json
import math
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from fewstep.errors import DataError

#: What img2dataset finds out about a picture; in a sample's .json it stands under these names.
FROM_THE_PICTURE = ("width", "height", "original_width", "original_height", "sha256")
#: In img2dataset's keys, before the number of the row within the tar.
SHARD_DIGITS = 5


@dataclass(frozen=True)
class Place:
    """Where a picture lies: its row in the table, and offset and bytes in a tar of the JPEG and of the .json."""

    row: int
    jpg: tuple[int, int]
    json: tuple[int, int]


@dataclass(frozen=True)
class Downloaded:
    """What became of rows: attempted = succeeded + all failures.

    Attributes:
        attempted: rows.
        succeeded: pictures.
        failures: rows without a picture, by reason.
        seconds: that img2dataset ran.
        num_bytes: of the pictures as they are stored.
        rows: the table.
        tars: what img2dataset wrote, with the places of the pictures in the order of the rows.
    """

    attempted: int
    succeeded: int
    failures: dict[str, int]
    seconds: float
    num_bytes: int
    rows: pa.Table = field(repr=False)
    tars: tuple[tuple[Path, tuple[Place, ...]], ...] = field(repr=False)

    def samples(self) -> Iterator[dict[str, Any]]:
        """Yield ``__key__``, ``jpg``, ``txt`` and ``json`` of each picture, in the order of the rows.

        The .json has the row's columns and what was found in the picture: width and height as stored,
        original_width and original_height as sent, and the SHA-256 of the file as sent. Numbers that are not finite
        become null. The same rows and pictures give the same bytes. The folder of the download has to be there still.
        """
        for tar, places in self.tars:
            rows = self.rows.take(pa.array([place.row for place in places], pa.int64())).to_pylist()
            with open(tar, "rb") as file:
                for row, place in zip(rows, places, strict=True):
                    found = json.loads(_read(file, place.json))
                    record = {name: _plain(value) for name, value in row.items()}
                    record |= {name: found[name] for name in FROM_THE_PICTURE}
                    yield {
                        "__key__": row["key"],
                        "jpg": _read(file, place.jpg),
                        "txt": (row["caption"] or "").encode(),
                        "json": json.dumps(record, ensure_ascii=False, default=str).encode(),
                    }


def places_of(tar: Path, numbers: Sequence[int]) -> Iterator[Place]:
    """Yield the places of a tar's pictures in the order of its rows, which have these numbers in the table.

    Raises:
        DataError: the tar is damaged.
    """
    members: dict[int, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(tar, "r:") as opened:
            for member in opened:
                key, _, extension = member.name.partition(".")
                place = (member.offset_data, member.size)
                members.setdefault(int(key[SHARD_DIGITS:] or 0), {})[extension] = place
    except tarfile.TarError as error:
        raise DataError(
            f"the tar {tar.name} of img2dataset is damaged ({error}). Is the disk of {tar.parent} full? Give it more "
            "room, or lower rows_per_shard"
        ) from error
    for number in sorted(members):
        if {"jpg", "json"} <= members[number].keys():
            yield Place(numbers[number], members[number]["jpg"], members[number]["json"])


def _read(file: BinaryIO, place: tuple[int, int]) -> bytes:
    file.seek(place[0])
    return file.read(place[1])


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
