"""`make demo` in small: what is done is skipped; a picture over HTTP by the openai client, three lines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from PIL import Image

from fewstep.demo import run_demo
from fewstep.errors import RecipeError
from fewstep.recipe import load_recipe
from fewstep.workflow import run_stage
from fewstep.workplace import open_workplace
from tiny import tiny_recipe, tiny_teacher_folder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.long
@pytest.mark.parametrize("killed", [False, True])
def test_a_demo_goes_on_where_it_was_and_ends_with_a_picture_and_three_lines(
    killed: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The demo does only what is left: after its first stages, or a kill -9 of the whole command in stage two."""
    home = str(tmp_path / "home")
    monkeypatch.setenv("FEWSTEP_HOME", home)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    content = tiny_recipe(tiny_teacher_folder(tmp_path / "teacher"), name="tiny-demo")
    if killed:
        content["progressive"]["train"]["updates"] = 60
    # Nobody could pass: the student is registered all the same, as candidate with the reason.
    content["register"]["gate"] = {"min_num_images": 40, "max_kid_ratio": 1e-6}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(content))

    if killed:
        _run_and_kill(recipe, tmp_path)
    else:
        loaded = load_recipe(recipe)
        with open_workplace(loaded) as workplace:
            for name in ("prepare", "encode", "guidance"):
                run_stage(name, loaded, workplace, out=tmp_path / "out")

    caplog.set_level("INFO", logger="fewstep")
    made, look, following = run_demo(recipe, tmp_path / "out")

    for stage in ("prepare", "encode", "guidance"):
        assert any(f"{stage}: done already" in message for message in caplog.messages), caplog.messages
    assert any("progressive: done in" in message for message in caplog.messages)
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
    assert not [p for p in psutil.process_iter(["cmdline"]) if any(home in part for part in p.info["cmdline"] or [])]


def _run_and_kill(recipe: Path, tmp_path: Path) -> None:
    log = tmp_path / "first.log"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-m", "fewstep.cli", "run", str(recipe)]
    with log.open("w") as output:
        first = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=output, stdout=output)
        _wait_for(log, "2 steps", first)
        time.sleep(3)
        os.kill(first.pid, signal.SIGKILL)
        first.wait()


def _wait_for(log: Path, text: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 350
    while text not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


def test_demo_outside_a_clone_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match="in the folder of a clone"):
        run_demo(Path("workflows/recipes/demo.yaml"))


def test_demo_of_a_recipe_that_registers_nothing(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: x\nstages: [prepare]\nprepare: {}\nteacher: t\n")
    with pytest.raises(RecipeError, match="no stage register"):
        run_demo(recipe)
