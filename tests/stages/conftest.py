"""What tests of stages work with: a store with MLflow, and trainings in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from fewstep.storage import Storage
from fewstep.tracking.settings import TrackingSettings
from fewstep.tracking.tracker import Tracker
from fewstep.workplace import Workplace
from in_process import trainings_in_process


@pytest.fixture(scope="module")
def workplace(storage: Storage, new_database: Callable[[], str]) -> Workplace:
    return Workplace(storage, Tracker.open(TrackingSettings(uri=new_database(), experiment="t"), storage))


@pytest.fixture(scope="module")
def in_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with trainings_in_process(tmp_path_factory):
        yield
