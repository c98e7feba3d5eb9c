"""Reads a range of bytes of one stored object, over as many connections as it takes."""

from __future__ import annotations

import http.client
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from botocore.exceptions import ClientError
from botocore.response import StreamingBody

from fewstep.errors import StorageError
from fewstep.storage.faults import Backoff, ObjectChangedError, Place, RetryLimits, error_code, final_error, is_passing
from fewstep.storage.pace import TooSlowError, at_pace

_CHUNK_BYTES = 1 << 20
_STEP_BYTES = 1 << 16


@dataclass(frozen=True)
class ObjectRange:
    """Some bytes of an object, and what the whole object is.

    Attributes:
        data: the bytes from the start of the range on; fewer than asked for where the object ends. They may be
            written to.
        size_bytes: of the whole object.
        etag: the store's fingerprint of its content (empty for local files).
    """

    data: memoryview
    size_bytes: int
    etag: str


def empty_buffer(size_bytes: int) -> memoryview:
    """Return so many bytes of any value; a bytearray would be filled with zeros first, a tenth of a read's time."""
    return np.empty(size_bytes, np.uint8).data


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

    When the connection breaks, the next one starts near the byte reached: of what had come, less than 1 MiB at the
    first break and less than 64 KiB at each further one is asked for again. What is kept starts the count of tries
    anew, unless it came more slowly than it must.

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
    data, reached, size_bytes = empty_buffer(0), 0, end
    backoff, step_bytes = Backoff(limits), _CHUNK_BYTES
    body: Any = None
    try:
        while start + reached < min(end, size_bytes):
            before = reached
            try:
                if body is None:
                    answer = _ask(get, start + reached, end, etag)
                    if answer is None and not reached:  # the object ends before the range begins
                        return ObjectRange(empty_buffer(0), 0, _plain(etag))
                    found_bytes = 0
                    if answer is not None:
                        body = answer["Body"]
                        found_bytes = _whole_size(answer, start + reached, what=what, place=place)
                    # IfMatch asks for it, but not every server looks at that.
                    if (
                        answer is None
                        or (etag and _plain(answer["ETag"]) != _plain(etag))
                        or (reached and found_bytes != size_bytes)
                    ):
                        raise ObjectChangedError(
                            f"{what}: the object was written again meanwhile. Read it again from the start."
                        )
                    size_bytes, etag = found_bytes, answer["ETag"]
                    if not reached:
                        data = empty_buffer(max(0, min(end, size_bytes) - start))
                until = min(reached + _CHUNK_BYTES, len(data))
                with at_pace(
                    body, until - reached, read_timeout_s=limits.read_timeout_s,
                    min_bytes_per_s=limits.read_min_bytes_per_s,
                ):  # fmt: skip
                    while reached < until:
                        got = _read_into(body, data[reached : min(reached + step_bytes, until)])
                        if not got:
                            raise ConnectionError(f"the connection ended {len(data) - reached} bytes early")
                        reached += got
                backoff = Backoff(limits)
            except Exception as error:
                _close(body)
                body = None
                # A read that breaks does not say how much of it had come: that much is lost, so less is read at once.
                step_bytes = _STEP_BYTES
                # A connection that trickles would be tried for days if its bytes counted.
                if reached > before and not isinstance(error, TooSlowError):
                    backoff = Backoff(limits)
                if is_passing(error) and backoff.wait(error, what=f"{what} at byte {start + reached}"):
                    continue
                said = final_error(error, what=what, place=place, backoff=backoff)
                if said is None:
                    raise
                raise said from error
    finally:
        _close(body)
    return ObjectRange(data[:reached], size_bytes, _plain(etag))


def _ask(
    get: Callable[[dict[str, str]], dict[str, Any]], start: int, end: int, etag: str | None
) -> dict[str, Any] | None:
    extra = {"Range": f"bytes={start}-{end - 1}"}
    if etag:
        extra["IfMatch"] = f'"{_plain(etag)}"'
    try:
        return get(extra)
    except ClientError as error:
        if error_code(error) in ("InvalidRange", "416"):
            return None
        raise


def _plain(etag: str | None) -> str:
    # Proxies that may compress answers mark the store's ETag as weak (W/).
    return (etag or "").removeprefix("W/").strip('"')


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


def _read_into(body: Any, buffer: memoryview) -> int:
    """Read what comes next into the buffer, and return how many bytes; 0: the answer has ended.

    urllib3 hands out only copies of what it reads, even where it has `readinto`: they take a fifth of a read's time.
    Where the body is what botocore and urllib3 make of a plain answer, it is read below them.
    """
    below = _below(body)
    if below is not None:
        try:
            return below.readinto(buffer)
        except (http.client.HTTPException, OSError) as error:  # which urllib3 would have said in words of its own
            raise ConnectionError(f"the connection broke ({error!r})") from error
    chunk = body.read(len(buffer))
    buffer[: len(chunk)] = chunk
    return len(chunk)


def _below(body: Any) -> http.client.HTTPResponse | None:
    if type(body) is not StreamingBody:  # one that also looks at checksums must see all bytes
        return None
    below = getattr(getattr(body, "_raw_stream", None), "_fp", None)
    return below if isinstance(below, http.client.HTTPResponse) else None


def _close(body: Any) -> None:
    if body is None:
        return
    below = _below(body)
    if below is not None and below.isclosed():  # read to its end: the connection may be used again
        body._raw_stream.release_conn()
    body.close()
