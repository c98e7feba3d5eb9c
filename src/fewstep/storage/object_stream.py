"""Reads one stored object from start to end over as many connections as it takes."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from fewstep.errors import StorageError
from fewstep.storage.faults import Backoff, Place, RetryLimits, final_error, is_passing, retrying
from fewstep.storage.pace import at_pace


class ObjectStream(io.RawIOBase):
    """A raw binary stream over ``get(extra)``, S3's GetObject with extra request headers.

    When the connection breaks, the next one starts at the byte reached and only if the object is still the same one.
    Each byte that arrives starts the count of tries anew.
    """

    def __init__(
        self, get: Callable[[dict[str, str]], dict[str, Any]], *, what: str, limits: RetryLimits, place: Place
    ) -> None:
        self._get, self._what, self._limits, self._place = get, what, limits, place
        self._position = 0
        self._etag: str | None = None
        self._size_bytes = 0
        self._body: Any = None
        retrying(lambda _: self._connect(), limits=limits, what=what, place=place)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        backoff = Backoff(self._limits)
        what = f"{self._what} at byte {self._position}"
        while self._position < self._size_bytes:
            try:
                data = self._read(len(buffer))
            except Exception as error:
                self._disconnect()
                if is_passing(error) and backoff.wait(error, what=what):
                    continue
                said = final_error(error, what=what, place=self._place, backoff=backoff)
                if said is None:
                    raise
                raise said from error
            buffer[: len(data)] = data
            self._position += len(data)
            return len(data)
        return 0

    def close(self) -> None:
        self._disconnect()
        super().close()

    def _read(self, size_bytes: int) -> bytes:
        if self._body is None:
            self._connect()
        left = self._size_bytes - self._position
        wanted, limits = min(size_bytes, left), self._limits
        with at_pace(
            self._body, wanted, read_timeout_s=limits.read_timeout_s, min_bytes_per_s=limits.read_min_bytes_per_s
        ):
            data: bytes = self._body.read(wanted)
        if not data:
            raise ConnectionError(f"the connection ended {left} bytes early")
        return data

    def _connect(self) -> None:
        extra = {} if self._etag is None else {"Range": f"bytes={self._position}-", "IfMatch": self._etag}
        answer = self._get(extra)
        if self._etag is None:
            self._etag, self._size_bytes = answer["ETag"], answer["ContentLength"]
        elif self._position and answer["ResponseMetadata"]["HTTPStatusCode"] != 206:
            answer["Body"].close()
            raise StorageError(f"{self._what}: {self._place.endpoint} does not serve parts of objects (Range).")
        self._body = answer["Body"]

    def _disconnect(self) -> None:
        body, self._body = self._body, None
        if body is not None:
            body.close()
