"""One Ray on this machine for all integration tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fewstep.train.cluster import local_ray
from fewstep.train.settings import ClusterSettings

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))  # for `toy_training`


# Ray gives its workers niceness 15: on a busy machine the tests would wait for minutes.
os.environ.setdefault("RAY_worker_niceness", "0")
# By default metrics are handed on every ten seconds, which is longer than these trainings last.
os.environ.setdefault("RAY_metrics_report_interval_ms", "500")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A Ray of two CPUs that stays up over the tests; `run_training` finds the connection and uses it."""
    with local_ray(ClusterSettings(num_cpus=2)):
        yield
