"""Requests are spread over time, and busy servers are waited for, or their addresses given up."""

from __future__ import annotations

import email.utils
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.error import HTTPError
from urllib.parse import quote, unquote

import pytest

from fewstep.data.metadata.inside_img2dataset import ask_in_turn


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        begun: list[float] = self.server.begun  # type: ignore[attr-defined]
        begun.append(time.monotonic())
        status = int(self.path.rpartition("/")[2].split("-")[0])
        self.send_response(status)
        if "-" in self.path:
            self.send_header("Retry-After", unquote(self.path.partition("-")[2], "latin-1"))
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


@pytest.mark.parametrize("path", ["429-1", "503", "503-soon", "503-²"])
def test_an_address_that_was_waited_for_as_said_is_tried_again(path: str, web: ThreadingHTTPServer) -> None:
    ask_in_turn(per_s=None, longest_pause_s=1.0)
    for _ in range(2):
        with pytest.raises(HTTPError):
            ask(web, quote(path))
    first, second = web.begun  # type: ignore[attr-defined]
    assert second - first >= 1.0


@pytest.mark.parametrize("said", ["120", "date"])
@pytest.mark.parametrize("status", [429, 503])
def test_an_address_for_which_more_was_asked_than_is_waited_is_given_up(
    status: int, said: str, web: ThreadingHTTPServer
) -> None:
    ask_in_turn(per_s=None, longest_pause_s=0.5)
    path = f"{status}-{said if said.isdigit() else quote(email.utils.formatdate(time.time() + 120, usegmt=True))}"
    begun = time.monotonic()
    for _ in range(3):
        with pytest.raises(HTTPError) as error:
            ask(web, path)
        assert str(error.value).startswith(f"HTTP Error {status}: ")
    assert 0.5 <= time.monotonic() - begun < 3.0
    assert len(web.begun) == 1  # type: ignore[attr-defined]
    assert ask(web, "200") == 200


def test_a_date_is_waited_for(web: ThreadingHTTPServer) -> None:
    ask_in_turn(per_s=None, longest_pause_s=10.0)
    date = email.utils.formatdate(time.time() + 4, usegmt=True)  # in whole seconds, so three to four from now
    begun = time.monotonic()
    with pytest.raises(HTTPError):
        ask(web, f"503-{quote(date)}")
    assert 2.0 <= time.monotonic() - begun < 6.0


def test_other_errors_are_not_waited_for(web: ThreadingHTTPServer) -> None:
    ask_in_turn(per_s=None, longest_pause_s=5.0)
    begun = time.monotonic()
    with pytest.raises(HTTPError):
        ask(web, "404-5")
    assert time.monotonic() - begun < 4.0
    assert ask(web, "200") == 200
