"""Fixtures for all tests: a real S3 server with credentials enforced."""

from __future__ import annotations

import functools
import itertools
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# What a user has exported must not lead the tests into a bucket of theirs, nor change the tests' recipes. Before
# fewstep is imported: some tests make settings as they are loaded.
for _name in list(os.environ):
    if _name.startswith(("FEWSTEP_S3_", "AWS_ENDPOINT_URL")) or _name in (
        "FEWSTEP_SET", "FEWSTEP_RUNS", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE", "RAY_ADDRESS"
    ):  # fmt: skip
        del os.environ[_name]

from fewstep.storage import Storage, StorageSettings, join, open_storage  # noqa: E402
from fewstep.tracking.connection import connect  # noqa: E402
from fewstep.tracking.settings import TrackingSettings  # noqa: E402

_numbers = itertools.count()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests that need a Ray: together they take longest."""
    items.sort(key=lambda item: not _needs_ray(item.path))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep the tests of a file in one of pytest-xdist's processes, as they share fixtures, and all that need a Ray too.

    xdist's own `--dist loadgroup` does not know groups under pytest 9.2.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return "ray" if _needs_ray(config.rootpath / file) else file

    config.option.loadscopereorder = False  # it would put files of many tests first, however long they take
    return ByFile(config, log)


@functools.cache
def _needs_ray(file: Path) -> bool:
    return file.name != "conftest.py" and "ray_cluster" in file.read_text()


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
