"""Figures must reach MLflow from any process, and never hold up or end the work."""

import json
import logging
import pickle
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from fewstep.errors import TrackingError
from fewstep.tracking.figures import TrackerHandle
from fewstep.tracking.settings import TrackingSettings

# The workers are plain processes, as Ray's are: the handle reaches them pickled.
_SEND = """
import pickle, sys
handle = pickle.loads(bytes.fromhex(sys.argv[1]))
first = int(sys.argv[2])
for step in range(first, first + 400):
    handle.metrics({"loss": 1.0 / (step + 1), f"worker/{first}": float(step)}, step)
sys.exit(handle.close())
"""
_SEND_THROUGH_AN_OUTAGE = """
import json, pathlib, pickle, sys, time
handle = pickle.loads(bytes.fromhex(sys.argv[1]))
handle.metrics({"loss": 1.0}, 0)
deadline_s = time.monotonic() + 60
while handle.last_error is None and time.monotonic() < deadline_s:
    time.sleep(0.05)
handle.metrics({"loss": 2.0}, 1)
events = pathlib.Path(sys.argv[2])
events.with_suffix(".part").write_text(json.dumps({"error": str(handle.last_error), "waiting": handle.waiting}))
events.with_suffix(".part").rename(events)
while handle.waiting and time.monotonic() < deadline_s:
    time.sleep(0.05)
sys.exit(handle.close())
"""


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts a process that runs `code` with the pickled handle; none of them outlives the test."""
    started = []

    def start(code: str, handle: TrackerHandle, *arguments: object) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", code, pickle.dumps(handle).hex(), *map(str, arguments)]
        started.append(subprocess.Popen(command, cwd="/"))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_two_processes_write_one_run_at_the_same_time(tracker, start):
    with tracker.run("train", key="two") as run:
        workers = [start(_SEND, run.handle(), first) for first in (0, 400)]
        assert [worker.wait(120) for worker in workers] == [0, 0]
    history = tracker.client.get_metric_history(run.id, "loss")
    assert sorted(metric.step for metric in history) == list(range(800))


def test_handing_over_takes_no_time_while_the_database_is_locked(tracker):
    with tracker.run("train", key="slow") as run:
        lock = sqlite3.connect(tracker.settings.sqlite_path(), isolation_level=None)
        lock.execute("BEGIN EXCLUSIVE")
        handle = run.handle()
        began = time.perf_counter()
        for step in range(1000):
            handle.metrics({"loss": 0.5}, step)
        assert time.perf_counter() - began < 0.5
        lock.execute("ROLLBACK")
        lock.close()
        assert handle.close() == 0
    assert len(tracker.client.get_metric_history(run.id, "loss")) == 1000


def test_steps_seen_before_a_resume_may_come_again(tracker):
    with tracker.run("train", key="again") as run:
        for value in (0.5, 0.5, 0.4):
            handle = run.handle()
            handle.metrics({"loss": value, "odd": float("nan"), "huge": float("inf")}, 7)
            assert handle.close() == 0
    assert tracker.client.get_run(run.id).data.metrics["loss"] == 0.4


def test_figures_wait_until_the_database_is_back(tracker, tmp_path, start):
    path = tracker.settings.sqlite_path()
    aside = path.with_name("aside.db")
    events = tmp_path / "events.json"
    with tracker.run("train", key="outage") as run:
        path.rename(aside)
        path.mkdir()
        try:
            worker = start(_SEND_THROUGH_AN_OUTAGE, run.handle(), events)
            deadline_s = time.monotonic() + 90
            while not events.exists() and time.monotonic() < deadline_s:
                time.sleep(0.05)
        finally:
            path.rmdir()
            aside.rename(path)
        assert worker.wait(90) == 0
    seen = json.loads(events.read_text())
    assert seen["waiting"] == 2
    assert "Check that the file can be written" in seen["error"]
    assert [metric.value for metric in tracker.client.get_metric_history(run.id, "loss")] == [1.0, 2.0]


def test_what_never_arrives_is_counted_and_said(caplog):
    settings = TrackingSettings(uri="http://127.0.0.1:9", retries=0, timeout_s=1, flush_every_s=0.05, max_buffered=1000)
    handle = TrackerHandle(settings, "a" * 32)
    for step in range(1500):
        handle.metrics({"loss": 0.1}, step)
    assert handle.lost == 500  # the oldest made room
    with caplog.at_level(logging.WARNING):
        assert handle.close(timeout_s=2.0) == 1500
    assert "1500 figures of run" in caplog.text
    assert "Is MLflow running at http://127.0.0.1:9?" in caplog.text


def test_figures_of_a_deleted_run_are_given_up_at_once(tracker, caplog):
    with tracker.run("train", key="deleted") as run:
        pass
    tracker.client.delete_run(run.id)
    handle = run.handle()
    handle.metrics({"loss": 0.1}, 0)
    began = time.perf_counter()
    assert handle.close(timeout_s=30) == 1
    assert time.perf_counter() - began < 10
    assert "MLflow refuses 1 figures" in caplog.text


def test_name_that_mlflow_would_refuse_fails_at_once(tracker):
    handle = TrackerHandle(tracker.settings, "a" * 32)
    with pytest.raises(TrackingError, match="loss\\[0\\]"):
        handle.metrics({"loss[0]": 1.0}, 0)
