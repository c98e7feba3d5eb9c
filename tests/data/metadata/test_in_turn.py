"""Requests are spread over time, and busy servers are waited for."""

from __future__ import annotations

import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.error import HTTPError

import pytest

from fewstep.data.metadata.inside_img2dataset import ask_in_turn


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        begun: list[float] = self.server.begun  # type: ignore[attr-defined]
        begun.append(time.monotonic())
        status = int(self.path.rpartition("/")[2].split("-")[0])
        self.send_response(status)
        if "-" in self.path:
            self.send_header("Retry-After", self.path.rpartition("-")[2])
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.begun = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urllib.request, "urlopen", urllib.request.urlopen)


def ask(web: ThreadingHTTPServer, path: str) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{web.server_port}/{path}", timeout=10) as answer:
        return int(answer.status)


def test_requests_of_many_threads_begin_one_after_another(web: ThreadingHTTPServer) -> None:
    ask_in_turn(per_s=20.0, longest_pause_s=1.0)
    threads = [threading.Thread(target=ask, args=(web, "200")) for _ in range(11)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    begun = sorted(web.begun)  # type: ignore[attr-defined]
    assert len(begun) == 11
    assert begun[-1] - begun[0] >= 0.4  # ten twentieths of a second, less what the first was late


@pytest.mark.parametrize(
    ("path", "least_s", "most_s"), [("503", 1.0, 3.0), ("429-2", 2.0, 4.0), ("503-3600", 2.5, 4.5)]
)
def test_a_busy_server_is_waited_for_but_not_for_ever(
    path: str, least_s: float, most_s: float, web: ThreadingHTTPServer
) -> None:
    ask_in_turn(per_s=None, longest_pause_s=2.5)
    begun = time.monotonic()
    with pytest.raises(HTTPError):
        ask(web, path)
    assert least_s <= time.monotonic() - begun < most_s


def test_other_errors_are_not_waited_for(web: ThreadingHTTPServer) -> None:
    ask_in_turn(per_s=None, longest_pause_s=5.0)
    begun = time.monotonic()
    with pytest.raises(HTTPError):
        ask(web, "404-5")
    assert time.monotonic() - begun < 4.0
    assert ask(web, "200") == 200
