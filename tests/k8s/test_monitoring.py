"""What is shown and watched is what the code exports."""

import json
import re

from k8s.all_objects import named_objects
from k8s.rendered import REPO, Manifest, find

_NAME = re.compile(r"ray_(fewstep_\w+?)(?:_bucket|_count|_sum|_total)?\b")


def _objects() -> list[Manifest]:
    return [each for source, each in named_objects() if source == "everything"]


def _exported() -> set[str]:
    code = [REPO / "src" / "fewstep" / "train" / "gauges.py", REPO / "src" / "fewstep" / "serve" / "metrics.py"]
    return {name for file in code for name in re.findall(r'"(fewstep_(?:train|serve)_\w+)"', file.read_text())}


def test_the_dashboard_shows_figures_that_there_are_and_all_of_trainings():
    dashboard = json.loads(find(_objects(), "ConfigMap", "fewstep-dashboard")["data"]["fewstep.json"])
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    shown = {name for query in queries for name in _NAME.findall(query)}
    assert shown <= _exported()
    assert {name for name in _exported() if "_train_" in name} <= shown
    for wanted in ("request_seconds", "queued_images", "batch_size"):
        assert f"fewstep_serve_{wanted}" in shown
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_alerts_watch_figures_that_there_are():
    rules = [
        rule for group in find(_objects(), "PrometheusRule", "fewstep")["spec"]["groups"] for rule in group["rules"]
    ]
    watched = {name for rule in rules for name in _NAME.findall(rule["expr"])}
    assert watched
    assert watched <= _exported()
    for rule in rules:
        assert rule["annotations"]["summary"]
        assert rule["labels"]["severity"] in ("warning", "critical")


def test_every_figure_is_in_the_manual():
    manual = (REPO / "docs" / "metrics.md").read_text()
    assert [name for name in sorted(_exported()) if name not in manual] == []
