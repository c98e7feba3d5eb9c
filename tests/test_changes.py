"""FEWSTEP_SET and --set change a recipe as it is loaded, and say whose a mistake is."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from tests.test_recipe import content

from fewstep.changes import without_passwords
from fewstep.cli import main
from fewstep.errors import RecipeError
from fewstep.recipe import load_recipe
from fewstep.tracking.connection import without_password


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(content(progressive__updates={1: 30})))
    return file


def _loaded(file: Path, monkeypatch: pytest.MonkeyPatch, *lines: str, options: tuple[str, ...] = ()) -> Any:
    monkeypatch.setenv("FEWSTEP_SET", "\n".join(lines))
    return load_recipe(file, changes=options)


def test_lines_change_keys_and_the_rest_stays(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = load_recipe(recipe_file)
    changed = _loaded(
        recipe_file,
        monkeypatch,
        "teacher=models:/sd15@base",
        "",
        "  name = my-run  ",
        "seed=",
        "progressive.ladder=[8, 4, 2, 1]",
        "progressive.updates.1=40",
        "progressive.updates.8=5",
        "guidance.train.learning_rate=1e-4",
        "storage.bucket=other",
        "data.train=s3://bucket/laion/train?a=b",
    )
    assert (changed.teacher, changed.name, changed.seed) == ("models:/sd15@base", "my-run", before.seed)
    assert changed.progressive.ladder == (8, 4, 2, 1)
    assert changed.progressive.updates == {1: 40, 8: 5}
    assert changed.guidance.train.learning_rate == 1e-4
    assert changed.guidance.w_max == before.guidance.w_max
    assert changed.storage.bucket == "other"
    assert changed.data.train == "s3://bucket/laion/train?a=b"
    assert load_recipe(recipe_file, changes=["name=small"]).name == "small"


def test_text_that_looks_like_a_number_or_a_date_stays_text(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("202611", "2026-11-01", "'2026-11-01'", "true"):
        assert _loaded(recipe_file, monkeypatch, f"data.version={text}").data.version == text.strip("'")
    assert _loaded(recipe_file, monkeypatch, "data.version=null").data.version is None


def test_a_plain_value_gives_way_to_a_mapping(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe_file.write_text(yaml.safe_dump(content(encode=3)))
    changed = _loaded(recipe_file, monkeypatch, "encode.batch_size=5", "encode.crop=random")
    assert (changed.encode.batch_size, changed.encode.crop) == (5, "random")


def test_the_option_wins_over_the_environment(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("seed=3", "name=")
    assert _loaded(recipe_file, monkeypatch, "seed=2", "name=b", options=options).seed == 3
    assert _loaded(recipe_file, monkeypatch, "seed=2", "name=b", options=options).name == "b"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("seed", "FEWSTEP_SET: 'seed' is not written key.path=value, such as"),
        ("=3", "FEWSTEP_SET: '=3' is not written key.path=value"),
        ("a..b=3", "FEWSTEP_SET: 'a..b=3' is not written"),
        (
            "teachr=x",
            r"yaml, changed by FEWSTEP_SET \(teachr=x\), cannot be used:\n  teachr: unknown key; the keys",
        ),
        ("guidance.wmax=3", r"FEWSTEP_SET \(guidance\.wmax=3\), cannot be used:\n  guidance\.wmax: unknown key"),
        ("seed=many", r"FEWSTEP_SET \(seed=many\), cannot be used:\n  seed='many'"),
        (
            "cluster.num_workers=3",
            r"FEWSTEP_SET \(cluster\.num_workers=3\), .*\n.*no multiple of cluster",
        ),
        ("name=@x", "FEWSTEP_SET: name=@x: the value is no YAML"),
        ("seed=[", r"FEWSTEP_SET: seed=\[: the value is no YAML"),
        ("seed=2026-02-30", "FEWSTEP_SET: seed=2026-02-30: the value is no YAML .*day is out of range"),
        ("teacher=#base", "FEWSTEP_SET: teacher=#base: YAML takes the value for a comment"),
    ],
)
def test_what_cannot_work_says_where_it_came_from(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, line: str, words: str
) -> None:
    with pytest.raises(RecipeError, match=words):
        _loaded(recipe_file, monkeypatch, line)
    monkeypatch.delenv("FEWSTEP_SET")
    with pytest.raises(RecipeError, match=words.replace("FEWSTEP_SET", "--set")):
        load_recipe(recipe_file, changes=[line])


def test_each_change_is_told_once_without_passwords(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="fewstep")
    lines = ("teacher=models:/a/1", "tracking.uri=postgresql://me:secret@db/mlflow", "progressive.ladder=[8, 4, 2, 1]")
    _loaded(recipe_file, monkeypatch, *lines, options=("register.gate.max_kid_ratio=2",))
    assert caplog.messages == [
        "FEWSTEP_SET: teacher=models:/a/1 (the recipe says asset:emoji-teacher)",
        "FEWSTEP_SET: tracking.uri=postgresql://me:***@db/mlflow (the recipe says nothing)",
        "FEWSTEP_SET: progressive.ladder=[8, 4, 2, 1] (the recipe says [4, 2, 1])",
        "--set: register.gate.max_kid_ratio=2 (the recipe says nothing)",
    ]
    with pytest.raises(RecipeError) as caught:
        _loaded(recipe_file, monkeypatch, "tracking.url=postgresql://me:secret@db/mlflow")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "command", [["run"], ["stage", "promote"], ["prepare"], ["plan"], ["evaluate", "--out", "x"]], ids=lambda c: c[0]
)
def test_every_command_that_runs_a_recipe_takes_changes(recipe_file: Path, command: list[str]) -> None:
    result = CliRunner().invoke(main, [*command, str(recipe_file), "--set", "seed=1", "--set", "teachr=x"])
    assert result.exit_code == 2
    assert f"error: {recipe_file}, changed by --set (seed=1, teachr=x), cannot be used:" in result.output


@pytest.mark.parametrize(
    "address", ["postgresql://me:se/cret@db", "http://:secret@host", "postgresql://me:se@cret@db/mlflow"]
)
def test_no_password_is_shown(recipe_file: Path, address: str) -> None:
    assert "cret" not in without_passwords(address)
    assert "cret" not in without_password(address)
    with pytest.raises(RecipeError, match=r"tracking='.*://.*:\*\*\*@") as raised:
        load_recipe(recipe_file, changes=(f"tracking={address}",))
    assert "cret" not in str(raised.value)
