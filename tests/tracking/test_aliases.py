"""Who is champion and candidate: by the gate, by register's offer, and by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from fewstep.cli import main
from fewstep.tracking.registry import Registry
from fewstep.tracking.tracker import Tracker


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    return request.node.originalname


@pytest.fixture
def add(tracker: Tracker, tmp_path: Path, name: str):
    """Return what registers a further version of `name`."""
    folder = tmp_path / "student"
    folder.mkdir()
    (folder / "model_index.json").write_text("{}")

    def added(fingerprint: str) -> int:
        tags = {"num_inference_steps": "4", "teacher": "t", "data_digest": "d", "fingerprint": fingerprint}
        with tracker.run("register", key=f"{name}-{fingerprint}") as run:
            return Registry(tracker).log_student(run, folder, name=name, params={}, tags=tags, metrics={})

    return added


def aliases(registry: Registry, name: str) -> dict[int, tuple[str, ...]]:
    return {each.version: each.aliases for each in registry.versions(name)}


def test_a_new_version_is_offered_and_what_was_judged_before_is_not(tracker: Tracker, add, name: str) -> None:
    registry = Registry(tracker)
    assert registry.offer(name, add("a"), passed=True, reason="good") == "candidate"
    assert (registry.get(f"models:/{name}/1").passed, registry.get(f"models:/{name}/1").reason) == (True, "good")
    assert registry.set_alias(name, "champion", 1) is None
    assert registry.offer(name, add("b"), passed=False, reason="bad") == "candidate"
    assert aliases(registry, name) == {1: ("champion",), 2: ("candidate",)}
    # The gate was widened: judged anew, and still the candidate.
    assert registry.offer(name, 2, passed=True, reason="good enough") == "candidate"
    assert registry.get(f"models:/{name}/2").passed
    assert registry.offer(name, 1, passed=False, reason="stricter") == "champion", "it is not taken away here"
    assert registry.set_alias(name, "champion", 2) == 1
    assert aliases(registry, name) == {1: (), 2: ("champion",)}
    # An old run is run again, also after a newer one was rolled back.
    assert registry.offer(name, 1, passed=True, reason="good") is None
    assert registry.set_alias(name, "champion", 1) == 2
    assert registry.offer(name, 2, passed=True, reason="good") is None
    assert aliases(registry, name) == {1: ("champion",), 2: ()}


def test_a_version_whose_offer_was_cut_short_does_not_push_out_a_newer_one(tracker: Tracker, add, name: str) -> None:
    registry = Registry(tracker)
    old, new = add("a"), add("b")
    registry.offer(name, new, passed=True, reason="good")
    assert registry.offer(name, old, passed=True, reason="good") is None
    assert aliases(registry, name) == {old: (), new: ("candidate",)}


@pytest.fixture
def call(tracker: Tracker, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracker.settings.tracking_uri())

    def called(*arguments: str) -> Result:
        return CliRunner().invoke(main, arguments)

    return called


def test_promote_and_roll_back_by_hand(tracker: Tracker, add, name: str, call) -> None:
    registry = Registry(tracker)
    registry.offer(name, add("a"), passed=True, reason="good")
    registry.offer(name, add("b"), passed=False, reason="kid is 3 times the teacher's")
    champion = f"models:/{name}@champion"
    for uri, line in (
        (f"models:/{name}/1", f"{champion}: none → version 1"),
        (f"models:/{name}/1", f"{champion}: version 1 as before"),
    ):
        assert call("promote", uri).output.strip() == line
    refused = call("promote", f"models:/{name}@candidate")
    assert refused.exit_code == 2
    assert f"error: models:/{name}/2 failed its gate: kid is 3 times the teacher's. Take another" in refused.output
    assert "--force to make it champion" in refused.output
    assert registry.get(champion).version == 1
    forced = call("promote", f"models:/{name}@candidate", "--force")
    assert forced.stdout.strip() == f"{champion}: version 1 → 2"
    assert "failed its gate: kid is 3 times" in forced.stderr
    assert (
        call("promote", f"models:/{name}/1", "--alias", "canary").stdout.strip().endswith("@canary: none → version 1")
    )
    assert call("promote", f"models:/{name}/1").stdout.strip() == f"{champion}: version 2 → 1"
    assert aliases(registry, name) == {1: ("canary", "champion"), 2: ()}

    listed = call("versions", name).stdout.splitlines()
    assert [line.split()[:2] for line in listed] == [["version", "aliases"], ["2", "-"], ["1", "canary,"]]
    assert listed[1].split()[2:4] == ["4", "failed"]
    assert "champion  4      passed  20" in listed[2]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["promote", "models:/nobody/1"], "has no model 'nobody'"),
        (["promote", "models:/nobody"], "a registered model is written models:/NAME@ALIAS or models:/NAME/VERSION"),
        (["versions", "nobody"], "nobody: MLflow at"),
        (["versions", "no/body"], "model name 'no/body': it must begin with a letter"),
    ],
)
def test_what_is_not_there_is_said(call, arguments: list[str], words: str) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert result.output.startswith("error: ")
    assert words in result.output
