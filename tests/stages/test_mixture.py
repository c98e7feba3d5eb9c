"""The stages on several sources: each has its latents, trainings see them by their weights. Trainings run in this
process; what Ray does beside them is the business of tests/integration."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fewstep.bench.workload import recipe_train_workload
from fewstep.data.mixture import Mixture
from fewstep.data.samples import CaptionSource, FieldFilter
from fewstep.data.shards import write_shards
from fewstep.errors import RecipeError
from fewstep.models import load_model
from fewstep.recipe import Recipe, parse_recipe
from fewstep.stages.batches import sample_batches
from fewstep.stages.context import Artifact, StageContext, find_artifact
from fewstep.stages.encode_shards import EncodeTask, ShardEncoder
from fewstep.stages.evaluate_classes import _pictures
from fewstep.stages.fingerprints import autoencoder_fingerprint, data_digest, fingerprint
from fewstep.storage import Storage, join
from fewstep.tracking.fetch import fetch_model
from fewstep.workflow import run_stage
from fewstep.workplace import Workplace
from tiny import picture_samples, tiny_teacher_folder

pytestmark = pytest.mark.usefixtures("in_process")

TRAIN = {"updates": 2, "global_batch_size": 8, "learning_rate": 1e-3}
TEACHER = {
    "autoencoder": {"resolution": 16, "block_out_channels": [8, 16, 16], "norm_num_groups": 4},
    "autoencoder_train": TRAIN,
    "train": TRAIN,
}


@pytest.fixture(scope="module")
def shards(storage: Storage) -> dict[str, str]:
    """The URI of each source; one sample of "small" has no caption, and every sample has a class."""
    uris = {}
    for number, (name, count) in enumerate({"big": 24, "small": 8, "late": 8, "held-out": 8}.items()):
        samples = [
            {**each, "txt": f"{name} {n}".encode(), "cls": f"{n % 2}".encode(), "png": _picture(60 * number, 30 * n)}
            for n, each in enumerate(picture_samples(count))
        ]
        if name == "small":
            del samples[5]["txt"]
        uris[name] = join(storage.root, "mixtures", name)
        write_shards(samples, uris[name], samples_per_shard=count // 4, storage=storage)
    return uris


def _picture(red: int, green: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (red % 256, green % 256, 90)).save(file, format="PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def recipe_of(shards: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Recipe]:
    teacher = tiny_teacher_folder(tmp_path_factory.mktemp("teacher"))

    def make(train: Any, **changes: Any) -> Recipe:
        named = [{"uri": shards[name], "weight": weight} for name, weight in train.items()]
        content = {
            "name": "tiny-mixture",
            "stages": ["encode", "guidance"],
            "teacher": str(teacher),
            "data": {"train": named, "evaluate": shards["held-out"]},
            "stream": {"num_streams": 4, "max_bad_share": 0.2},
            "cluster": {"use_gpu": False},
            "encode": {"batch_size": 4},
            "guidance": {"embedding_dim": 16, "num_validation": 8, "train": TRAIN},
            "evaluate": {"guidance_scale": 2.0},
            **changes,
        }
        return parse_recipe({key: value for key, value in content.items() if value is not None})

    return make


Encoded = Callable[[Recipe], tuple[Artifact, list[str]]]


@pytest.fixture
def encode(workplace: Workplace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Encoded:
    """Return a function that runs encode, and gives what it left and the sources whose shards it encoded."""
    real, seen = ShardEncoder.encode, list[str]()

    def encode_shard(self: ShardEncoder, task: EncodeTask) -> dict[str, Any]:
        seen.append(task.shard.uri.split("/")[-2])
        return real(self, task)

    monkeypatch.setattr(ShardEncoder, "encode", encode_shard)

    def run_encode(recipe: Recipe) -> tuple[Artifact, list[str]]:
        seen.clear()
        return run_stage("encode", recipe, workplace, out=tmp_path), sorted(set(seen))

    return run_encode


def test_every_source_has_its_latents_and_another_one_leaves_them(
    recipe_of: Callable[..., Recipe], encode: Encoded, workplace: Workplace
) -> None:
    first, seen = encode(recipe_of({"big": 1}))
    assert seen == ["big", "held-out"]
    assert "sources" not in first.facts["train"]
    two, seen = encode(recipe_of({"big": 3, "small": 1}))
    assert seen == ["small"], "the big source was encoded when it was alone"
    facts = two.facts["train"]
    assert [each["name"] for each in facts["sources"]] == ["big", "small"]
    assert facts["sources"][0] == {"name": "big", **first.facts["train"]}
    assert (facts["num_samples"], facts["num_shards"], facts["filtered"]) == (31, 8, {})
    assert facts["skipped"] == {"small: no caption": 1}
    assert facts["digest"] not in [each["digest"] for each in facts["sources"]]
    three, seen = encode(recipe_of({"big": 3, "small": 1, "late": 0.5}))
    assert seen == ["late"]
    assert three.facts["train"]["sources"][:2] == facts["sources"]
    assert two.facts["evaluate"] == three.facts["evaluate"]
    # The weights do not matter to the latents.
    other = recipe_of({"big": 1, "small": 1})
    assert encode(other) == (two, [])


def test_what_a_training_depends_on(recipe_of: Callable[..., Recipe], shards: dict[str, str]) -> None:
    def prints(recipe: Recipe, *stages: Any) -> list[str]:
        return [fingerprint(recipe, stage) for stage in stages]

    changes = {"stages": ["teacher", "encode", "guidance"], "teacher": None, "train_teacher": TEACHER}
    one, two = recipe_of({"big": 3, "small": 1}, **changes), recipe_of({"big": 2, "small": 1}, **changes)
    assert one.digest() != two.digest()
    for a, b in zip(prints(one, "teacher", "guidance"), prints(two, "teacher", "guidance"), strict=True):
        assert a != b
    assert autoencoder_fingerprint(one) != autoencoder_fingerprint(two)
    scaled = recipe_of({"big": 6, "small": 2}, **changes)
    assert prints(scaled, "teacher", "encode", "guidance") == prints(one, "teacher", "encode", "guidance")
    alone = recipe_of({"big": 3})
    by_uri = alone.model_copy(update={"data": alone.data.model_copy(update={"train": shards["big"]})})
    assert alone == by_uri
    assert alone.digest() == by_uri.digest()


def test_a_training_draws_from_each_source_by_its_weight(
    recipe_of: Callable[..., Recipe], workplace: Workplace, tmp_path: Path
) -> None:
    recipe = recipe_of({"big": 3, "small": 1})
    artifacts = {stage: run_stage(stage, recipe, workplace, out=tmp_path) for stage in recipe.stages}
    figures = artifacts["guidance"].facts["training"]["figures"]
    assert {name: value for name, value in figures.items() if name.startswith("drawn/")} == {
        "drawn/big": 12.0,
        "drawn/small": 4.0,
    }
    assert artifacts["guidance"].facts["relative_error"] > 0
    workload = recipe_train_workload(recipe, "guidance", workplace.storage)
    facts = artifacts["encode"].facts["train"]["sources"]
    assert workload.data == f"shards in {facts[0]['uri']} and {facts[1]['uri']}"
    assert workload.batches is not None
    with workload.batches(16)(rank=0, world_size=1) as batches:
        assert next(iter(batches)).drawn == {"big": 12, "small": 4}


def test_a_teacher_from_nothing(recipe_of: Callable[..., Recipe], workplace: Workplace, tmp_path: Path) -> None:
    """Its tokenizer learns from the captions of all sources, and its networks from the latents of each."""
    sizes = {"block_out_channels": [16, 32], "num_attention_heads": 2, "norm_num_groups": 4}
    texts = {"text_width": 16, "text_layers": 1, "text_heads": 2, "vocabulary_size": 600, "max_prompt_tokens": 16}
    teacher = {**TEACHER, "network": {**sizes, **texts}}
    recipe = recipe_of({"big": 3, "late": 1}, stages=["teacher"], teacher=None, train_teacher=teacher)
    facts = run_stage("teacher", recipe, workplace, out=tmp_path).facts
    for training in ("autoencoder", "network"):
        figures = facts[training]["figures"]
        assert (figures["drawn/big"], figures["drawn/late"]) == (12, 4)


def test_a_teacher_that_is_told_a_class(
    recipe_of: Callable[..., Recipe], workplace: Workplace, shards: dict[str, str], tmp_path: Path
) -> None:
    network = {"num_classes": 2, "resolution": 16, "block_out_channels": [8, 16], "attention_from_level": 1}
    network |= {"attention_head_dim": 8, "norm_num_groups": 4}
    settings = {**TEACHER, "network": network}
    recipe = recipe_of({"big": 1, "late": 1}, stages=["teacher"], teacher=None, train_class_teacher=settings)
    artifact = run_stage("teacher", recipe, workplace, out=tmp_path)
    assert artifact.facts["network"]["figures"]["drawn/late"] == 8
    with workplace.tracker.run("look", key="look") as of_stage:
        context = StageContext(recipe, workplace.storage, workplace.tracker, of_stage, of_stage.id, tmp_path)
        assert context.shards("train") == Mixture(recipe.data.train)
        model: Any = load_model(fetch_model(join(artifact.uri, "export"), storage=workplace.storage))
        pixels, _ = _pictures(context, "train", model, 16)
    reds = Counter(round(float(red) / 60) for red in pixels[:, 0].float().mean(dim=(1, 2)))
    assert reds == {0: 8, 2: 8}, "the classifier of the evaluation sees the first pictures of each"


def test_a_model_in_pixels_has_its_pictures_as_they_are(
    recipe_of: Callable[..., Recipe], workplace: Workplace, shards: dict[str, str], tmp_path: Path
) -> None:
    network = {"num_classes": 2, "resolution": 16, "block_out_channels": [8, 16], "attention_from_level": 1}
    settings = {"network": {**network, "attention_head_dim": 8, "norm_num_groups": 4}, "train": TRAIN}
    recipe = recipe_of({"big": 3, "late": 1}, stages=["teacher", "encode"], teacher=None, train_class_teacher=settings)
    for stage in recipe.stages:
        run_stage(stage, recipe, workplace, out=tmp_path)
    found = find_artifact(recipe, workplace.storage, "encode")
    assert found is not None
    assert [each["uri"] for each in found.facts["train"]["sources"]] == [shards["big"], shards["late"]]
    with workplace.tracker.run("look", key="look too") as of_stage:
        context = StageContext(recipe, workplace.storage, workplace.tracker, of_stage, of_stage.id, tmp_path)
        batches = sample_batches(
            context.latents("train"), decode=context.sample_format().decoder(), storage=workplace.storage,
            stream=recipe.stream, global_batch_size=16, seed=0, rank=0, world_size=1,
        )  # fmt: skip
        with batches:
            assert next(iter(batches)).drawn == {"big": 12, "late": 4}


def test_the_data_have_one_digest_that_names_shards_filters_transform_and_weights(
    recipe_of: Callable[..., Recipe], workplace: Workplace, tmp_path: Path
) -> None:
    recipe = recipe_of({"big": 3, "late": 1}, stages=["encode", "guidance"])
    for stage in recipe.stages:
        run_stage(stage, recipe, workplace, out=tmp_path)
    found = find_artifact(recipe, workplace.storage, "encode")
    assert found is not None
    ours = found.facts["data_digest"]
    tracker = workplace.tracker
    for stage in (*recipe.stages, None):
        key = f"{recipe.name}/{recipe.digest() if stage is None else fingerprint(recipe, stage)}"
        run_id = tracker.find_run(key)
        assert run_id is not None
        assert tracker.client.get_run(run_id).data.tags["fewstep.data_digest"] == ours, stage or "the workflow"

    def digest(changed: Recipe, digests: tuple[str, ...] = ("a", "b"), resolution: int = 16) -> str:
        return data_digest(changed, shards_digests=digests, resolution=resolution)

    def with_data(**changes: Any) -> Recipe:
        return recipe.model_copy(update={"data": recipe.data.model_copy(update=changes)})

    def with_encode(**changes: Any) -> Recipe:
        return recipe.model_copy(update={"encode": recipe.encode.model_copy(update=changes)})

    same = [recipe, with_encode(batch_size=7), with_encode(store_text=False), recipe.model_copy(update={"seed": 5})]
    assert len({digest(each) for each in same}) == 1
    other = [
        recipe_of({"big": 2, "late": 1}), with_data(filters=(FieldFilter(field="width", min=5),)),
        with_data(captions=(CaptionSource(template="{blip}"),)), with_encode(crop="random"),
        with_encode(picture_sizes=True),
    ]  # fmt: skip
    found_digests = {digest(each) for each in other} | {digest(recipe, ("a", "c")), digest(recipe, resolution=32)}
    assert len(found_digests | {digest(recipe)}) == len(other) + 3


def test_a_gpu_that_is_not_there_is_told_before_anything_is_encoded(
    recipe_of: Callable[..., Recipe], workplace: Workplace, tmp_path: Path
) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    recipe = recipe_of({"late": 1}, stages=["encode"], cluster={"use_gpu": True}, seed=77)
    with pytest.raises(RecipeError, match=r"cluster\.use_gpu=true, and this machine has no GPU"):
        run_stage("encode", recipe, workplace, out=tmp_path)
