"""One training, one driver."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time

import pytest

from fewstep.storage import Storage, join
from fewstep.train import lease as module
from fewstep.train.lease import lease


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BEAT_EVERY_S", 0.1)
    monkeypatch.setattr(module, "_STALE_S", 1.5)
    monkeypatch.setattr(module, "_LOOK_EVERY_S", 0.05)


def test_two_take_turns(storage: Storage, bucket_uri: str) -> None:
    uri = join(bucket_uri, "lease.json")
    inside, most = [0], [0]

    def work() -> None:
        with lease(uri, storage=storage, what="toy"):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(2)  # longer than a holder may be silent: it beats
            inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(2)]
    begun = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
    assert time.monotonic() - begun >= 4
    assert not storage.exists(uri)


def test_one_that_is_given_back_while_it_is_looked_at_is_taken(
    storage: Storage, bucket_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = join(bucket_uri, "lease.json")
    storage.write_bytes(uri, json.dumps({"owner": "x", "host": "elsewhere", "pid": 1, "beat": 3}).encode())
    read_json = Storage.read_json
    looks = []

    def given_back_then_read(self: Storage, uri: str) -> object:
        if not looks:
            self.delete(uri)
        looks.append(uri)
        return read_json(self, uri)

    monkeypatch.setattr(Storage, "read_json", given_back_then_read)
    with lease(uri, storage=storage, what="toy"):
        assert looks == [uri]
        assert storage.exists(uri)
    assert not storage.exists(uri)


def test_that_of_one_who_took_over_is_left_to_it(
    storage: Storage, bucket_uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    uri = join(bucket_uri, "lease.json")
    other = {"owner": "x", "host": "elsewhere", "pid": 1, "beat": 3}
    with caplog.at_level("WARNING"), lease(uri, storage=storage, what="toy"):
        while not caplog.messages:  # the next beat sees it
            storage.write_json(uri, other)
            time.sleep(0.05)
    assert "elsewhere" in caplog.text
    assert storage.read_json(uri) == other


def test_a_killed_process_of_this_machine_is_taken_over_at_once(
    storage: Storage, bucket_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_STALE_S", 1000.0)
    uri = join(bucket_uri, "lease.json")
    dead = subprocess.Popen([sys.executable, "-c", "pass"])
    dead.wait()
    held = {"owner": "x", "host": module.socket.gethostname(), "pid": dead.pid, "beat": 3}
    storage.write_bytes(uri, json.dumps(held).encode())
    with lease(uri, storage=storage, what="toy"):
        assert storage.read_json(uri)["owner"] != "x"


def test_a_silent_holder_elsewhere_is_taken_over_later(storage: Storage, bucket_uri: str) -> None:
    uri = join(bucket_uri, "lease.json")
    storage.write_bytes(uri, json.dumps({"owner": "x", "host": "elsewhere", "pid": 1, "beat": 3}).encode())
    begun = time.monotonic()
    with lease(uri, storage=storage, what="toy"):
        assert time.monotonic() - begun >= 1.5
    assert not storage.exists(uri)


def test_it_is_given_back_after_an_error(storage: Storage, bucket_uri: str) -> None:
    uri = join(bucket_uri, "lease.json")
    with pytest.raises(ValueError, match="inside"), lease(uri, storage=storage, what="toy"):
        raise ValueError("inside")
    assert not storage.exists(uri)
