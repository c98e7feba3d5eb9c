"""One Ray on this machine for all integration tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fewstep.train.cluster import local_ray
from fewstep.train.settings import ClusterSettings

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))  # for `toy_training`


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A Ray of two CPUs that stays up over the tests; `run_training` finds the connection and uses it."""
    with local_ray(ClusterSettings(num_cpus=2)):
        yield
