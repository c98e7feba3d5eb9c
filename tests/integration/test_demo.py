"""`make demo` in small: the recipe, a picture over HTTP by the openai client, three lines, nothing left running."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest
import yaml
from PIL import Image

from fewstep.demo import run_demo
from fewstep.errors import RecipeError
from tiny import tiny_recipe, tiny_teacher_folder

pytestmark = pytest.mark.slow


@pytest.mark.usefixtures("ray_cluster")
def test_demo_ends_with_a_picture_and_three_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FEWSTEP_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    content = tiny_recipe(tiny_teacher_folder(tmp_path / "teacher"), name="tiny-demo")
    # Nobody could pass: the student is registered all the same, as candidate with the reason.
    content["register"]["gate"] = {"min_num_images": 40, "max_kid_ratio": 1e-6}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(content))

    made, look, following = run_demo(recipe, tmp_path / "out")

    assert made.startswith("Made: a 2-step student, version 1 of tiny-demo")
    assert "as candidate because kid_lite0_to_real" in made
    assert str(tmp_path / "out" / "report.html") in look
    assert "make serve MODEL=models:/tiny-demo@candidate" in following
    picture = Image.open(tmp_path / "out" / "over_http.png")
    assert picture.size == (16, 16)
    assert picture.info["prompt"] == "a red apple, twemoji"
    assert json.loads((tmp_path / "out" / "report.json").read_text())["results"]
    # Ray's own line about the end of Serve would be the last that a user sees.
    assert "graceful_shutdown" not in capfd.readouterr().err
    home = str(tmp_path / "home")
    assert not [p for p in psutil.process_iter(["cmdline"]) if any(home in part for part in p.info["cmdline"] or [])]


def test_demo_outside_a_clone_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match="in the folder of a clone"):
        run_demo(Path("workflows/recipes/demo.yaml"))


def test_demo_of_a_recipe_that_registers_nothing(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: x\nstages: [prepare]\nprepare: {}\nteacher: t\n")
    with pytest.raises(RecipeError, match="no stage register"):
        run_demo(recipe)
