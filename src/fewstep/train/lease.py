"""One training, one driver: workflows that share a training (its folder is named by what it depends on) take turns."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fewstep.errors import StorageError
from fewstep.storage import ObjectNotFoundError

if TYPE_CHECKING:
    from fewstep.storage import Storage

logger = logging.getLogger(__name__)

#: A holder beats this often; one that has not for `_STALE_S` is taken for dead.
_BEAT_EVERY_S = 10.0
_STALE_S = 60.0
_LOOK_EVERY_S = 2.0


@contextmanager
def lease(uri: str, *, storage: Storage, what: str) -> Iterator[None]:
    """Hold the object `uri` for the length of the block; wait while another process holds it.

    The lease of a process that was killed on this machine is taken over at once, that of one elsewhere when it has not
    given a sign of life for a minute. Clocks are not compared: what counts is whether the object changes.

    Args:
        uri: object in the store that stands for the right to write beside it.
        storage: the store.
        what: what is waited for, in words.
    """
    mine = {"owner": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid()}
    _acquire(uri, mine, storage=storage, what=what)
    ended = threading.Event()
    thread = threading.Thread(target=_beat, args=(uri, mine, storage, ended), name="fewstep-lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        held = _held(uri, storage)
        if held is not None and held["owner"] == mine["owner"]:  # not that of one who took this one for dead
            storage.delete(uri)


def _acquire(uri: str, mine: dict[str, Any], *, storage: Storage, what: str) -> None:
    last: dict[str, Any] | None = None
    changed = time.monotonic()
    while not storage.write_bytes(uri, _content(mine, 0), if_absent=True):
        held = _held(uri, storage)
        if held is None:  # given back since
            continue
        if last is None:
            logger.info("%s: process %s on %s is at it; waiting for it", what, held["pid"], held["host"])
        if held != last:
            last, changed = held, time.monotonic()
        if _is_dead(held, mine["host"]) or time.monotonic() - changed > _STALE_S:
            storage.write_bytes(uri, _content(mine, 0))
            time.sleep(_LOOK_EVERY_S)  # another that waits may have done the same; the last to write has it
            held = _held(uri, storage)
            if held is not None and held["owner"] == mine["owner"]:
                return
        time.sleep(_LOOK_EVERY_S)


def _held(uri: str, storage: Storage) -> dict[str, Any] | None:
    try:  # not `exists` first: the holder may give it back between the two
        held: dict[str, Any] = storage.read_json(uri)
    except ObjectNotFoundError:
        return None
    return held


def _is_dead(held: dict[str, Any], host: str) -> bool:
    if held["host"] != host:
        return False
    try:
        os.kill(held["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _beat(uri: str, mine: dict[str, Any], storage: Storage, ended: threading.Event) -> None:
    count = 0
    while not ended.wait(_BEAT_EVERY_S):
        count += 1
        try:
            held = _held(uri, storage)
            if held is not None and held["owner"] != mine["owner"]:
                logger.warning(
                    "lease %s: process %s on %s took it over; both may train the same now",
                    uri,
                    held["pid"],
                    held["host"],
                )
                return
            storage.write_bytes(uri, _content(mine, count))
        except StorageError as error:  # the training itself will say so, if it lasts
            logger.debug("lease %s: %s", uri, error)


def _content(mine: dict[str, Any], beat: int) -> bytes:
    return json.dumps({**mine, "beat": beat}).encode()
