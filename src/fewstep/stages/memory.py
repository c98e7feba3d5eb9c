"""Time and memory of a stage, over the whole process tree: Ray's workers and the S3 server included."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType

import psutil

_EVERY_S = 1.0
_SAVE_EVERY_S = 20.0
#: Growth that is worth a closer look. Asking for the shared share makes the system walk through all pages of a process:
#: tens of milliseconds for a training worker, which cannot map memory meanwhile.
_GROWTH = 1.01
#: A look in any case: processes that end take shared pages with them and hide the growth of others.
_LOOK_EVERY_S = 20.0


class Usage:
    """Measures a block; use as a context manager.

    Args:
        earlier: what processes that were killed in the same block had used; it is counted in.
        save: called with this object now and then, so that a process that is killed leaves what it used.

    Attributes:
        seconds: wall-clock time of the block.
        peak_memory_bytes: most memory held at once by this process and its descendants, shared pages counted once
            (PSS) where the system tells them.
    """

    def __init__(self, earlier: tuple[float, int] = (0.0, 0), *, save: Callable[[Usage], None] | None = None) -> None:
        self._earlier_s, self.peak_memory_bytes = earlier
        self.seconds = self._earlier_s
        self._save = save
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="fewstep-memory", daemon=True)

    def __enter__(self) -> Usage:
        self._started = time.monotonic()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.count()

    def count(self) -> None:
        """Bring `seconds` up to now."""
        self.seconds = self._earlier_s + time.monotonic() - self._started

    def _watch(self) -> None:
        saved = time.monotonic()
        looked_at, looked = 0, saved
        while True:
            processes = _tree()
            resident = sum(_resident_bytes(process) for process in processes)
            if resident > _GROWTH * looked_at or time.monotonic() - looked >= _LOOK_EVERY_S:
                looked_at, looked = resident, time.monotonic()
                self.peak_memory_bytes = max(self.peak_memory_bytes, sum(_own_bytes(each) for each in processes))
            if self._save is not None and time.monotonic() - saved >= _SAVE_EVERY_S:
                saved = time.monotonic()
                self.count()
                self._save(self)
            if self._stop.wait(_EVERY_S):
                return


def _tree() -> list[psutil.Process]:
    this = psutil.Process()
    return [this, *this.children(recursive=True)]


def _resident_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0


def _own_bytes(process: psutil.Process) -> int:
    try:
        memory = process.memory_full_info()
        return int(getattr(memory, "pss", memory.rss))
    except psutil.Error:
        return 0
