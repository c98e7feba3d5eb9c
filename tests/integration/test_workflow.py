"""The main job end to end with a tiny teacher and real parts; skipped when done, resumed when killed."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner
from diffusers import StableDiffusionPipeline
from openai import BadRequestError, OpenAI
from PIL import Image

from fewstep.cli import main
from fewstep.errors import ModelError
from fewstep.models import read_student_info
from fewstep.recipe import Recipe, parse_recipe
from fewstep.stages import memory
from fewstep.stages.all_stages import STAGES
from fewstep.stages.context import Artifact, StageContext, find_artifact, stage_uri
from fewstep.stages.evaluate import evaluate_models
from fewstep.stages.fingerprints import data_digest, folder_digest
from fewstep.storage import Storage, join
from fewstep.tracking.registry import Registry
from fewstep.tracking.settings import TrackingSettings
from fewstep.tracking.tracker import Tracker, flatten
from fewstep.workflow import run_stage, run_workflow
from fewstep.workplace import Workplace
from tiny import tiny_recipe, tiny_teacher_folder

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_teacher_folder(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def recipe(teacher: Path) -> Recipe:
    content = tiny_recipe(teacher, name="tiny-workflow")
    # An untrained scorer on an untrained teacher may align below zero, which the gate would refuse.
    content["register"]["gate"]["min_alignment_ratio"] = None
    return parse_recipe(content)


@pytest.fixture(scope="module")
def workplace(storage: Storage, new_database: Callable[[], str]) -> Workplace:
    settings = TrackingSettings(uri=new_database(), experiment="tiny-workflow")
    return Workplace(storage, Tracker.open(settings, storage))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("out")


@pytest.fixture(scope="module")
def artifacts(recipe: Recipe, workplace: Workplace, out: Path, ray_cluster: None) -> dict[Any, Artifact]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWSTEP_GIT_COMMIT", "first-commit")
        return run_workflow(recipe, workplace, out=out)


def test_every_stage_leaves_an_artifact(artifacts: dict[Any, Artifact], recipe: Recipe, workplace: Workplace) -> None:
    assert list(artifacts) == list(recipe.stages)
    for name, artifact in artifacts.items():
        assert find_artifact(recipe, workplace.storage, name) == artifact
        assert artifact.seconds > 0
        assert artifact.peak_memory_bytes > 2**20


def test_metadata_say_where_every_sample_comes_from(artifacts: dict[Any, Artifact], workplace: Workplace) -> None:
    for split in ("train", "evaluate", "alignment"):
        facts = artifacts["prepare"].facts[split]
        content = workplace.storage.read_bytes(join(facts["uri"], "metadata.parquet"))
        table = pq.read_table(io.BytesIO(content), columns=["key", "license", "source", "caption"])
        rows = table.to_pylist()
        assert len({row["key"] for row in rows}) == len(rows) == facts["num_samples"] > 0
        assert all(row["caption"] for row in rows)
        assert {(row["license"], row["source"].split(",")[0]) for row in rows} == {
            ("CC-BY-4.0", "Twemoji"),
            ("CC-BY-SA-4.0", "OpenMoji"),
        }


def test_report_has_the_promised_fields(artifacts: dict[Any, Artifact], out: Path) -> None:
    report = json.loads((out / "report.json").read_text())
    rows = {(row["method"], row["num_inference_steps"]): row for row in report["results"]}
    assert {("teacher", 4), ("ddim", 2), ("ddim", 1), ("dpmpp", 2), ("student", 2), ("student", 1)} <= set(rows)
    assert rows[("teacher", 4)]["network_evaluations"] == 8
    assert rows[("student", 2)]["network_evaluations"] == 2
    for row in rows.values():
        for metric in ("kid_lite0_to_real", "fd_lite0_to_real", "paired_mse", "seconds_per_image"):
            assert row[metric] is not None
            low, high = row[f"{metric}_ci"]
            assert low <= high
    assert [stage["name"] for stage in report["stages"]] == ["prepare", "encode", "guidance", "progressive", "evaluate"]
    assert not any(stage["skipped"] for stage in report["stages"])
    assert 0 < report["stage_one_relative_error"] < 10
    assert (out / "report.html").read_text().startswith("<!")
    assert Image.open(out / "samples.png").width > 100


def test_registered_student_is_a_plain_diffusers_folder(
    artifacts: dict[Any, Artifact], workplace: Workplace, recipe: Recipe
) -> None:
    models = artifacts["register"].facts["models"]
    assert models["tiny-workflow"]["alias"] == "champion", models
    registry = Registry(workplace.tracker)
    version = registry.get("models:/tiny-workflow@champion")
    assert version.num_inference_steps == 2
    pipe = StableDiffusionPipeline.from_pretrained(str(registry.download_model(version.uri)))
    calls: list[int] = []
    pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    pipe.set_progress_bar_config(disable=True)
    pipe("a red apple", num_inference_steps=2, guidance_scale=3.0)
    assert len(calls) == 2


def test_registered_students_name_what_made_them(
    artifacts: dict[Any, Artifact], recipe: Recipe, workplace: Workplace, teacher: Path
) -> None:
    encoded = artifacts["encode"].facts
    shards = artifacts["prepare"].facts["train"]["digest"]
    for student in artifacts["progressive"].facts["students"].values():
        assert student["code"]["fewstep.git_commit"] == "first-commit", "said by the training, for whoever registers"
    for name, facts in artifacts["register"].facts["models"].items():
        tags = Registry(workplace.tracker).get(f"models:/{name}/{facts['version']}").tags
        assert tags["fewstep.git_commit"] == "first-commit"
        assert tags["fewstep.torch"]
        assert tags["fewstep.teacher"] == encoded["teacher"]
        assert tags["fewstep.teacher_digest"] == folder_digest(teacher)
        assert tags["fewstep.data_digest"] == data_digest(recipe, shards_digests=[shards], resolution=16)
        assert tags["fewstep.fingerprint"]


def test_the_command_line_takes_models_of_the_registry_and_of_the_store(
    artifacts: dict[Any, Artifact],
    recipe: Recipe,
    workplace: Workplace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    storage = workplace.storage
    for name, value in storage.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FEWSTEP_HOME", str(tmp_path / "home"))
    content = recipe.model_dump(mode="json", by_alias=True)
    content["storage"] = {"kind": "s3", "endpoint_url": storage.endpoint_url, "bucket": storage.settings.bucket}
    content["tracking"] = workplace.tracker.settings.model_dump(mode="json")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))

    def fewstep(*arguments: str) -> list[str]:
        result = CliRunner().invoke(main, [arguments[0], *map(str, arguments[1:])])
        assert result.exit_code == 0, result.output
        return result.output.splitlines()

    recipe_option = ("--recipe", str(tmp_path / "recipe.yaml"))
    fewstep("export", "models:/tiny-workflow@champion", str(tmp_path / "student"), *recipe_option)
    info = read_student_info(tmp_path / "student")
    assert info is not None
    assert info.num_inference_steps == 2

    said = fewstep("stage", "progressive", str(tmp_path / "recipe.yaml"))
    labels, uris = zip(*(line.rsplit(" ", 1) for line in said), strict=True)
    assert labels == ("student, 2 steps", "student, 1 step")
    in_the_store = uris[0]
    assert in_the_store.startswith("s3://")
    pictures = [
        fewstep("sample", model, "a red apple", "--out", str(tmp_path / f"{number}"), *recipe_option)[-1]
        for number, model in enumerate(("models:/tiny-workflow@champion", in_the_store))
    ]
    first, second = (Image.open(picture).tobytes() for picture in pictures)
    assert first == second, "one student, by two names"

    page = fewstep("evaluate", str(tmp_path / "recipe.yaml"), in_the_store, "--out", str(tmp_path / "compare"))[-1]
    assert Path(page).exists()
    report = json.loads((tmp_path / "compare" / "report.json").read_text())
    assert [row["num_inference_steps"] for row in report["results"] if row["method"] == "student"] == [2]


def test_mlflow_has_parent_and_children_with_figures(
    artifacts: dict[Any, Artifact], workplace: Workplace, recipe: Recipe
) -> None:
    client, experiment = workplace.tracker.client, workplace.tracker.experiment_id
    runs = client.search_runs([experiment], max_results=100)
    by_name = {run.info.run_name: run for run in runs}
    assert {"tiny-workflow", "guidance", "progressive", "progressive 2 steps", "progressive 1 step"} <= set(by_name)
    parent = by_name["tiny-workflow"]
    assert parent.data.tags["fewstep.git_commit"] == "first-commit"
    assert parent.data.params == flatten(recipe.model_dump(mode="json", by_alias=True, exclude={"storage", "tracking"}))
    assert parent.data.params["guidance.train.updates"] == "8"
    for stage in recipe.stages:
        assert parent.data.metrics[f"{stage}.peak_memory_gib"] > 2**-10
        assert parent.data.metrics[f"{stage}.seconds"] > 0
    for name in ("guidance", "progressive 2 steps", "progressive 1 step"):
        assert by_name[name].data.tags["mlflow.parentRunId"] == parent.info.run_id
        figures = by_name[name].data.metrics
        assert {"loss", "images_per_second", "data_wait_share", "grad_norm", "peak_memory_bytes"} <= set(figures)
        assert min(figures["images_per_second"], figures["grad_norm"]) > 0
        assert 0 <= figures["data_wait_share"] <= 1
        assert figures["peak_memory_bytes"] > 2**20
    assert "relative_error" in by_name["guidance"].data.metrics
    assert all(run.info.status == "FINISHED" for run in runs)
    for steps in (2, 1):
        rung = by_name[f"progressive {steps} step{'s' if steps > 1 else ''}"]
        pictures = [i.uri for i in workplace.storage.list(join(rung.info.artifact_uri, "images")) if ".png" in i.uri]
        assert len(pictures) == 1
        grid = Image.open(io.BytesIO(workplace.storage.read_bytes(pictures[0])))
        assert grid.size == (64, 64)
        assert len(set(grid.getdata())) > 16


def test_second_run_skips_everything_and_brings_the_report_back(
    artifacts: dict[Any, Artifact],
    recipe: Recipe,
    workplace: Workplace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FEWSTEP_GIT_COMMIT", "later-commit")
    started = time.monotonic()
    again = run_workflow(recipe, workplace, out=tmp_path)
    assert {n: a for n, a in again.items() if n != "register"} == {
        n: a for n, a in artifacts.items() if n != "register"
    }
    assert again["register"].facts == artifacts["register"].facts
    assert time.monotonic() - started < 10
    assert (tmp_path / "report.html").exists()
    # Registering ran again with other code, which made none of the weights.
    version = again["register"].facts["models"]["tiny-workflow"]["version"]
    tags = Registry(workplace.tracker).get(f"models:/tiny-workflow/{version}").tags
    assert tags["fewstep.git_commit"] == tags["mlflow.source.git.commit"] == "first-commit"
    parent = workplace.tracker.find_run(f"{recipe.name}/{recipe.digest()}")
    assert parent is not None
    tags = workplace.tracker.client.get_run(parent).data.tags
    assert (tags["fewstep.git_commit"], tags["fewstep.resumed.git_commit"]) == ("first-commit", "later-commit")


def test_evaluating_more_prompts_at_another_scale_trains_nothing_anew(
    artifacts: dict[Any, Artifact], recipe: Recipe, workplace: Workplace, tmp_path: Path
) -> None:
    prepare, evaluate = recipe.prepare, recipe.evaluate
    assert prepare is not None
    more = recipe.model_copy(
        update={
            "prepare": prepare.model_copy(update={"num_evaluate": prepare.num_evaluate + 8}),
            "evaluate": evaluate.model_copy(update={"num_prompts": evaluate.num_prompts + 8, "guidance_scale": 2.0}),
        }
    )
    again = run_workflow(more, workplace, out=tmp_path)
    for stage in ("prepare", "encode", "guidance", "progressive", "evaluate"):
        assert again[stage].fingerprint != artifacts[stage].fingerprint
    assert again["encode"].facts["train"] == artifacts["encode"].facts["train"]
    assert again["encode"].facts["evaluate"]["num_samples"] == prepare.num_evaluate + 8
    assert again["guidance"].facts["training"] == artifacts["guidance"].facts["training"]
    assert again["progressive"].facts["students"] == artifacts["progressive"].facts["students"]
    assert (artifacts["guidance"].facts["reused"], again["guidance"].facts["reused"]) == (False, True)
    report = json.loads((tmp_path / "report.json").read_text())
    assert {row["num_images"] for row in report["results"]} == {evaluate.num_prompts + 8}
    # Trainings that were found done are told with the time that they took then.
    stages = {stage["name"]: stage for stage in report["stages"]}
    assert {name for name, stage in stages.items() if stage["skipped"]} == {"guidance", "progressive"}
    assert stages["progressive"]["seconds"] >= again["progressive"].facts["training_seconds"] > 0

    registry = Registry(workplace.tracker)
    first = artifacts["register"].facts["models"]["tiny-workflow"]["version"]
    second = again["register"].facts["models"]["tiny-workflow"]["version"]
    scales = [
        read_student_info(registry.download_model(f"models:/tiny-workflow/{version}")).guidance_scale  # type: ignore[union-attr]
        for version in (first, second)
    ]
    assert scales == [evaluate.guidance_scale, 2.0]


def test_registered_students_are_evaluated_on_their_own(
    artifacts: dict[Any, Artifact], recipe: Recipe, workplace: Workplace, tmp_path: Path
) -> None:
    storage, tracker = workplace.storage, workplace.tracker
    students = ["models:/tiny-workflow@champion", artifacts["progressive"].facts["students"]["1"]["uri"]]
    files = evaluate_models(recipe, storage, tracker, students=students, out=tmp_path)
    rows = {(row["method"], row["num_inference_steps"]): row for row in json.loads(files.json.read_text())["results"]}
    first = json.loads(storage.read_bytes(artifacts["evaluate"].facts["report"]))["results"]
    for row in first:
        again = rows[row["method"], row["num_inference_steps"]]
        for figure in ("kid_lite0_to_real", "alignment", "paired_mse"):
            assert again[figure] == pytest.approx(row[figure], rel=1e-3, abs=1e-4)
    with pytest.raises(ModelError, match="is a second student for 2 steps"):
        evaluate_models(recipe, storage, tracker, students=[students[0]] * 2, out=tmp_path)
    stage_one = artifacts["guidance"].facts["training"]["export_uri"]
    with pytest.raises(ModelError, match="does not say how many steps it was made for"):
        evaluate_models(recipe, storage, tracker, students=[stage_one], out=tmp_path)
    with pytest.raises(ModelError, match="no student to evaluate"):
        evaluate_models(recipe, storage, tracker, students=[], out=tmp_path)


def test_the_registered_student_answers_over_http(
    artifacts: dict[Any, Artifact], workplace: Workplace, recipe: Recipe, storage: Storage
) -> None:
    from fewstep.serve.server import run_server
    from fewstep.serve.settings import ServeSettings

    settings = ServeSettings(models=("models:/tiny-workflow@champion",), port=0, num_cpus=0.1, num_threads=1)
    server = run_server(settings, storage=storage, tracking=workplace.tracker.settings, name="tiny-workflow")
    try:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
        answer = client.images.generate(prompt="a red apple", n=2, extra_body={"seed": 3})
        pictures = [Image.open(io.BytesIO(base64.b64decode(data.b64_json))) for data in answer.data]
        assert [picture.size for picture in pictures] == [(16, 16), (16, 16)]
        with pytest.raises(BadRequestError, match="num_inference_steps"):
            client.images.generate(prompt="a red apple", extra_body={"num_inference_steps": 3})
    finally:
        server.stop()


def test_shards_of_ones_own_are_only_read(teacher: Path, workplace: Workplace, tmp_path: Path) -> None:
    storage = workplace.storage
    mine = join(storage.root, "my-held-out-pictures")
    for name in ("index.json", "00000.tar", "00007.tar", "notes.txt"):
        storage.write_bytes(join(mine, name), name.encode())
    content = tiny_recipe(teacher, name="tiny-own")
    recipe = parse_recipe({**content, "data": {"evaluate": mine}, "seed": 5})
    facts = run_stage("prepare", recipe, workplace, out=tmp_path).facts
    assert set(facts) == {"train", "alignment"}
    assert {info.uri.rsplit("/", 1)[-1]: storage.read_bytes(info.uri) for info in storage.list(mine)} == {
        name: name.encode() for name in ("index.json", "00000.tar", "00007.tar", "notes.txt")
    }


def test_time_of_a_stage_that_failed_is_counted_in(
    teacher: Path, workplace: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = parse_recipe({**tiny_recipe(teacher, name="tiny-usage"), "seed": 77})
    uri = stage_uri(recipe, workplace.storage, "prepare")
    calls: list[int] = []

    def stage(context: StageContext) -> dict[str, Any]:
        calls.append(1)
        time.sleep(2)
        if len(calls) == 1:
            raise RuntimeError("killed")
        return {"done": True}

    monkeypatch.setattr(memory, "_SAVE_EVERY_S", 0.5)
    monkeypatch.setattr(memory, "_EVERY_S", 0.1)
    monkeypatch.setitem(STAGES, "prepare", stage)
    with pytest.raises(RuntimeError, match="killed"):
        run_stage("prepare", recipe, workplace, out=tmp_path)
    before = workplace.storage.read_json(join(uri, "usage.json"))
    assert before["seconds"] > 0.5
    artifact = run_stage("prepare", recipe, workplace, out=tmp_path)
    assert artifact.seconds >= before["seconds"] + 2
    assert not workplace.storage.exists(join(uri, "usage.json"))


def test_a_stage_before_its_turn_names_the_missing_one(teacher: Path, workplace: Workplace, tmp_path: Path) -> None:
    from fewstep.errors import FewstepError

    recipe = parse_recipe({**tiny_recipe(teacher, name="tiny-early"), "seed": 99})
    with pytest.raises(FewstepError, match="stage prepare of recipe tiny-early has not finished"):
        run_stage("encode", recipe, workplace, out=tmp_path)
