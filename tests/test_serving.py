"""What `fewstep serve` serves when no model is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from fewstep import serving
from fewstep.errors import ModelError
from fewstep.storage import Storage
from fewstep.tracking.registry import Registry
from fewstep.tracking.settings import TrackingSettings
from fewstep.tracking.tracker import Tracker


@pytest.fixture
def empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEWSTEP_HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(serving, "ASSETS", tmp_path / "assets")
    return tmp_path


def test_nothing_to_serve_is_said_with_the_way_out(empty_home: Path) -> None:
    with pytest.raises(ModelError, match="make demo"):
        serving.default_models()


def test_shipped_students_come_in_their_order(empty_home: Path) -> None:
    for name in ("emoji-student-1", "emoji-student-4", "emoji-teacher"):
        (empty_home / "assets" / name).mkdir(parents=True)
    assert serving.default_models() == ("asset:emoji-student-4", "asset:emoji-student-1")


@pytest.mark.parametrize(
    ("passed", "served"),
    [
        (True, ("models:/fewstep-demo@champion", "models:/fewstep-demo-2@champion")),
        (False, ("asset:emoji-student-4",)),
    ],
)
def test_the_demos_champion_comes_before_the_shipped_ones(
    empty_home: Path, storage: Storage, passed: bool, served: tuple[str, ...]
) -> None:
    (empty_home / "assets" / "emoji-student-4").mkdir(parents=True)
    folder = empty_home / "student"
    folder.mkdir()
    (folder / "model_index.json").write_text("{}")
    tracker = Tracker.open(TrackingSettings(), storage)
    registry = Registry(tracker)
    tags = {"teacher": "t", "data_digest": "d", "fingerprint": "f"}
    with tracker.run("r", key="r") as run:
        for name, steps, good in (
            ("fewstep-demo", 4, passed),
            ("fewstep-demo-2", 2, True),
            ("fewstep-demo-1", 1, False),
        ):
            version = registry.log_student(
                run, folder, name=name, params={}, tags={**tags, "num_inference_steps": str(steps)}, metrics={}
            )
            registry.promote(name, version, passed=good, reason="test")
    assert serving.default_models() == served
