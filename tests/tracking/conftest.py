"""One MLflow database for the tests of this folder: making its tables takes seconds."""

from __future__ import annotations

import itertools

import pytest

from fewstep.tracking.settings import TrackingSettings
from fewstep.tracking.tracker import Tracker

_numbers = itertools.count()


@pytest.fixture(scope="session")
def database_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A sqlite tracking URI."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


@pytest.fixture
def tracker(database_uri: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> Tracker:
    """A tracker on an experiment of its own, with its files on the local disk."""
    monkeypatch.setenv("FEWSTEP_HOME", str(tmp_path / "home"))
    settings = TrackingSettings(uri=database_uri, experiment=f"test-{next(_numbers)}", flush_every_s=0.1)
    return Tracker.open(settings)
