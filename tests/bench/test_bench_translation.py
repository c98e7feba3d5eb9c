"""Style transfer measured, on tiny students that a recipe is said to have trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from fewstep.bench.commands import bench
from fewstep.bench.translation import run_translation, translation_table
from fewstep.bench.translation_run import Pair, TranslationSettings
from fewstep.data.shards import write_shards
from fewstep.errors import DataError, RecipeError
from fewstep.models import load_model, read_student_info, save_student
from fewstep.recipe import Recipe, parse_recipe
from fewstep.stages.context import DONE, stage_uri
from fewstep.storage import Storage, join
from tiny import picture_samples, tiny_student_folder, tiny_teacher_folder

SETTINGS = TranslationSettings(source="left", target="right", count=20, reference_steps=4, num_bootstrap=100)


def _samples() -> list[dict[str, Any]]:
    samples = picture_samples(44)
    for number, sample in enumerate(samples):
        sample["txt"] = f"an apple, {('left', 'right')[number % 2]}".encode()
    return samples


def _students(folder: Path, kinds: tuple[str, ...]) -> dict[str, Any]:
    students = {}
    for kind in kinds:
        made = tiny_student_folder(folder / f"made-{kind}", num_inference_steps=2)
        info = read_student_info(made)
        assert info is not None
        parts = load_model(made)
        save_student(folder / kind, parts, parts.network, replace(info, kind=kind))
        students[kind] = {"kind": kind, "num_inference_steps": 2, "uri": str(folder / kind)}
    return students


@pytest.fixture
def recipe(storage: Storage, bucket_uri: str, tmp_path: Path) -> Recipe:
    shards = join(bucket_uri, "evaluate")
    write_shards(_samples(), shards, samples_per_shard=24, storage=storage)
    train = {"updates": 2, "global_batch_size": 4, "learning_rate": 1e-3}
    return parse_recipe(
        {
            "name": "style",
            "stages": ["encode", "guidance", "progressive"],
            "stream": {"num_streams": 4},
            "teacher": str(tiny_teacher_folder(tmp_path / "teacher")),
            "data": {"train": shards, "evaluate": shards},
            "guidance": {"train": train},
            "progressive": {"train": train, "ladder": [2], "kinds": ["deterministic", "encoder"]},
            "cluster": {"use_gpu": False},
        }
    )


def _say_done(recipe: Recipe, storage: Storage, students: dict[str, Any]) -> None:
    facts: dict[Any, dict[str, Any]] = {"encode": {"teacher": recipe.teacher}, "progressive": {"students": students}}
    for stage, known in facts.items():
        storage.write_json(join(stage_uri(recipe, storage, stage), DONE), {"fingerprint": "test", "facts": known})


def test_rows_table_and_grid(recipe: Recipe, storage: Storage, tmp_path: Path) -> None:
    _say_done(recipe, storage, _students(tmp_path, ("deterministic", "encoder")))
    result = run_translation(recipe, storage, SETTINGS, grid=tmp_path / "grid.png")
    rows = result["rows"]
    found = [(row["method"], row["num_inference_steps"], row["evaluations"]) for row in rows]
    assert found == [("teacher", 4, 12), ("student", 2, 4), ("ddim", 2, 6)]
    assert (result["count"], result["num_real"]) == (20, 22)
    assert "translated_mse" not in rows[0], "it is what the others are compared to"
    for row in rows[1:]:
        assert 0 < row["translated_mse_ci"][0] <= row["translated_mse"] <= row["translated_mse_ci"][1]
    by_method = {row["method"]: row for row in rows}
    assert by_method["teacher"]["relative_error"] < by_method["ddim"]["relative_error"], "more steps, a better inverse"
    table = translation_table(result).splitlines()
    assert [line.count("|") for line in table if line.startswith("| ")] == [7] * 4
    assert "20 held-out pictures from left to right" in table[0]
    assert (tmp_path / "grid.png").stat().st_size > 1000


def test_evaluations_are_counted() -> None:
    models: Any = None
    assert [Pair(method, models, models, 8).evaluations for method in ("student", "ddim")] == [16, 24]


def test_what_cannot_be_translated(recipe: Recipe, storage: Storage, tmp_path: Path) -> None:
    other = recipe.model_copy(update={"seed": 1})
    with pytest.raises(RecipeError, match=r"recipe style has trained no students yet: run `fewstep run RECIPE` first"):
        run_translation(other, storage, SETTINGS)
    _say_done(other, storage, _students(tmp_path, ("deterministic",)))
    with pytest.raises(RecipeError, match=r"students of the kinds \['deterministic'\]: a translation needs encoders"):
        run_translation(other, storage, SETTINGS)
    _say_done(recipe, storage, _students(tmp_path / "both", ("deterministic", "encoder")))
    with pytest.raises(DataError, match=r"0 of the 44 held-out captions have the word 'up', .*--from, --to"):
        run_translation(recipe, storage, SETTINGS.model_copy(update={"target": "up"}))


def test_command_line_names_the_option() -> None:
    found = CliRunner().invoke(bench, ["translation", "recipe.yaml", "--count", "3"])
    assert found.exit_code != 0
    assert "--count 3: Input should be greater than or equal to 20" in found.output
