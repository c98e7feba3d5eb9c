"""The registry when it cannot be asked."""

from __future__ import annotations

import pytest

from fewstep.errors import TrackingError
from fewstep.tracking.connection import connect
from fewstep.tracking.registry import Registry
from fewstep.tracking.settings import TrackingSettings
from fewstep.tracking.tracker import Tracker


def test_a_server_that_is_away_is_no_alias_that_is_not_set() -> None:
    settings = TrackingSettings(uri="http://127.0.0.1:9", retries=0, timeout_s=1)
    registry = Registry(Tracker(connect(settings), "0", settings=settings, storage=None))
    with pytest.raises(TrackingError, match=r"look up models:/emoji@champion.*Is MLflow running at"):
        registry.find("models:/emoji@champion")
