"""What prepare's tasks do, each in a process of Ray's: little is imported here, as there may be hundreds of them."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from fewstep.data.metadata.download import DownloadSettings, download
from fewstep.data.metadata.selection import Part, read_part
from fewstep.data.shards import write_tar
from fewstep.errors import DataError
from fewstep.storage import Storage, disk_errors, join

T = TypeVar("T")

#: A download of so many rows that brings not one picture tells of the network or of the settings, not of the pictures.
_ROWS_THAT_CANNOT_ALL_FAIL = 100


@dataclass(frozen=True)
class DownloadedPart:
    """What became of a part, named by its digest; shard is None when none of its pictures could be had."""

    part: str
    shard: dict[str, Any] | None
    attempted: int
    failures: dict[str, int]
    seconds: float


def recorded(call: Callable[[], Any], uri: str, storage: Storage) -> None:
    """Do one call, and write what it returns, dataclasses, as JSON at `uri`."""
    result = call()
    storage.write_json(uri, [asdict(each) for each in result] if isinstance(result, list) else asdict(result))


def load(type_: type[T], uri: str, storage: Storage) -> T:
    """Return what `recorded` wrote at `uri`."""
    return TypeAdapter(type_).validate_python(storage.read_json(uri))


def download_part(
    part: Part, target: str, record_uri: str, settings: DownloadSettings, storage: Storage
) -> DownloadedPart:
    """Download the pictures of a part into a shard below `target`, and write the record of it.

    A part that another task has recorded meanwhile is left as that one left it.

    Raises:
        DataError: img2dataset is not installed or dies, or of many pictures not one could be had.
    """
    rows = read_part(part.uri, storage=storage)
    with tempfile.TemporaryDirectory(prefix="fewstep-download-") as folder:
        fetched = download(rows, Path(folder), settings=settings)
        if not fetched.succeeded and fetched.attempted >= _ROWS_THAT_CANNOT_ALL_FAIL:
            raise DataError(nothing_came(fetched.attempted, fetched.failures))
        shard: dict[str, Any] | None = None
        if fetched.succeeded:
            path = Path(folder, "part.tar")
            with disk_errors(f"write {path}", path), path.open("wb") as file:
                write_tar(fetched.samples(), file)
            with path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            # What the web gives differs from try to try: with its digest in its name, a shard that a second task of the
            # same part writes is another one, and the record says which of the two counts.
            name = f"{part.name}-{sha256[:8]}.tar"
            storage.upload_file(path, join(target, name))
            shard = {
                "name": name, "num_samples": fetched.succeeded, "size_bytes": path.stat().st_size, "sha256": sha256
            }  # fmt: skip
    result = DownloadedPart(part.digest, shard, fetched.attempted, fetched.failures, fetched.seconds)
    while not storage.write_bytes(record_uri, json.dumps(asdict(result)).encode(), if_absent=True):
        first = load(DownloadedPart, record_uri, storage)
        if first.part == part.digest:
            if shard is not None and (first.shard is None or first.shard["name"] != shard["name"]):
                storage.delete(join(target, shard["name"]))
            return first
        storage.delete(record_uri)  # of other rows
    return result


def nothing_came(attempted: int, failures: dict[str, int]) -> str:
    """Return what is said of a download that brought no picture."""
    reasons = ", ".join(f"{count} × {reason}" for reason, count in sorted(failures.items(), key=lambda each: -each[1]))
    return (
        f"prepare_metadata: of {attempted} pictures not one could be had: {reasons}. Can this machine reach the "
        "addresses, by a proxy perhaps (HTTPS_PROXY)? Do the limits in prepare_metadata.download leave any picture?"
    )
