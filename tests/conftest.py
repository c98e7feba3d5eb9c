"""Fixtures for all tests: a real S3 server with credentials enforced."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator

import pytest

from fewstep.storage import Storage, StorageSettings, join, open_storage

_numbers = itertools.count()


@pytest.fixture(scope="session")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Storage]:
    """A storage on a SeaweedFS of its own: loopback, free ports, ended when the tests end."""
    home = tmp_path_factory.mktemp("s3")
    settings = StorageSettings(home=home, bucket="tests", read_timeout_s=20.0, retry_base_s=0.05, retry_total_s=30.0)
    with open_storage(settings) as opened:
        yield opened


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
