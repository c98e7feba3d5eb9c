"""Draining this machine's Ray node. That a training goes on without it: tests/integration/test_elastic_ray.py."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator

import pytest

from fewstep.errors import FewstepError
from fewstep.train import drain
from fewstep.train.drain import drain_this_node

NOWHERE = "127.0.0.1:9"  # the port of `discard`, where nothing listens


@pytest.fixture
def train_worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process with the title that Ray gives a worker of Ray Train; others' do not count here."""
    monkeypatch.setattr(drain, "_TRAIN_WORKER", "ray::RayTrainWorker.of_this_test")
    command = ["bash", "-c", "exec -a ray::RayTrainWorker.of_this_test sleep 60"]
    with subprocess.Popen(command) as process:
        time.sleep(0.5)
        yield
        process.kill()


def test_where_no_worker_trains_nothing_is_drained_and_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drain, "_TRAIN_WORKER", "ray::RayTrainWorker.that_is_not")
    begun = time.monotonic()
    assert drain_this_node(NOWHERE, deadline_s=60) is False
    assert time.monotonic() - begun < 30


@pytest.mark.usefixtures("train_worker")
@pytest.mark.parametrize("address", [NOWHERE, "auto"])
def test_a_cluster_that_does_not_answer_is_named(address: str) -> None:
    with pytest.raises(FewstepError, match=rf"no Ray cluster answers at {address} .*RAY_ADDRESS"):
        drain_this_node(address, deadline_s=60)
