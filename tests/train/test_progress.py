"""What a person sees: a bar in a terminal, lines in a log; and Ray's errors in words."""

from __future__ import annotations

import errno
import io
import os
import pty
import re
import select
import time

import pytest
from ray.exceptions import ActorDiedError
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError
from toy_training import toy_job

from fewstep.errors import CheckpointError, DataError, FewstepError, StorageError
from fewstep.train.progress import ProgressPrinter, Watcher, duration
from fewstep.train.run import _in_words
from fewstep.train.settings import ClusterSettings


def printer(out: io.TextIOBase, **options: float) -> ProgressPrinter:
    return ProgressPrinter(name="guidance", updates=700, samples_per_update=64, out=out, **options)  # type: ignore[arg-type]


def test_the_line_says_position_speed_loss_and_time_left() -> None:
    line = printer(io.StringIO()).line(320, 2.3, {"loss": 0.21345})
    assert line == "guidance  320/700 updates · 147 images/s · loss 0.2135 · 3 min left"
    assert printer(io.StringIO()).line(700, 2.3, {}) == "guidance  700/700 updates · 147 images/s"
    assert printer(io.StringIO()).line(0, None, {}) == "guidance  0/700 updates"


@pytest.mark.parametrize(("seconds", "words"), [(40, "40 s"), (89, "89 s"), (150, "2 min"), (7200, "2.0 h")])
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_a_log_gets_a_line_now_and_then_and_the_last_one() -> None:
    out = io.StringIO()
    shown = printer(out, line_every_s=1e9)
    for done in (0, 0, 1, 2, 350, 700):
        shown.show(done, {})
        time.sleep(0.002)
    lines = out.getvalue().splitlines()
    assert lines[0] == "guidance  0/700 updates"
    assert lines[1].startswith("guidance  700/700 updates · ")
    assert len(lines) == 2


def test_a_restarted_worker_does_not_spoil_the_speed() -> None:
    out = io.StringIO()
    shown = printer(out, line_every_s=0)
    shown.show(300, {})
    shown.show(100, {})  # back at its checkpoint
    assert "images/s" not in out.getvalue()


def test_a_terminal_gets_a_bar() -> None:
    parent, child = pty.openpty()
    with os.fdopen(child, "w") as out:
        shown = printer(out)
        shown.show(100, {})
        time.sleep(0.2)
        shown.show(110, {"loss": 0.25})
        time.sleep(0.2)
        shown.show(350, {"loss": 0.25})
        shown.close()
        text = ""
        while select.select([parent], [], [], 0.1)[0]:
            text += os.read(parent, 4096).decode(errors="replace")
    os.close(parent)
    assert "guidance" in text
    # 590 updates are left, and ten took 0.2 seconds or more.
    left = re.search(r"110/700 updates · \d\d:\d\d<(\d\d):(\d\d) · \d+ images/s · loss 0\.25", text)
    assert left
    assert int(left[1]) * 60 + int(left[2]) >= 10
    assert re.search(r"350/700 updates · \d\d:\d\d<\d\d:\d\d · \d+ images/s · loss 0\.25", text)


def test_the_watcher_looks_once_more_at_the_end_and_survives_errors() -> None:
    seen: list[int] = []

    def look() -> None:
        seen.append(len(seen))
        if len(seen) == 1:
            raise RuntimeError("the board is gone")

    with Watcher(look, every_s=0.02):
        time.sleep(0.1)
    assert len(seen) >= 2


def words(error: Exception) -> FewstepError | None:
    return _in_words(error, toy_job(), uri="s3://b/x", cluster=ClusterSettings(max_failures=2))


def test_errors_of_ray_in_words() -> None:
    mine = DataError("broken")
    assert words(WorkerGroupError("", {0: RuntimeError("connection closed"), 1: mine})) is mine
    died = words(WorkerGroupError("", {0: RuntimeError("connection closed"), 1: ActorDiedError()}))
    assert "a worker died more than cluster.max_failures=2 times" in str(died)
    assert "s3://b/x/checkpoints" in str(died)
    upload = OSError("When uploading part for key 'x': AWS Error NETWORK_CONNECTION during UploadPart operation")
    stored = words(WorkerGroupError("", {0: upload}))
    assert isinstance(stored, StorageError)
    assert "could not be stored in s3://b/x/checkpoints" in str(stored)
    full = words(WorkerGroupError("", {0: OSError(errno.ENOSPC, "No space left on device")}))
    assert isinstance(full, StorageError)
    assert "the disk of a worker is full" in str(full)
    assert "s3://b/x/checkpoints" in str(full)
    snapshot = OSError("When initiating upload for key 'x/checkpoints/checkpoint_manager_snapshot.json': AWS Error 507")
    assert isinstance(words(ControllerError(snapshot)), StorageError)  # nothing is wrong with the checkpoints
    other_ray = words(ControllerError(ValueError("Failed to initialize the checkpoint manager: other Ray version")))
    assert isinstance(other_ray, CheckpointError)
    assert words(WorkerGroupError("", {0: ZeroDivisionError()})) is None  # a fault of ours keeps its stack
