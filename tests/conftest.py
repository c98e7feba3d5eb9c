"""Fixtures for all tests: a real S3 server with credentials enforced."""

from __future__ import annotations

import itertools
import logging
import shutil
from collections.abc import Callable, Iterator

import pytest

from fewstep.storage import Storage, StorageSettings, join, open_storage
from fewstep.tracking.connection import connect
from fewstep.tracking.settings import TrackingSettings

_numbers = itertools.count()
_TURN = pytest.StashKey[int]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let pytest-xdist keep the tests of a file in one process, as they share fixtures, and all that need a Ray in one
    too; these, and the demo, take longest, so they begin first."""
    of_ray = {item.path for item in items if "ray_cluster" in getattr(item, "fixturenames", ())}
    first = {"ray": 0, "test_demo.py": 1}
    for item in items:
        name = "ray" if item.path in of_ray else item.path.name
        item.add_marker(pytest.mark.xdist_group(name if name in first else str(item.path)))
        item.stash[_TURN] = first.get(name, 2)
    items.sort(key=lambda item: item.stash[_TURN])


@pytest.fixture(scope="session")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Storage]:
    """A storage on a SeaweedFS of its own: loopback, free ports, ended when the tests end."""
    home = tmp_path_factory.mktemp("s3")
    settings = StorageSettings(home=home, bucket="tests", read_timeout_s=20.0, retry_base_s=0.05, retry_total_s=30.0)
    with open_storage(settings) as opened:
        yield opened


@pytest.fixture(scope="session")
def new_database(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], str]:
    """Return the URI of a new MLflow database at each call: a copy, as MLflow takes seconds to make its tables."""
    first = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    connect(TrackingSettings(uri=f"sqlite:///{first}"))

    def copied() -> str:
        path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
        shutil.copyfile(first, path)
        return f"sqlite:///{path}"

    return copied


@pytest.fixture
def bucket_uri(storage: Storage) -> str:
    """A folder in the bucket that no other test uses."""
    return join(storage.root, f"test-{next(_numbers)}")


@pytest.fixture(autouse=True)
def loggers_that_speak() -> None:
    """Undo what libraries in the same process do to our loggers, so that `caplog` hears them whatever ran before."""
    logging.disable(logging.NOTSET)
    for name, logger in logging.root.manager.loggerDict.items():
        if name.split(".")[0] == "fewstep" and isinstance(logger, logging.Logger):
            logger.disabled, logger.propagate = False, True
            logger.setLevel(logging.NOTSET)
    logging.root.setLevel(logging.WARNING)
