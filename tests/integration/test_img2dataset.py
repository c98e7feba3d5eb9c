"""The real img2dataset, in its own environment, against a server with every kind of answer that the web has."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from fewstep.data.metadata.download import Downloaded, DownloadSettings, download
from fewstep.data.pictures import decode_picture
from fewstep.data.shards import read_index, write_shards
from fewstep.storage import Storage, StorageSettings

pytestmark = [pytest.mark.img2dataset, pytest.mark.slow]

COMMAND = Path(__file__).parents[2] / ".venv-img2dataset/bin/img2dataset"
SETTINGS = DownloadSettings(
    command=str(COMMAND), image_size=64, min_image_size=32, max_aspect_ratio=3.0, max_image_area=640_000,
    max_bytes=2**20, threads=100, timeout_s=1.5, answer_timeout_s=2.0, retries=1, stall_timeout_s=60.0,
    private_addresses=True, user_agent_token="1E5",  # a number too, to img2dataset, unless it is quoted
)  # fmt: skip


def encoded(size: tuple[int, int], form: str = "JPEG", *, mode: str = "RGB", orientation: int = 1) -> bytes:
    """A picture with a dark left and a light right half."""
    left, right = (40, 215) if mode != "I;16" else (40 * 257, 215 * 257)
    grey = np.where(np.arange(size[0]) < size[0] // 2, left, right)[None].repeat(size[1], 0)
    if mode == "I;16":
        picture = Image.fromarray(grey.astype(np.uint16))
    else:
        picture = Image.fromarray(grey.astype(np.uint8)).convert(mode)
        if mode == "RGBA":
            picture.putalpha(0)
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    picture.save(buffer, form, **({"exif": exif, "quality": 90} if form == "JPEG" else {}))
    return buffer.getvalue()


@dataclass
class Web:
    """A server on this machine; `rows` are addresses with the size of the stored picture or why there is none."""

    port: int = 0
    user_agents: set[str | None] = field(default_factory=set)
    asked: Counter[str] = field(default_factory=Counter)
    answers: dict[str, Callable[[BaseHTTPRequestHandler], None]] = field(default_factory=dict)
    rows: list[tuple[str, tuple[int, int] | str]] = field(default_factory=list)

    def add(self, path: str, becomes: tuple[int, int] | str, answer: Callable[[BaseHTTPRequestHandler], None]) -> None:
        self.answers[path] = answer
        self.rows.append((f"http://127.0.0.1:{self.port}{path}", becomes))

    def add_picture(self, path: str, becomes: tuple[int, int] | str, data: bytes, **headers: str) -> None:
        self.add(path, becomes, lambda request: send(request, 200, data, **headers))


class Server(ThreadingHTTPServer):
    request_queue_size = 128  # all connections of img2dataset at once; what finds no room is not heard of in time


def send(request: BaseHTTPRequestHandler, status: int, data: bytes = b"", **headers: str) -> None:
    request.send_response(status)
    for name, value in headers.items():
        request.send_header(name.replace("_", "-"), value)
    request.send_header("Content-Length", str(len(data)))
    request.end_headers()
    request.wfile.write(data)


def send_in_drops(request: BaseHTTPRequestHandler) -> None:
    """Each read ends in time, the whole never does."""
    request.send_response(200)
    request.end_headers()
    for _ in range(100):
        time.sleep(0.3)
        request.wfile.write(b"\xff")
        request.wfile.flush()


def send_without_end(request: BaseHTTPRequestHandler) -> None:
    request.send_response(200)
    request.end_headers()
    while True:
        request.wfile.write(b"\xff\xd8" * 2**15)


def send_late(request: BaseHTTPRequestHandler) -> None:
    time.sleep(3.0)
    send(request, 200, encoded((100, 100)))


def send_half(request: BaseHTTPRequestHandler) -> None:
    request.send_response(200)
    request.send_header("Content-Length", "100000")
    request.end_headers()
    request.wfile.write(b"\xff\xd8" * 10)


def fill(web: Web) -> None:
    """Say what the web has. Each failing kind comes in a number of its own, so that no two counts can be mixed up."""
    web.add_picture("/reduced.jpg", (128, 64), encoded((320, 160)))
    web.add_picture("/as-sent.jpg", (48, 40), encoded((48, 40)))
    web.add_picture("/tall.png", (64, 96), encoded((200, 300), "PNG"))
    web.add_picture("/small.png", (50, 50), encoded((50, 50), "PNG"))
    web.add_picture("/größe ä.webp", (64, 64), encoded((80, 80), "WEBP"))
    web.add_picture("/turned.jpg", (64, 128), encoded((320, 160), orientation=6))
    web.add_picture("/deep.png", (64, 64), encoded((80, 80), "PNG", mode="I;16"))
    web.add_picture("/clear.png", (64, 64), encoded((80, 80), "PNG", mode="RGBA"))
    web.add("/moved.jpg", (128, 64), lambda request: send(request, 301, Location="/reduced.jpg"))
    web.add("/busy.jpg", (100 * 64 // 80, 64), lambda request: (
        send(request, 200, encoded((100, 80))) if web.asked["/busy.jpg"] % 2 == 0 else send(request, 503)
    ))  # fmt: skip
    web.add_picture("/tiny.jpg", "image too small", encoded((100, 31)))
    web.add_picture("/too-large.jpg", "image area too large", encoded((801, 800)))
    web.add_picture("/long.jpg", "aspect ratio too large", encoded((400, 100)))
    for name, data in {"text": b"<html>gone</html>", "half": encoded((200, 200), "PNG")[:90], "empty": b""}.items():
        web.add_picture(f"/broken-{name}.jpg", "broken picture", data)
    web.add("/late.jpg", "timeout", send_late)
    web.add("/drops.jpg", "timeout", send_in_drops)
    web.add("/endless.jpg", "too many bytes", send_without_end)
    web.add("/cut.jpg", "connection lost", send_half)
    for number in range(4):
        web.add(f"/missing-{number}.jpg", "HTTP 404", lambda request: send(request, 404))
    for number in range(2):
        web.add(f"/down-{number}.jpg", "HTTP 503", lambda request: send(request, 503))
    web.add("/later.jpg", "HTTP 429", lambda request: send(request, 429, Retry_After="120"))
    jpeg, out = encoded((100, 100)), "opted out by X-Robots-Tag"
    web.add_picture("/noai.jpg", out, jpeg, X_Robots_Tag="noai")
    web.add_picture("/noindex.jpg", out, jpeg, X_Robots_Tag="nofollow, NoImageIndex")
    web.add_picture("/not-us.jpg", out, jpeg, X_Robots_Tag="1e5: noai")
    web.add_picture("/not-others.jpg", (64, 64), jpeg, X_Robots_Tag="otherbot: noai")
    web.rows.append((f"http://127.0.0.1:{closed_port()}/x.jpg", "connection refused"))
    web.rows.append((f"file://{Path(__file__).absolute()}", "bad address"))


def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def web() -> Iterator[Web]:
    web, lock = Web(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            with lock:
                web.user_agents.add(self.headers["User-Agent"])
                web.asked[path] += 1
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                web.answers[path](self)

        def log_message(self, *args: Any) -> None:
            pass

    with Server(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        web.port = server.server_address[1]
        fill(web)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield web
        server.shutdown()


def table(web: Web) -> pa.Table:
    numbers = range(len(web.rows))
    return pa.table(
        {
            "key": [f"{number:016x}" for number in numbers],
            "url": [url for url, _ in web.rows],
            "caption": [f"picture {number}, “größer”" for number in numbers],
            "score": pa.array([None if number == 1 else number / 4 for number in numbers], pa.float32()),
            "price": pa.array([Decimal(number) / 8 for number in numbers], pa.decimal128(9, 3)),
            "punsafe": [float("nan")] * len(web.rows),
            "WIDTH": list(numbers),
        }
    )


@dataclass
class Two:
    """Two downloads of the same rows, with one process and with two."""

    one: Downloaded
    two: Downloaded
    samples: list[dict[str, Any]]

    def of(self, web: Web, path: str) -> dict[str, Any]:
        key = f"{[urlsplit(url).path for url, _ in web.rows].index(path):016x}"
        return next(sample for sample in self.samples if sample["__key__"] == key)


@pytest.fixture(scope="module")
def done(web: Web, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    if not COMMAND.exists():
        pytest.fail(f"the real img2dataset is not there ({COMMAND}): run make img2dataset")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            patch.delenv(name, raising=False)
        one = download(table(web), tmp_path_factory.mktemp("one"), settings=SETTINGS)
        two = download(
            table(web),
            tmp_path_factory.mktemp("two") / "a, [b] 'c'",
            settings=SETTINGS.model_copy(update={"processes": 2}),
        )
        yield Two(one, two, list(one.samples()))


def test_each_row_is_a_picture_or_counted_by_its_reason(web: Web, done: Two) -> None:
    expected = Counter(becomes for _, becomes in web.rows if isinstance(becomes, str))
    for one in (done.one, done.two):
        assert one.failures == expected
        assert one.attempted == len(web.rows) == one.succeeded + sum(one.failures.values())
        assert one.seconds > 0
    assert done.one.num_bytes == sum(len(sample["jpg"]) for sample in done.samples)


def test_samples_come_in_the_order_of_the_rows_with_their_keys_and_captions(web: Web, done: Two) -> None:
    numbers = [number for number, (_, becomes) in enumerate(web.rows) if not isinstance(becomes, str)]
    assert [sample["__key__"] for sample in done.samples] == [f"{number:016x}" for number in numbers]
    assert [sample["txt"].decode() for sample in done.samples] == [f"picture {number}, “größer”" for number in numbers]
    assert {frozenset(sample) for sample in done.samples} == {frozenset(("__key__", "jpg", "txt", "json"))}


def test_pictures_have_the_sizes_that_were_asked_for(web: Web, done: Two) -> None:
    sizes = [becomes for _, becomes in web.rows if not isinstance(becomes, str)]
    for sample, size in zip(done.samples, sizes, strict=True):
        record, picture = json.loads(sample["json"]), Image.open(io.BytesIO(sample["jpg"]))
        assert picture.format == "JPEG"
        assert picture.size == size == (record["width"], record["height"])


def test_the_json_tells_of_the_row_and_of_the_picture(web: Web, done: Two) -> None:
    record = json.loads(done.of(web, "/as-sent.jpg")["json"])
    assert record == {
        "key": "0000000000000001", "url": f"http://127.0.0.1:{web.port}/as-sent.jpg", "caption": "picture 1, “größer”",
        "score": None, "price": "0.125", "punsafe": None, "WIDTH": 1, "width": 48, "height": 40, "original_width": 48,
        "original_height": 40, "sha256": hashlib.sha256(encoded((48, 40))).hexdigest(),
    }  # fmt: skip
    record = json.loads(done.of(web, "/tall.png")["json"])
    assert (record["original_width"], record["original_height"], record["score"]) == (200, 300, 0.5)
    assert json.loads(done.of(web, "/größe ä.webp")["json"])["url"].endswith("/größe ä.webp")


def test_a_jpeg_that_is_not_reduced_stays_as_it_was_sent(web: Web, done: Two) -> None:
    assert done.of(web, "/as-sent.jpg")["jpg"] == encoded((48, 40))


def test_pictures_look_as_they_were_meant(web: Web, done: Two) -> None:
    def halves(path: str) -> tuple[float, float, float]:
        pixels = decode_picture(done.of(web, path), resolution=64)["pixels"].float()
        return tuple(float(part.mean()) for part in (pixels[:, :, :24], pixels[:, :, -24:], pixels[:, :24]))

    assert halves("/deep.png") == pytest.approx((40, 215, 127), abs=4)  # img2dataset alone: white
    assert halves("/turned.jpg") == pytest.approx((127, 127, 40), abs=4)  # img2dataset alone: dark on the left
    assert halves("/clear.png") == (255, 255, 255)


def test_addresses_that_are_not_public_are_refused_unless_it_is_said(web: Web, tmp_path: Path) -> None:
    before = sum(web.asked.values())
    rows = table(web).slice(0, 2)
    settings = SETTINGS.model_copy(update={"private_addresses": False})
    done = download(rows, tmp_path, settings=settings)
    assert done.failures == {"no public address": 2}
    assert sum(web.asked.values()) == before


def test_another_run_with_more_processes_gives_the_same_samples_byte_for_byte(done: Two) -> None:
    assert len(done.two.tars) == 2
    assert list(done.two.samples()) == done.samples
    assert list(done.one.samples()) == done.samples


def test_the_samples_go_into_shards(done: Two, tmp_path: Path) -> None:
    storage = Storage(StorageSettings())
    write_shards(done.one.samples(), str(tmp_path / "shards"), samples_per_shard=4, storage=storage)
    assert read_index(str(tmp_path / "shards"), storage=storage).num_samples == done.one.succeeded


def test_servers_are_told_who_asks_and_are_not_asked_more_than_was_said(web: Web, done: Two) -> None:
    (user_agent,) = web.user_agents
    assert user_agent is not None
    assert "compatible; 1e5;" in user_agent
    # Two runs; failed requests are tried once again.
    asked = {path: 2 * (1 if not isinstance(becomes, str) else 2) for path, becomes in paths(web)}
    asked |= {"/busy.jpg": 4, "/reduced.jpg": 4}  # again after 503, and where another was moved to
    resized = {"image too small", "image area too large", "aspect ratio too large", "broken picture"}
    asked |= {path: 2 for path, becomes in paths(web) if becomes in resized}
    asked |= {"/later.jpg": 2}  # no second try, as that would be before the time that the server named
    assert dict(web.asked) == asked


def paths(web: Web) -> Iterator[tuple[str, tuple[int, int] | str]]:
    return ((unquote(path), becomes) for path, (_, becomes) in zip(web.answers, web.rows, strict=False))
