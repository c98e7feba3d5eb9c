"""Ranges of objects: what is kept of a connection that breaks, and objects that change under a read."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import re
import socket
import struct
import termios
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from botocore.exceptions import ClientError

from fewstep.errors import StorageError
from fewstep.storage import ObjectChangedError, Storage, StorageSettings
from fewstep.storage.embedded import Credentials
from fewstep.storage.faults import Place
from fewstep.storage.object_range import read_range
from fewstep.storage.pace import TooSlowError

LIMITS, PLACE = StorageSettings(retry_base_s=0.01), Place("there", "b")


class RangeServer:
    """Answers each GET with the range asked for, whatever If-Match says; resets the connection after so many bytes."""

    def __init__(self, data: bytes, *, head: str = 'ETag: "x"', reset_after: int | None = None) -> None:
        self.data, self.head, self.reset_after = data, head, reset_after
        self.connections = 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, daemon=True).start()

    def storage(self, **changes: object) -> Storage:
        url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        values = {"kind": "s3", "endpoint_url": url, "retry_base_s": 0.01, **changes}
        return Storage(StorageSettings(**values), credentials=Credentials("someone", "secret"))  # type: ignore[arg-type]

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                self.connections += 1
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            asked = b""
            while data := client.recv(65536):
                asked += data
                if not asked.endswith(b"\r\n\r\n"):
                    continue
                start, end = (int(n) for n in re.findall(rb"(?i)\nrange: bytes=(\d+)-(\d+)", asked)[0])
                part, asked = self.data[start : end + 1], b""
                said = f"bytes {start}-{start + len(part) - 1}/{len(self.data)}"
                client.sendall(
                    f"HTTP/1.1 206 Partial Content\r\n{self.head}\r\nContent-Range: {said}\r\n"
                    f"Content-Length: {len(part)}\r\n\r\n".encode()
                )
                client.sendall(part[: self.reset_after])
                if self.reset_after is not None and len(part) > self.reset_after:
                    self._reset(client)
                    return

    def _reset(self, client: socket.socket) -> None:
        # What the other side has not yet got would be thrown away.
        for _ in range(5000):
            if not struct.unpack("i", fcntl.ioctl(client, termios.TIOCOUTQ, b"\0" * 4))[0]:
                break
            time.sleep(0.001)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@pytest.fixture
def serve() -> Iterator[Callable[..., RangeServer]]:
    servers = []

    def started(*args: object, **options: object) -> RangeServer:
        servers.append(RangeServer(*args, **options))  # type: ignore[arg-type]
        return servers[-1]

    yield started
    for server in servers:
        server.listener.close()


def test_connections_that_are_reset_before_a_megabyte_get_on(serve: Callable[..., RangeServer]) -> None:
    """The error comes in place of the bytes that the same read had already got."""
    data = os.urandom(1_000_000)
    server = serve(data, reset_after=300_000)
    assert bytes(server.storage(retry_attempts=3).read_range("s3://bucket/key", 0, 1_000_000).data) == data
    assert server.connections <= 6


def test_a_connection_that_breaks_late_is_tried_again() -> None:
    """The time of all tries counts from the last bytes, not from the first."""
    bodies = [b"x" * (1 << 20), b"y" * 1000]

    class Slow(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            time.sleep(0.6 if size == 1 << 20 else 0)
            return super().read(size)

    def get(extra: dict[str, str]) -> dict[str, object]:
        begin = int(extra["Range"].removeprefix("bytes=").split("-")[0])
        said = {"ContentRange": f"bytes {begin}-1049575/1049576", "ETag": '"x"', "Body": Slow(bodies.pop(0))}
        return {"ResponseMetadata": {"HTTPStatusCode": 206}, **said}

    limits = StorageSettings(retry_base_s=0.01, retry_total_s=0.5)
    found = read_range(get, 0, 1_049_576, etag=None, what="read it", limits=limits, place=PLACE)
    assert bytes(found.data[-1001:]) == b"x" + b"y" * 1000


def test_bytes_that_come_too_slowly_do_not_start_the_count_of_tries_anew() -> None:
    class Trickle(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell():
                raise TooSlowError("it gave less")
            return super().read(1000)

    begins = []

    def get(extra: dict[str, str]) -> dict[str, object]:
        begins.append(begin := int(extra["Range"].removeprefix("bytes=").split("-")[0]))
        said = {"ContentRange": f"bytes {begin}-99999/100000", "ETag": '"x"', "Body": Trickle(bytes(2000))}
        return {"ResponseMetadata": {"HTTPStatusCode": 206}, **said}

    limits = StorageSettings(retry_base_s=0.01, retry_attempts=3)
    with pytest.raises(StorageError, match="did not answer properly in 3 attempts"):
        read_range(get, 0, 100_000, etag=None, what="read it", limits=limits, place=PLACE)
    assert begins == [0, 1000, 2000]


@pytest.mark.parametrize("head", ['ETag: "x"', "ETag: x", 'ETag: W/"x"'])
@pytest.mark.parametrize("quote", ["", '"'])
def test_the_etag_asked_for_is_held_to_where_the_server_does_not(
    serve: Callable[..., RangeServer], head: str, quote: str
) -> None:
    storage = serve(bytes(5000), head=head).storage()
    found = storage.read_range("s3://bucket/key", 0, 1000, etag=f"{quote}x{quote}")
    assert (len(found.data), found.etag) == (1000, "x")
    with pytest.raises(ObjectChangedError, match="key: the object was written again meanwhile"):
        storage.read_range("s3://bucket/key", 0, 1000, etag=f"{quote}y{quote}")


def test_an_answer_without_an_etag_is_no_answer(serve: Callable[..., RangeServer]) -> None:
    storage = serve(bytes(5000), head="Server: odd").storage(retry_attempts=2)
    with pytest.raises(StorageError, match=r"did not answer properly in 2 attempts .*the head of the answer"):
        storage.read_range("s3://bucket/key", 0, 1000, etag="x")


def test_a_range_is_read_from_any_body() -> None:
    """One that a library wraps, as to look at checksums, is read through what it wraps it in."""
    data, asked = bytes(range(256)) * 10_000, []

    def get(extra: dict[str, str]) -> dict[str, object]:
        asked.append(extra)
        begin = int(extra["Range"].removeprefix("bytes=").split("-")[0])
        body = io.BytesIO(data[begin : begin + 1_500_000])  # each answer is cut short there
        said = {"ContentRange": f"bytes {begin}-{len(data) - 1}/{len(data)}", "ETag": '"x"', "Body": body}
        return {"ResponseMetadata": {"HTTPStatusCode": 206}, **said}

    found = read_range(get, 100, len(data), etag=None, what="read it", limits=LIMITS, place=PLACE)
    assert bytes(found.data) == data[100:]
    assert [extra["Range"] for extra in asked] == ["bytes=100-2559999", "bytes=1500100-2559999"]
    assert asked[1]["IfMatch"] == '"x"'


@pytest.mark.parametrize(
    "said",
    [{"ContentRange": "bytes 1000-2999/3000"}, {"ContentRange": "bytes 1000-999/1000"}, {"ETag": '"y"'}],
)
def test_an_object_that_changes_under_a_read_is_told_where_the_server_does_not(said: dict[str, str]) -> None:
    answers = [{"ContentRange": "bytes 0-1999/2000", "ETag": '"x"', "Body": io.BytesIO(bytes(1000))}]
    answers += [{"ContentRange": "bytes 1000-1999/2000", "ETag": '"x"', "Body": io.BytesIO(bytes(1000)), **said}]

    def get(extra: dict[str, str]) -> dict[str, object]:
        return {"ResponseMetadata": {"HTTPStatusCode": 206}, **answers.pop(0)}

    with pytest.raises(StorageError, match="the object was written again meanwhile"):
        read_range(get, 0, 2000, etag=None, what="read it", limits=LIMITS, place=PLACE)


def test_an_object_that_ends_before_what_was_read_has_changed() -> None:
    answers = [{"ContentRange": "bytes 0-1999/2000", "ETag": '"x"', "Body": io.BytesIO(bytes(1000))}]

    def get(extra: dict[str, str]) -> dict[str, object]:
        if not answers:
            raise ClientError({"Error": {"Code": "InvalidRange"}}, "GetObject")
        return {"ResponseMetadata": {"HTTPStatusCode": 206}, **answers.pop(0)}

    with pytest.raises(StorageError, match="the object was written again meanwhile"):
        read_range(get, 0, 2000, etag=None, what="read it", limits=LIMITS, place=PLACE)
