"""The stages with models that are told a class, in latents: a U-Net from nothing and a DiT of the user's own, through
every ladder to the report. Trainings run in this process; what Ray does beside them is the business of
tests/integration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTPipeline
from torch import Tensor

from fewstep.data.counts import SampleCounts
from fewstep.data.shards import read_index
from fewstep.data.source import iterate_samples
from fewstep.diffusion import RowRandom, ddim_encode
from fewstep.diffusion.prediction import from_sample
from fewstep.errors import DataError, RecipeError
from fewstep.models import (
    ClassModel,
    ClassParts,
    initial_noise,
    load_model,
    read_student_info,
    sample_student,
)
from fewstep.recipe import Recipe, parse_recipe
from fewstep.stage_settings import ConvertStage
from fewstep.stages.batches import SampleFormat, picture_decoder
from fewstep.stages.context import Artifact, stage_uri
from fewstep.stages.convert import _export as _export_converted
from fewstep.stages.convert import _objective as _convert
from fewstep.stages.evaluate_classes import _dpm_solver
from fewstep.stages.fingerprints import autoencoder_fingerprint, fingerprint, folder_digest
from fewstep.stages.teacher_source import TeacherSource
from fewstep.storage import Storage, join
from fewstep.tracking.fetch import fetch_model
from fewstep.tracking.settings import TrackingSettings
from fewstep.workflow import run_stage
from fewstep.workplace import Workplace
from tiny import tiny_teacher
from tiny_classes import student_info, tiny_class_model, tiny_dit

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("in_process")]

TRAIN = {"updates": 2, "global_batch_size": 8, "learning_rate": 1e-3}
KINDS = ("deterministic", "stochastic", "encoder", "naive", "single_w")

Found = dict[str, Artifact]


def _content(**changes: Any) -> dict[str, Any]:
    return {
        "name": "tiny-classes",
        "stages": ["prepare", "teacher", "encode", "guidance", "progressive", "evaluate"],
        "prepare": {
            "classes": True,
            "categories": ["food-and-drink", "animals-and-nature"],
            "resolution": 16,
            "num_train": 40,
            "num_evaluate": 40,
            "num_alignment": 1,
            "samples_per_shard": 20,
        },
        "train_class_teacher": {
            "network": {
                "num_classes": 2,
                "resolution": 16,
                "block_out_channels": [8, 16],
                "attention_from_level": 1,
                "attention_head_dim": 8,
                "norm_num_groups": 4,
            },
            "autoencoder": {"resolution": 16, "block_out_channels": [8, 8, 16], "norm_num_groups": 4},
            "autoencoder_train": TRAIN,
            "train": TRAIN,
        },
        "stream": {"num_streams": 2},
        "cluster": {"use_gpu": False},
        "guidance": {"embedding_dim": 16, "num_validation": 8, "train": TRAIN},
        "progressive": {"kinds": list(KINDS), "single_w": [1.0], "ladder": [2], "train": TRAIN},
        "evaluate": {"guidance_scale": 2.0, "reference_steps": 2},
        "evaluate_classes": {
            "weights": [1.0],
            "steps": [2],
            "reference_steps": 4,
            "num_pictures": 40,
            "classifier": {"num_updates": 4, "batch_size": 8},
        },
        **changes,
    }


def _recipe_of(family: str, folder: Path) -> Recipe:
    if family == "class_latent":
        return parse_recipe(_content())
    tiny_dit(num_classes=10).save(folder)
    content = _content(
        stages=["prepare", "encode", "guidance", "progressive", "evaluate"],
        teacher=str(folder),
        prepare_classes={"source": "digits", "num_train": 40, "num_evaluate": 40, "samples_per_shard": 20},
    )
    # From an eps teacher to v students, which alone can encode.
    content["guidance"]["prediction_type"] = "v_prediction"
    del content["prepare"], content["train_class_teacher"]
    return parse_recipe(content)


@pytest.fixture(scope="module", params=["class_latent", "dit"])
def found(
    request: pytest.FixtureRequest, workplace: Workplace, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Recipe, Found]:
    """The family, and what each stage of its recipe left."""
    out = tmp_path_factory.mktemp(request.param)
    recipe = _recipe_of(request.param, out / "teacher")
    artifacts = {stage: run_stage(stage, recipe, workplace, out=out / "report") for stage in recipe.stages}
    return request.param, recipe, artifacts


def _load(uri: str, workplace: Workplace) -> ClassModel:
    parts = load_model(fetch_model(uri, storage=workplace.storage))
    assert isinstance(parts, ClassModel)
    return parts


def test_the_latents_are_stored_with_their_label(found: tuple[str, Recipe, Found], workplace: Workplace) -> None:
    family, _, artifacts = found
    facts, storage = artifacts["encode"].facts, workplace.storage
    assert facts["format"] == {"kind": "latents", "options": {"condition_names": ["label"]}}
    teacher = _load(facts["teacher"], workplace)
    assert teacher.family == family
    counts = SampleCounts(max_bad_share=0.0)
    read = [
        list(iterate_samples(read_index(uri, storage=storage).shards, storage=storage, decode=decode, counts=counts))
        for uri, decode in (
            (facts["train"]["uri"], SampleFormat(**facts["format"]).decoder()),
            (artifacts["prepare"].facts["train"]["uri"], picture_decoder(teacher)),
        )
    ]
    labels = [[int(sample["label"]) for sample in samples] for samples in read]
    assert labels[0] == labels[1]
    assert len(set(labels[0])) > 1
    mean, _ = teacher.encode_pictures(torch.stack([sample["pixels"] for sample in read[1]]))
    stored = torch.stack([sample["latent_mean"].float() for sample in read[0]])
    torch.testing.assert_close(stored, mean, rtol=2e-3, atol=2e-3)  # half precision
    assert stored.shape[1:] == teacher.sample_shape == (4, 4, 4)


def test_every_student_samples_from_its_folder(found: tuple[str, Recipe, Found], workplace: Workplace) -> None:
    family, recipe, artifacts = found
    students = artifacts["progressive"].facts["students"]
    assert set(students) == {"2", "stochastic-2", "encoder-2", "naive-2", "single_w-1-2"}
    teacher, before = _load(artifacts["encode"].facts["teacher"], workplace), {}
    for label, facts in students.items():
        folder = fetch_model(facts["uri"], storage=workplace.storage)
        parts, info = _load(facts["uri"], workplace), read_student_info(folder)
        assert info is not None
        assert parts.family == family
        assert parts.class_names == teacher.class_names
        dim = parts.denoiser().embedding_dim
        assert dim == (None if facts["kind"] in ("naive", "single_w") else 16), label
        noise, condition = initial_noise([1, 2], parts.sample_shape), {"label": torch.tensor([0, 1])}
        if facts["kind"] == "encoder":
            z = ddim_encode(
                parts.denoiser().conditional(condition, 1.0),
                noise,
                schedule=parts.schedule,
                prediction_type=parts.prediction_type,
                num_inference_steps=facts["num_inference_steps"],
            )
        else:
            z = sample_student(parts.denoiser(), info, noise, condition, w=1.0)
        assert torch.isfinite(z).all()
        assert parts.decode(z).shape == (2, teacher.picture_channels, teacher.resolution, teacher.resolution)
        before[label] = parts.network.state_dict()
        assert all(torch.equal(value, parts.vae.state_dict()[name]) for name, value in teacher.vae.state_dict().items())
    first, second = before["2"], before["stochastic-2"]
    assert any(not torch.equal(first[name], second[name]) for name in first)
    if family == "dit":
        types = {label: _load(facts["uri"], workplace).prediction_type for label, facts in students.items()}
        assert types["2"] == types["encoder-2"] == "v_prediction"
        assert types["naive-2"] == types["single_w-1-2"] == "epsilon"
    assert recipe.progressive is not None


def test_the_report_judges_decoded_pictures(found: tuple[str, Recipe, Found], workplace: Workplace) -> None:
    family, _, artifacts = found
    report = json.loads(workplace.storage.read_bytes(artifacts["evaluate"].facts["report"]))
    rows = {(row["method"], row["num_inference_steps"]) for row in report["results"]}
    methods = ("student", "student_stochastic", "student_single_w", "ddim", "dpmpp")
    assert rows == {("teacher", 4), *((method, 2) for method in methods)}
    facts = report["classifier"]
    expected = (3, 16, 2) if family == "class_latent" else (3, 8, 10)
    assert (facts["channels"], facts["resolution"], facts["num_classes"]) == expected
    assert all(row["seconds_per_picture"]["value"] > 0 for row in report["results"])


@pytest.mark.parametrize(
    "teacher", [tiny_class_model(latent=True), tiny_dit(), tiny_dit(prediction_type="v_prediction")]
)
def test_dpm_solver_ends_where_the_exact_flow_does(teacher: ClassModel) -> None:
    schedule, deviation = teacher.schedule, 0.5

    def network(z: Tensor, time: Tensor) -> Tensor:
        """What a network for data of N(0, deviation²) outputs."""
        alpha, sigma = schedule.alpha_sigma(time)
        x = alpha * deviation**2 / (alpha**2 * deviation**2 + sigma**2) * z
        eps = (z - alpha * x) / sigma
        return eps if teacher.prediction_type == "epsilon" else alpha * eps - sigma * x

    noise = initial_noise([1, 2], teacher.sample_shape)
    exact = noise * deviation / (schedule.last_alpha**2 * deviation**2 + 1 - schedule.last_alpha**2) ** 0.5
    torch.testing.assert_close(_dpm_solver(teacher, network, noise, 50), exact, rtol=0, atol=0.01)


def test_dpm_solver_keeps_pixels_in_their_range() -> None:
    teacher = tiny_class_model()

    def network(z: Tensor, time: Tensor) -> Tensor:
        """What says that every pixel is 3."""
        alpha, sigma = teacher.schedule.alpha_sigma(time, ndim=z.ndim)
        return from_sample(torch.full_like(z, 3.0), z, alpha, sigma, teacher.prediction_type)

    drawn = _dpm_solver(teacher, network, initial_noise([1, 2], teacher.sample_shape), 4)
    torch.testing.assert_close(drawn, torch.ones_like(drawn), rtol=0, atol=1e-3)


def test_the_teacher_from_nothing_has_a_vae_of_its_own(found: tuple[str, Recipe, Found], workplace: Workplace) -> None:
    family, recipe, artifacts = found
    if family != "class_latent":
        return
    facts = artifacts["teacher"].facts
    assert facts["autoencoder"]["updates"] == facts["network"]["updates"] == 2
    begin = _load(join(artifacts["teacher"].uri, "begin"), workplace)
    trained = _load(artifacts["teacher"].models()["teacher"], workplace)
    assert isinstance(trained, ClassParts)
    assert trained.class_names == ("animals-and-nature", "food-and-drink")
    assert trained.scheduler_config["clip_sample"] is False
    assert trained.vae is not None
    assert begin.vae is not None
    assert begin.vae.config["scaling_factor"] == trained.vae.config["scaling_factor"] != 1.0
    mean = torch.cat(
        [
            sample["latent_mean"].float().flatten()
            for sample in iterate_samples(
                read_index(artifacts["encode"].facts["train"]["uri"], storage=workplace.storage).shards,
                storage=workplace.storage,
                decode=SampleFormat(**artifacts["encode"].facts["format"]).decoder(),
                counts=SampleCounts(max_bad_share=0.0),
            )
        ]
    )
    assert float(mean.std()) == pytest.approx(1.0, rel=0.01)
    before, after = begin.network.state_dict(), trained.network.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    # Other settings of the U-Net leave the VAE as it is; another channel count does not.
    assert recipe.train_class_teacher is not None
    other, grey = (
        recipe.model_copy(update={"train_class_teacher": recipe.train_class_teacher.model_copy(update=change)})
        for change in (
            {"condition_dropout": 0.2},
            {"network": recipe.train_class_teacher.network.model_copy(update={"channels": 1})},
        )
    )
    assert autoencoder_fingerprint(other) == autoencoder_fingerprint(recipe) != autoencoder_fingerprint(grey)
    assert fingerprint(other, "teacher") != fingerprint(recipe, "teacher")


def test_a_dit_that_is_converted_to_v_stays_diffusers_own(storage: Storage, tmp_path: Path) -> None:
    tiny_dit().save(tmp_path / "teacher")
    source = TeacherSource(str(tmp_path / "teacher"), storage, TrackingSettings())
    settings = ConvertStage.model_validate({"train": TRAIN})
    objective = _convert(settings, source, torch.device("cpu"))
    batch = {"latent_mean": torch.randn(4, 4, 4, 4), "latent_std": torch.ones(4, 4, 4, 4), "label": torch.arange(4) % 3}
    loss, _ = objective.loss(objective.network, batch, RowRandom(seed=0, step=0, rows=range(4)))
    loss.backward()
    torch.optim.SGD(objective.network.parameters(), lr=0.1).step()
    _export_converted(settings, source, objective.network, str(tmp_path / "converted"))
    converted = load_model(tmp_path / "converted")
    assert converted.prediction_type == "v_prediction"
    before, after = (parts.network.state_dict() for parts in (source.load(), converted))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    pipeline = DiTPipeline.from_pretrained(tmp_path / "converted")
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(3)
    theirs = pipeline([1], guidance_scale=1.0, num_inference_steps=4, generator=noise, output_type="pt").images
    z = sample_student(
        converted.denoiser(),
        student_info(4, w=0.0),
        initial_noise([3], (4, 4, 4)),
        {"label": torch.tensor([1])},
        w=0.0,
    )
    assert float((converted.decode(z) / 255 - theirs).abs().max()) < 0.003


def test_classes_that_do_not_fit_the_pictures_are_told_before_any_training(
    workplace: Workplace, tmp_path: Path
) -> None:
    content = _content(name="tiny-misfit")
    content["train_class_teacher"]["network"]["num_classes"] = 5
    with pytest.raises(RecipeError, match=r"num_classes=5, but the pictures of prepare have 2 classes: set it to 2"):
        run_stage("teacher", parse_recipe(content), workplace, out=tmp_path)
    content["prepare"]["classes"] = False
    with pytest.raises(DataError, match="has no classes under these settings: set `classes: true`"):
        run_stage("teacher", parse_recipe(content), workplace, out=tmp_path)
    assert not workplace.storage.exists(join(stage_uri(parse_recipe(content), workplace.storage, "teacher"), "begin"))


def test_a_class_teacher_around_the_vae_of_a_model(workplace: Workplace, tmp_path: Path) -> None:
    taken = tiny_teacher(seed=3)
    taken.save(tmp_path / "text")
    content = _content(name="tiny-vae", stages=["prepare", "teacher", "encode"])
    del content["train_class_teacher"]["autoencoder"], content["train_class_teacher"]["autoencoder_train"]
    content["train_class_teacher"]["vae"] = str(tmp_path / "text")
    for key in ("guidance", "progressive", "evaluate_classes"):
        del content[key]
    recipe = parse_recipe(content)
    for stage in recipe.stages[:2]:
        made = run_stage(stage, recipe, workplace, out=tmp_path)
    assert "autoencoder" not in made.facts
    trained = _load(made.models()["teacher"], workplace)
    assert isinstance(trained, ClassParts)
    assert trained.vae is not None
    assert trained.sample_shape == taken.latent_shape
    for name, weight in taken.vae.state_dict().items():
        assert torch.equal(trained.vae.state_dict()[name], weight)
    tiny_teacher(seed=4).save(tmp_path / "text")
    folder_digest.cache_clear()
    assert fingerprint(recipe, "teacher") != made.fingerprint, "another model under the same name"

    content["train_class_teacher"]["network"]["resolution"] = 32
    content["prepare"]["resolution"] = 32
    run_stage("prepare", parse_recipe(content), workplace, out=tmp_path)
    with pytest.raises(RecipeError, match=r"3 channels of 32 px, and the autoencoder of vae=.* is for 3 of 16: set"):
        run_stage("teacher", parse_recipe(content), workplace, out=tmp_path)
    content["train_class_teacher"]["autoencoder_train"] = TRAIN
    with pytest.raises(RecipeError, match="leave out autoencoder and autoencoder_train, or vae"):
        parse_recipe(content)


def test_sizes_that_do_not_fit_are_told_by_the_recipe() -> None:
    content = _content()
    content["train_class_teacher"]["autoencoder"]["resolution"] = 32
    with pytest.raises(RecipeError, match=r"autoencoder.resolution=32 is not network.resolution=16"):
        parse_recipe(content)
    del content["train_class_teacher"]["autoencoder"]
    with pytest.raises(RecipeError, match=r"needs both autoencoder .* and autoencoder_train"):
        parse_recipe(content)


def test_a_table_without_its_students_is_told_by_the_recipe() -> None:
    content = _content()
    content["progressive"] |= {"kinds": ["stochastic"], "single_w": []}
    with pytest.raises(RecipeError, match="the table of evaluate_classes begins with the deterministic students"):
        parse_recipe(content)
    content = _content()
    del content["evaluate_classes"]
    with pytest.raises(RecipeError, match="makes a teacher that is told a class: add the key evaluate_classes"):
        parse_recipe(content)


def test_a_teacher_that_takes_text_is_refused(workplace: Workplace, tmp_path: Path) -> None:
    tiny_teacher().save(tmp_path / "teacher")
    content = _content(
        name="tiny-text",
        stages=["prepare", "encode", "guidance", "progressive", "evaluate"],
        teacher=str(tmp_path / "teacher"),
    )
    del content["train_class_teacher"]
    recipe = parse_recipe(content)
    for stage in recipe.stages[:2]:
        run_stage(stage, recipe, workplace, out=tmp_path)
    with pytest.raises(RecipeError, match="the teacher is of the family text_latent: leave evaluate_classes out"):
        run_stage("evaluate", recipe, workplace, out=tmp_path)
