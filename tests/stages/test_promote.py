"""register offers candidates and promote makes champions of them, whatever has happened in between."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from tests.evaluate.made_rows import report, result
from tests.test_recipe import content

from fewstep.errors import FewstepError, RecipeError
from fewstep.recipe import Recipe, parse_recipe
from fewstep.stages.context import DONE, Artifact, stage_uri
from fewstep.storage import join
from fewstep.tracking.registry import Registry
from fewstep.workflow import run_stage
from fewstep.workplace import Workplace
from tiny import tiny_student_folder


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_student_folder(tmp_path_factory.mktemp("student") / "of_4")


class Runs:
    """Recipes of one registered model whose stages before register are done."""

    def __init__(self, name: str, workplace: Workplace, student: Path, out: Path) -> None:
        self.name, self.workplace, self.out = name, workplace, out
        self._student = student
        self.registry = Registry(workplace.tracker)

    def recipe(self, seed: int, *, kid: float = 0.1, promote: bool = True) -> Recipe:
        """Return a recipe whose students have this KID; the teacher's is 0.1."""
        changes: dict[str, Any] = {"seed": seed, "register__name": self.name, "evaluate__steps": [4]}
        recipe = parse_recipe(content(**changes))
        recipe = recipe.model_copy(update={"stages": (*recipe.stages, *(["promote"] if promote else []))})
        # A student is its fingerprint, which that of tiny ones is not: the scale stands in for the training.
        scale = 4.0 - seed / 100
        recipe = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"guidance_scale": scale})})
        storage = self.workplace.storage
        facts: dict[Any, dict[str, Any]] = {
            "encode": {"teacher": "t", "teacher_digest": "t", "train": {"source_digest": "d"}},
            "progressive": {"students": {"4": {"uri": str(self._student), "kind": "deterministic", "w": None}}},
            "evaluate": {},
        }
        for stage, left in facts.items():
            uri = stage_uri(recipe, storage, stage)
            record = asdict(Artifact(uri=uri, fingerprint="f", facts=left))
            del record["uri"]
            storage.write_json(join(uri, DONE), record)
        rows = report(result("teacher", 50), result("student", 4, kid_lite0_to_real=kid))
        uri = join(stage_uri(recipe, storage, "evaluate"), "report.json")
        storage.write_bytes(uri, rows.model_dump_json().encode())
        return recipe

    def stage(self, name: Any, recipe: Recipe) -> dict[str, Any]:
        artifact = run_stage(name, recipe, self.workplace, out=self.out)
        assert artifact.models() == {
            f"{self.name}, {each['alias']}": f"models:/{self.name}/{each['version']}"
            for each in artifact.facts["models"].values()
        }
        facts: dict[str, Any] = artifact.facts["models"][self.name]
        return facts

    def aliases(self) -> dict[int, tuple[str, ...]]:
        return {each.version: each.aliases for each in self.registry.versions(self.name)}


@pytest.fixture
def runs(request: pytest.FixtureRequest, workplace: Workplace, student: Path, tmp_path: Path) -> Runs:
    return Runs(request.node.name, workplace, student, tmp_path)


def test_a_candidate_that_passed_becomes_champion(runs: Runs) -> None:
    recipe = runs.recipe(1)
    with pytest.raises(FewstepError, match="stage register of recipe small has not finished"):
        run_stage("promote", recipe, runs.workplace, out=runs.out)
    left = runs.stage("register", recipe)
    assert (left["version"], left["alias"], left["passed"]) == (1, "candidate", True)
    assert runs.registry.get(f"models:/{runs.name}/1").passed
    assert runs.registry.get_champion(runs.name) is None, "a person may stand between the two"
    assert runs.stage("promote", recipe)["alias"] == "champion"
    assert runs.aliases() == {1: ("champion",)}
    # Both again, as a step that is retried: nothing moves.
    assert runs.stage("register", recipe)["alias"] == "champion"
    assert runs.stage("promote", recipe)["alias"] == "champion"
    assert runs.aliases() == {1: ("champion",)}


def test_one_that_failed_leaves_the_champion_and_is_no_failure(runs: Runs, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="fewstep")
    good, bad = runs.recipe(1), runs.recipe(2, kid=0.5)
    for recipe in (good, bad):
        runs.stage("register", recipe)
        left = runs.stage("promote", recipe)
    assert (left["alias"], left["champion_before"]) == ("candidate", 1)
    assert runs.aliases() == {1: ("champion",), 2: ("candidate",)}
    said = next(text for text in caplog.messages if "is not promoted" in text)
    assert f"models:/{runs.name}/2 is not promoted, version 1 stays the champion: it failed the gate" in said
    assert "5.00 times the teacher's" in said
    assert "promote: no new champion" in caplog.messages


def test_an_old_run_does_not_bring_its_version_back(runs: Runs, caplog: pytest.LogCaptureFixture) -> None:
    first, second = runs.recipe(1), runs.recipe(2)
    runs.stage("register", first)
    runs.stage("register", second)
    assert runs.stage("promote", second)["alias"] == "champion"
    # The first was waiting for its approval meanwhile.
    assert runs.stage("promote", first)["alias"] == "without an alias"
    assert "it is the candidate no longer" in caplog.text
    assert f"`fewstep promote models:/{runs.name}/1` makes it the champion all the same" in caplog.text
    # Rolled back by hand: neither step of the second run undoes it.
    runs.registry.set_alias(runs.name, "champion", 1)
    assert runs.stage("register", second)["alias"] == "without an alias"
    assert runs.stage("promote", second)["alias"] == "without an alias"
    assert runs.aliases() == {1: ("champion",), 2: ()}


def test_an_older_candidate_waits_behind_a_newer_champion(runs: Runs, caplog: pytest.LogCaptureFixture) -> None:
    waiting, direct = runs.recipe(1), runs.recipe(2, promote=False)
    runs.stage("register", waiting)
    assert runs.stage("register", direct)["alias"] == "champion", "as ever without the stage promote"
    assert runs.stage("promote", waiting)["alias"] == "candidate"
    assert "the champion is newer" in caplog.text
    assert runs.aliases() == {1: ("candidate",), 2: ("champion",)}


def test_promote_needs_register() -> None:
    stages = ["prepare", "encode", "guidance", "progressive", "evaluate", "promote"]
    with pytest.raises(RecipeError, match="stages has promote but not register, which names the versions"):
        parse_recipe(content(stages=stages))
