"""What fewstep adds to the processes of img2dataset: a copy of this file is the sitecustomize of their interpreter.

Five things that img2dataset has no options for, each of which would spoil a large run:

- Its timeout is one of each read. A server that sends a byte now and then, or a picture without end (a camera on the
  web), holds a thread for ever, and with it all that was downloaded. Answers are bounded in seconds and bytes.
- It decodes so that a picture's orientation (EXIF) is ignored and then lost, and that all of a picture of 16 bits but
  its darkest parts becomes white. Pictures are turned and scaled.
- It connects to whatever a table or a redirection names, services within the network and the machine's own included.
  Addresses that are not public are refused.
- It asks as fast as it can, and again at once where a server says that it is asked too much. Requests are spread over
  time; what a server asks for (429, 503, Retry-After) is waited for, or the address given up.
- Its processes go on when the one that started them is killed. They end with it.

This runs in another environment than fewstep, so it uses the standard library alone, and OpenCV where that is there.
"""

from __future__ import annotations

import email.utils
import ipaddress
import os
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

_LOOK_EVERY_S = 1.0


def bound_answers(*, seconds: float, max_bytes: int) -> None:
    """Let reading an HTTP answer fail when it takes longer, or is larger, head and body together."""
    readinto = socket.SocketIO.readinto

    def bounded(self: Any, buffer: Any) -> int | None:
        if not hasattr(self, "fewstep_deadline"):  # one object a connection, and one connection an answer
            self.fewstep_deadline, self.fewstep_bytes = time.monotonic() + seconds, 0
        if time.monotonic() > self.fewstep_deadline:
            raise TimeoutError(f"fewstep: not complete after {seconds:g} s")
        count = readinto(self, buffer)
        self.fewstep_bytes += count or 0
        if self.fewstep_bytes > max_bytes:
            raise OSError(f"fewstep: larger than {max_bytes} bytes")
        return count

    socket.SocketIO.readinto = bounded  # type: ignore[method-assign,assignment]


def refuse_private() -> None:
    """Let connecting to an address that is not public fail, unless it is a proxy's that the environment names."""
    connect = socket.socket.connect
    proxies = {(sent_to[0], sent_to[1]) for url in getproxies().values() for sent_to in _addresses_of(url)}

    def checked(self: Any, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and (address[0], address[1]) not in proxies:
            number = ipaddress.ip_address(address[0].partition("%")[0])
            number = getattr(number, "ipv4_mapped", None) or number
            if not number.is_global or number.is_multicast:
                raise OSError(f"fewstep: {number} is no public address")
        connect(self, address)

    socket.socket.connect = checked  # type: ignore[method-assign]


def _addresses_of(url: str) -> list[Any]:
    parts = urlsplit(url if "//" in url else f"//{url}")
    try:
        found = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_STREAM)
    except (OSError, ValueError):  # a proxy that is not there is told by the first connection
        return []
    return [entry[4] for entry in found]


def ask_in_turn(*, per_s: float | None, longest_pause_s: float) -> None:
    """Let requests begin no faster than so many a second, and a thread pause when a server answers 429 or 503.

    It pauses as long as the server says, otherwise a second, but no longer than `longest_pause_s`. Where the server
    said more, the address is given up: the thread's next tries of it fail with the same answer, without a request.
    """
    urlopen, lock, turn, given_up = urllib.request.urlopen, threading.Lock(), [0.0], threading.local()

    def asked_in_turn(url: Any, *arguments: Any, **options: Any) -> Any:
        address = getattr(url, "full_url", url)
        if address == getattr(given_up, "address", None):
            code, message, headers = given_up.answer
            raise urllib.error.HTTPError(address, code, message, headers, None)
        if per_s is not None:
            with lock:
                now = time.monotonic()
                mine = max(now, turn[0])
                turn[0] = mine + 1 / per_s
            time.sleep(mine - now)
        try:
            return urlopen(url, *arguments, **options)
        except urllib.error.HTTPError as error:
            if error.code in (429, 503):
                said_s = _seconds_of(str(error.headers.get("Retry-After", "")).strip())
                if said_s is not None and said_s > longest_pause_s:
                    # All tries of an address follow each other in one thread.
                    given_up.address, given_up.answer = address, (error.code, error.msg, error.headers)
                time.sleep(min(1.0 if said_s is None else said_s, longest_pause_s))
            raise

    urllib.request.urlopen = asked_in_turn


def _seconds_of(retry_after: str) -> float | None:
    """Return the seconds from now that a Retry-After tells, as their number or as a date; None: neither."""
    if retry_after.isascii() and retry_after.isdigit():
        return float(retry_after)
    try:
        date = email.utils.parsedate_tz(retry_after)
        return None if date is None else max(0.0, email.utils.mktime_tz(date) - time.time())
    except (ValueError, OverflowError):  # no day of the calendar
        return None


def decode_as_seen() -> None:
    """Let OpenCV turn JPEGs as their EXIF says, and scale 16 bits to 8; it refuses what has other numbers."""
    try:
        import cv2
    except ImportError:  # not a process that decodes
        return
    decode = cv2.imdecode

    def imdecode(data: Any, flags: int) -> Any:
        if bytes(data[:2]) == b"\xff\xd8":  # has neither transparency nor 16 bits, which the next flag would lose
            return decode(data, cv2.IMREAD_ANYCOLOR)
        picture = decode(data, flags)
        if picture is not None and picture.dtype == "uint16":
            return (picture // 257).astype("uint8")
        return picture if picture is not None and picture.dtype == "uint8" else None

    cv2.imdecode = imdecode


def end_with(parent: int) -> None:
    """Kill the whole process group when its first process is no longer a child of `parent`."""
    if os.getpid() != os.getpgid(0):
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_EVERY_S)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, name="fewstep-parent", daemon=True).start()
