"""Reads a range of bytes of one stored object, over as many connections as it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from botocore.exceptions import ClientError

from fewstep.errors import StorageError
from fewstep.storage.faults import Backoff, Place, RetryLimits, error_code, final_error, is_passing
from fewstep.storage.pace import at_pace

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class ObjectRange:
    """Some bytes of an object, and what the whole object is.

    Attributes:
        data: the bytes from the start of the range on; fewer than asked for where the object ends.
        size_bytes: of the whole object.
        etag: the store's fingerprint of its content (empty for local files).
    """

    data: bytearray
    size_bytes: int
    etag: str


def read_range(
    get: Callable[[dict[str, str]], dict[str, Any]],
    start: int,
    end: int,
    *,
    etag: str | None,
    what: str,
    limits: RetryLimits,
    place: Place,
) -> ObjectRange:
    """Return the bytes `start` to `end` (not included) of an object.

    When the connection breaks, the next one starts at the byte reached. Each byte that arrives starts the count of
    tries anew.

    Args:
        get: S3's GetObject with extra request headers.
        start, end: 0 ≤ start < end.
        etag: read only if the object has it; None: take the first answer's, and hold the further ones to it.
        what, limits, place: for errors and retries.

    Raises:
        ObjectNotFoundError: there is no such object.
        ObjectChangedError: it has another ETag, or was written again while it was read.
        StorageError: it cannot be read in all tries.
    """
    data, size_bytes = bytearray(), end
    backoff = Backoff(limits)
    body: Any = None
    try:
        while start + len(data) < min(end, size_bytes):
            try:
                if body is None:
                    answer = _ask(get, start + len(data), end, etag)
                    if answer is None:  # the object ends before the range begins
                        return ObjectRange(data, 0, etag or "")
                    body = answer["Body"]
                    size_bytes = _whole_size(answer, start + len(data), what=what, place=place)
                    etag = answer["ETag"]
                left = min(end, size_bytes) - start - len(data)
                wanted = min(_CHUNK_BYTES, left)
                with at_pace(
                    body, wanted, read_timeout_s=limits.read_timeout_s, min_bytes_per_s=limits.read_min_bytes_per_s
                ):
                    chunk = body.read(wanted)
                if not chunk and left:
                    raise ConnectionError(f"the connection ended {left} bytes early")
                data += chunk
                if backoff.attempts > 1:
                    backoff = Backoff(limits)
            except Exception as error:
                _close(body)
                body = None
                if is_passing(error) and backoff.wait(error, what=f"{what} at byte {start + len(data)}"):
                    continue
                said = final_error(error, what=what, place=place, backoff=backoff)
                if said is None:
                    raise
                raise said from error
    finally:
        _close(body)
    return ObjectRange(data, size_bytes, (etag or "").strip('"'))


def _ask(
    get: Callable[[dict[str, str]], dict[str, Any]], start: int, end: int, etag: str | None
) -> dict[str, Any] | None:
    extra = {"Range": f"bytes={start}-{end - 1}"}
    if etag:
        extra["IfMatch"] = etag if etag.startswith('"') else f'"{etag}"'
    try:
        return get(extra)
    except ClientError as error:
        if error_code(error) in ("InvalidRange", "416"):
            return None
        raise


def _whole_size(answer: dict[str, Any], position: int, *, what: str, place: Place) -> int:
    status = answer["ResponseMetadata"]["HTTPStatusCode"]
    if status == 200 and position > 0:
        raise StorageError(f"{what}: {place.endpoint} does not serve parts of objects (Range).")
    said = str(answer.get("ContentRange", ""))  # "bytes 512-1023/4096"
    size = str(answer.get("ContentLength", "")) if status == 200 else said.rpartition("/")[2]
    # A connection that breaks in the middle of the head gives an answer that lacks the rest of it.
    if not size.isdigit() or "ETag" not in answer or (said and not said.startswith(f"bytes {position}-")):
        raise ConnectionError(f"the head of the answer is not whole (Content-Range {said!r})")
    return int(size)


def _close(body: Any) -> None:
    if body is not None:
        body.close()
