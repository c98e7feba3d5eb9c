"""Gauges without a Ray around them; `tests/integration/test_training_ray.py` reads them where Prometheus does."""

from __future__ import annotations

from typing import Any

import pytest

from fewstep.train import gauges
from fewstep.train.gauges import TrainingGauges

FIGURES = {"loss": 0.5, "images_per_second": 300.0, "workers": 2.0, "data_wait_share": 0.1, "grad_norm": 1.0}


class Recorder:
    shown: dict[str, tuple[float, dict[str, str]]]

    def __init__(self, name: str, *, description: str, tag_keys: tuple[str, ...]) -> None:
        assert description
        self._name, self._keys = name, tag_keys

    def set_default_tags(self, tags: dict[str, str]) -> None:
        assert tuple(tags) == self._keys
        self._tags = tags

    def set(self, value: float) -> None:
        self.shown[self._name] = (value, self._tags)


@pytest.mark.parametrize("flops_of_peak", [None, 0.002])
def test_each_figure_has_its_gauge(monkeypatch: pytest.MonkeyPatch, flops_of_peak: float | None) -> None:
    Recorder.shown = {}
    monkeypatch.setattr(gauges, "Gauge", Recorder)
    tags = {"recipe": "r", "stage": "guidance", "training": "t"}
    TrainingGauges(tags, flops_of_peak=flops_of_peak).show(FIGURES, updates_done=20)
    assert all(each[1] == tags for each in Recorder.shown.values())
    wanted = {"loss": 0.5, "images_per_second": 300.0, "workers": 2.0, "data_wait_share": 0.1, "update": 20.0}
    if flops_of_peak is not None:
        wanted["mfu"] = 300 / 2 * 0.002
    assert {name: value for name, (value, _) in Recorder.shown.items()} == {
        f"fewstep_train_{name}": value for name, value in wanted.items()
    }


def test_what_goes_wrong_is_said_once_and_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no agent")

    monkeypatch.setattr(gauges, "Gauge", broken)
    shown = TrainingGauges({}, flops_of_peak=None)
    for done in (1, 2):
        shown.show(FIGURES, updates_done=done)
    assert caplog.messages == ["figures for Prometheus are no longer set: RuntimeError: no agent"]
