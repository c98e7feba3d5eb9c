"""An iterator whose next items are made by a thread while the current one is used."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable
from typing import TypeVar

T = TypeVar("T")
_POLL_S = 0.1


def made_ahead(items: Iterable[T], *, count: int) -> Generator[T, None, None]:
    """Yield the items; a thread of its own makes up to `count` of them ahead, and ends with the iterator (`close`).

    What making them raises is raised where the item would have come.
    """
    ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(count)
    ended = threading.Event()

    def put(item: T | None, error: BaseException | None) -> None:
        while not ended.is_set():
            try:
                ready.put((item, error), timeout=_POLL_S)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put(item, None)
                if ended.is_set():
                    return
            put(None, StopIteration())
        except BaseException as error:
            put(None, error)

    thread = threading.Thread(target=work, name="fewstep-ahead", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]
    finally:
        ended.set()
        thread.join()
