"""Fixtures for all tests: a real S3 server with credentials enforced."""

from __future__ import annotations

import itertools
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
