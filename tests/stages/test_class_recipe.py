"""A class recipe as a whole, on scikit-learn's digits: every box of the picture, and what is not done twice. Trainings
run in this process; what Ray does beside them is the business of tests/integration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fewstep.models import ClassConditionalPipeline
from fewstep.recipe import Recipe, parse_recipe
from fewstep.stages.context import Artifact
from fewstep.stages.evaluate_classes import _Sampler
from fewstep.storage import join
from fewstep.tracking.fetch import fetch_model
from fewstep.workflow import run_stage
from fewstep.workplace import Workplace
from in_process import trainings_in_process

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TRAIN = {"updates": 3, "global_batch_size": 8, "learning_rate": 1e-3}
STUDENTS = ("student", "student_stochastic", "student_single_w")


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return parse_recipe(
        {
            "name": "tiny-digits",
            "stages": ["prepare", "teacher", "encode", "guidance", "progressive", "evaluate"],
            "prepare_classes": {"source": "digits", "num_train": 60, "num_evaluate": 40, "samples_per_shard": 30},
            "stream": {"num_streams": 2},
            "cluster": {"num_cpus": 2, "cpus_per_worker": 1, "use_gpu": False},
            "train_class_teacher": {
                "network": {
                    "num_classes": 10,
                    "resolution": 8,
                    "channels": 1,
                    "block_out_channels": [8, 16],
                    "attention_from_level": 1,
                    "attention_head_dim": 8,
                    "norm_num_groups": 4,
                },
                "train": TRAIN,
            },
            "guidance": {"embedding_dim": 16, "num_validation": 8, "train": TRAIN},
            "progressive": {
                "kinds": ["deterministic", "stochastic", "single_w"],
                "single_w": [1.0],
                "ladder": [1],
                "train": TRAIN,
            },
            "evaluate": {"guidance_scale": 2.0, "reference_steps": 2},
            "evaluate_classes": {
                "weights": [0.3, 1.0],
                "steps": [1],
                "reference_steps": 4,
                "num_pictures": 40,
                "classifier": {"num_updates": 4, "batch_size": 8},
                "compare": {"batch_size": 20},
            },
        }
    )


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("out")


@pytest.fixture(scope="module")
def artifacts(
    recipe: Recipe, workplace: Workplace, out: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[Any, Artifact]:
    with trainings_in_process(tmp_path_factory):
        return run_stages(recipe, workplace, out=out)


def run_stages(recipe: Recipe, workplace: Workplace, *, out: Path) -> dict[Any, Artifact]:
    return {name: run_stage(name, recipe, workplace, out=out) for name in recipe.stages}


def test_the_report_has_a_row_for_each_method_step_count_and_weight(
    artifacts: dict[Any, Artifact], recipe: Recipe, out: Path
) -> None:
    assert list(artifacts) == list(recipe.stages)
    report = json.loads((out / "report.json").read_text())
    rows = {(row["method"], row["num_inference_steps"], row["w"]): row for row in report["results"]}
    methods = [("teacher", 4), *((method, 1) for method in ("ddim", "dpmpp", "student", "student_stochastic"))]
    both = {(method, steps, w) for method, steps in methods for w in (0.3, 1.0)}
    assert set(rows) == both | {("student_single_w", 1, 1.0)}
    for (method, steps, _), row in rows.items():
        assert row["network_evaluations"] == (1 if method in STUDENTS else 2) * steps
        assert row["num_pictures"] == 40
        assert 0 <= row["accuracy"]["value"] <= 1
        assert row["fd_classifier"]["value"] > 0
        assert row["seconds_per_picture"]["value"] > 0
    assert report["classifier"]["num_classes"] == 10
    assert report["pictures_per_class"] == [4] * 10
    assert (out / "report.html").read_text().startswith("<!")
    assert {"frechet.svg", "precision_recall.svg", "pictures_w0.3.png", "tables.md"} <= {p.name for p in out.iterdir()}


def test_a_model_in_pixels_is_trained_on_the_pictures_themselves(artifacts: dict[Any, Artifact]) -> None:
    assert artifacts["encode"].facts["format"]["kind"] == "class_pictures"
    for split in ("train", "evaluate"):
        assert artifacts["encode"].facts[split]["uri"] == artifacts["prepare"].facts[split]["uri"]
    assert set(artifacts["prepare"].facts) == {"train", "evaluate"}


def test_a_students_folder_draws_its_classes(artifacts: dict[Any, Artifact], workplace: Workplace) -> None:
    students = artifacts["progressive"].facts["students"]
    assert set(students) == {"1", "stochastic-1", "single_w-1-1"}
    folder = fetch_model(students["1"]["uri"], storage=workplace.storage)
    pipeline = ClassConditionalPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline([3, 3, 7], num_inference_steps=1, guidance_scale=2.0).images
    assert [(picture.size, picture.mode) for picture in pictures] == [((8, 8), "L")] * 3
    assert pipeline.config.class_names == list("0123456789")


def test_a_second_run_skips_everything_and_brings_the_report_back(
    artifacts: dict[Any, Artifact], recipe: Recipe, workplace: Workplace, out: Path, tmp_path: Path
) -> None:
    assert run_stages(recipe, workplace, out=tmp_path) == artifacts
    assert {file.name for file in tmp_path.iterdir()} == {file.name for file in out.iterdir() if file.is_file()}


def test_an_evaluation_that_was_killed_goes_on_with_the_rows_it_has(
    artifacts: dict[Any, Artifact],
    recipe: Recipe,
    workplace: Workplace,
    out: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    storage, home = workplace.storage, artifacts["evaluate"].uri
    rows = [info.uri for info in storage.list(join(home, "rows"))]
    assert len([uri for uri in rows if uri.endswith(".npy")]) == 11 * 2  # rows, and batches of 20
    storage.delete(join(home, "done.json"))
    # One batch was not yet there whole.
    storage.delete(join(home, "rows", "student-1-w1-20-20.json"))
    drawn: list[tuple[str, int]] = []
    real = _Sampler._sample

    def sample(self: Any, spec: Any, labels: Any, seeds: Any) -> Any:
        drawn.append((spec.method, seeds[0]))
        return real(self, spec, labels, seeds)

    monkeypatch.setattr(_Sampler, "_sample", sample)
    run_stage("evaluate", recipe, workplace, out=tmp_path)
    assert drawn == [("student", 20)]
    first, again = (json.loads((folder / "report.json").read_text())["results"] for folder in (out, tmp_path))
    for before, after in zip(first, again, strict=True):
        if before["method"] != "student":
            assert before == after, "the times too are those of when the pictures were made"
        assert before["fd_classifier"] == after["fd_classifier"]
