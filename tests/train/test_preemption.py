"""A checkpoint before a node is taken away. Ray's signal is made up here; `tests/integration/test_elastic_ray.py`
drains a node of a real Ray."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import ray.train
import ray.train.collective
import torch
from ray.train.v2.api.preemption import PreemptionInfo
from toy_training import toy_job

from fewstep.train import cluster, preemption
from fewstep.train.in_process import LocalHost, train_in_process
from fewstep.train.loop import train
from fewstep.train.preemption import PreemptionWatch
from fewstep.train.settings import ClusterSettings


class Signal:
    """What Ray says, and how often it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.nodes: dict[str, list[int]] = {}
        self.asked = 0
        self.now_s = 100.0
        monkeypatch.setattr(ray.train, "get_preemption_info", self._info)
        monkeypatch.setattr(ray.train.collective, "broadcast_from_rank_zero", lambda data: data)
        monkeypatch.setattr(preemption.time, "monotonic", lambda: self.now_s)

    def _info(self) -> PreemptionInfo | None:
        self.asked += 1
        return PreemptionInfo(1_700_000_000_000, self.nodes) if self.nodes else None


def test_each_node_asks_for_one_checkpoint(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    ray_says = Signal(monkeypatch)
    watch = PreemptionWatch("toy", first=7, speaks=True)
    saved = []
    for done in range(8, 21):
        ray_says.now_s += 3.0
        ray_says.nodes = {"a": [1]} if done >= 10 else {}
        if done >= 15:
            ray_says.nodes["b"] = [0, 2]
        if watch.must_save(done):
            saved.append(done)
    assert saved == [10, 15]
    assert ray_says.asked == 13  # updates of three seconds: after each
    assert caplog.messages[0].startswith(
        "toy: a node of the training will be taken away at 22:13:20 UTC, with workers 1; a checkpoint of update 10 is "
    )


def test_quick_updates_are_not_held_up_by_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    ray_says = Signal(monkeypatch)
    watch = PreemptionWatch("toy", first=0, speaks=False)
    for done in range(1, 2001):
        ray_says.now_s += 0.01
        watch.must_save(done)
    assert 10 <= ray_says.asked <= 20  # in 20 seconds: about every two


def test_who_loses_a_worker_of_that_node_waits_for_ray_until_after_the_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray_says = Signal(monkeypatch)
    waits: list[float] = []
    monkeypatch.setattr(preemption.time, "time", lambda: 1_700_000_000 - 5 + sum(waits))
    monkeypatch.setattr(preemption.time, "sleep", waits.append)
    watch = PreemptionWatch("toy", first=0, speaks=False)
    watch.outlast()
    assert waits == []  # no node is taken away: an error is a fault
    ray_says.now_s += 3.0
    ray_says.nodes = {"a": [1]}
    assert watch.must_save(1)
    watch.outlast()
    assert sum(waits) == pytest.approx(5 + 30, abs=0.5)


class Warned(LocalHost):
    """A host that is told of the end of a node after an update."""

    def __init__(self, folder: Path, warn_at: int | None) -> None:
        self._warn_at = warn_at
        super().__init__(device=torch.device("cpu"), folder=str(folder), num_to_keep=9, on_log=None)

    def must_save(self, updates_done: int) -> bool:
        return updates_done == self._warn_at


def test_a_training_goes_on_from_the_checkpoint_written_before(tmp_path: Path) -> None:
    job = toy_job(updates=12, checkpoint_every=12, log_every=4)
    train(job, Warned(tmp_path / "warned", 7))
    kept = sorted((tmp_path / "warned" / "checkpoints").iterdir())
    assert [path.name for path in kept] == ["update-00000007", "update-00000012"]
    for file in kept[1].iterdir():
        file.unlink()
    kept[1].rmdir()
    again = train(job, Warned(tmp_path / "warned", None))
    assert again.resumed_from == 7
    train_in_process(job, folder=str(tmp_path / "whole"))
    whole: dict[str, Any] = torch.load(tmp_path / "whole" / "export" / "weights.pt", weights_only=True)
    assert all(torch.equal(weight, whole[name]) for name, weight in again.network.state_dict().items())


@pytest.mark.parametrize(("address", "watched"), [(None, "0"), ("10.0.0.1:6379", "1")])
def test_ray_watches_where_the_cluster_is_not_of_this_machine(
    monkeypatch: pytest.MonkeyPatch, address: str | None, watched: str
) -> None:
    name = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
    monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    seen = []
    monkeypatch.setattr(cluster, "_connect", lambda *_: seen.append((os.environ[name], preemption.is_watched())))
    with cluster.local_ray(ClusterSettings(address=address)):
        pass
    assert seen == [(watched, watched == "1")]
    assert name not in os.environ  # a cluster that comes after a Ray of this machine is watched
