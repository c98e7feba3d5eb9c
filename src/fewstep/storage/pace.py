"""Ends connections that give bytes too slowly.

A time-out of the socket is for silence: a byte now and then sets it back, and a read of a megabyte may take days. So
each read has a time by which it must be whole, kept by one thread of the process.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

_LOOK_EVERY_S = 1.0


class TooSlowError(ConnectionError):
    """A connection that gave bytes more slowly than it must."""


class _Watch:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._reads: dict[int, tuple[float, Any]] = {}  # (until when by time.monotonic(), body)
        self._late: set[int] = set()
        self._thread: threading.Thread | None = None
        self._last = 0

    def begin(self, body: Any, seconds: float) -> int:
        with self._lock:
            self._last += 1
            self._reads[self._last] = (time.monotonic() + seconds, body)
            if self._thread is None or not self._thread.is_alive():  # not yet, or in a forked process
                self._thread = threading.Thread(target=self._look, name="fewstep-pace", daemon=True)
                self._thread.start()
            number = self._last
        self._wake.set()
        return number

    def end(self, number: int) -> bool:
        """Return whether the read was late."""
        with self._lock:
            self._reads.pop(number, None)
            late = number in self._late
            self._late.discard(number)
        return late

    def _look(self) -> None:
        while True:
            with self._lock:
                now = time.monotonic()
                late = {number: body for number, (until, body) in self._reads.items() if until < now}
                for number in late:
                    del self._reads[number]
                self._late |= late.keys()
                busy = bool(self._reads)
            for body in late.values():
                _cut(body)
            if busy:
                time.sleep(_LOOK_EVERY_S)
            else:
                self._wake.wait()
                self._wake.clear()


_watch = _Watch()


@contextmanager
def at_pace(body: Any, size_bytes: int, *, read_timeout_s: float, min_bytes_per_s: float) -> Iterator[None]:
    """Let a read of `size_bytes` from the body of an answer, in the block, take no longer than it may.

    That is as long as `min_bytes_per_s` takes for it, but at least `read_timeout_s`; 0: any time.

    Raises:
        TooSlowError: it took longer, and the connection was cut.
    """
    if not min_bytes_per_s:
        yield
        return
    number = _watch.begin(body, max(read_timeout_s, size_bytes / min_bytes_per_s))
    late = False
    try:
        yield
    except Exception:
        late = _watch.end(number)
        if not late:
            raise
    else:
        late = _watch.end(number)
    if late:
        raise TooSlowError(f"it gave less than {min_bytes_per_s:g} bytes/s (storage.read_min_bytes_per_s)")


def _cut(body: Any) -> None:
    # botocore's StreamingBody around urllib3's answer, which alone may be ended while another thread reads from it.
    answer = getattr(body, "_raw_stream", body)
    with suppress(OSError, ValueError, RuntimeError, AttributeError):
        answer.shutdown()
