"""Workers that come and go on a real Ray of several nodes: the training stays the same."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray.cloudpickle
import torch
import toy_training
from stored_training import OPTIONS, exported
from toy_training import FileTracker, toy_job

from fewstep.storage import Storage
from fewstep.train.in_process import train_in_process

ray.cloudpickle.register_pickle_by_value(toy_training)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def alone(folder: Path, **settings: Any) -> tuple[dict[int, float], dict[str, torch.Tensor]]:
    """Return losses and weights of the undisturbed training in this process."""
    losses: dict[int, float] = {}
    train_in_process(
        toy_job(**settings), folder=str(folder), on_log=lambda done, means: losses.update({done: means["loss"]})
    )
    return losses, torch.load(folder / "export" / "weights.pt", weights_only=True)


def check_same(
    storage: Storage, uri: str, tracker: FileTracker, wanted: tuple[dict[int, float], dict[str, torch.Tensor]]
) -> None:
    losses, weights = wanted
    assert tracker.by_step("loss") == pytest.approx(losses, rel=1e-4)
    ours = exported(storage, uri)
    assert all(torch.allclose(ours[name], weights[name], atol=1e-5) for name in weights)


@pytest.mark.long
def test_a_node_taken_away_with_notice_costs_no_try_and_loses_nothing(
    storage: Storage, bucket_uri: str, tmp_path: Path
) -> None:
    """A Ray of three nodes; one is drained as a cloud does and then killed, later another comes."""
    tracker = FileTracker(str(tmp_path / "figures"))
    options: dict[str, Any] = {"updates": 60, "checkpoint_every": 60, **OPTIONS}  # no other checkpoint before the end
    (tmp_path / "storage").write_bytes(pickle.dumps(storage))
    (tmp_path / "job").write_bytes(ray.cloudpickle.dumps(toy_job(mischief={"pause_s": 1.0}, **options)))
    program = str(Path(__file__).with_name("elastic_driver.py"))
    files = [str(tmp_path / "storage"), bucket_uri, str(tmp_path / "job"), tracker.path, str(tmp_path / "notes")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_TRAIN_ENABLE")}
    with (tmp_path / "output").open("w") as output:
        driver = subprocess.Popen(
            [sys.executable, program, *files], stderr=output, stdout=output, env=environment, start_new_session=True
        )
    try:
        driver.wait(timeout=1100)
    finally:
        if driver.poll() is None:
            os.killpg(driver.pid, signal.SIGKILL)
    assert driver.returncode == 0, (tmp_path / "output").read_text()[-5000:]
    notes = json.loads((tmp_path / "notes").read_text())
    assert notes["errors"] == "[]"
    assert notes["watched"] == "1"
    said = "\n".join(notes["said"])
    notice = re.search(r"toy: a node of the training will be taken away at .* a checkpoint of update (\d+)", said)
    assert notice is not None, said
    saved = int(notice[1])
    assert 5 <= saved < 25
    assert said.count("a checkpoint of update") == 1
    assert f"goes on from update {saved} with 1 of 1…2 workers" in said
    assert f"goes on from update {saved} with 2 of 1…2 workers" in said
    assert notes["resumed_from"] == saved
    check_same(storage, bucket_uri, tracker, alone(tmp_path, **options))
