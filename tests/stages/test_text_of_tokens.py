"""Latents without text embeddings: trainings compute them, and come out as with those that are stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fewstep.data.shards import read_index
from fewstep.data.source import iterate_samples
from fewstep.errors import ModelError
from fewstep.recipe import Recipe, parse_recipe
from fewstep.stages.context import Artifact
from fewstep.stages.fingerprints import fingerprint
from fewstep.workflow import run_stage
from fewstep.workplace import Workplace
from tiny import tiny_recipe, tiny_sdxl, tiny_teacher_folder

pytestmark = pytest.mark.usefixtures("in_process")

STAGES = ["prepare", "encode", "guidance", "progressive"]


def recipe_of(teacher: Path | str, *, store_text: bool) -> Recipe:
    train = {"global_batch_size": 8, "learning_rate": 1e-3, "updates": 3, "log_every": 1, "precision": "float32"}
    return parse_recipe(
        tiny_recipe(
            Path(teacher),
            name="text-of-tokens",
            stages=STAGES,
            prepare={"resolution": 16, "num_train": 16, "num_evaluate": 8, "num_alignment": 8, "samples_per_shard": 4},
            stream={"num_streams": 2},
            encode={"store_text": store_text},
            guidance={"embedding_dim": 16, "num_validation": 8, "train": train},
            progressive={"ladder": [2], "train": train},
            evaluate={"guidance_scale": 3.0},
        )
    )


def run_all(recipe: Recipe, workplace: Workplace, out: Path) -> dict[str, Artifact]:
    return {stage: run_stage(stage, recipe, workplace, out=out) for stage in recipe.stages}


@pytest.mark.parametrize(
    "make",
    [
        tiny_teacher_folder,
        pytest.param(lambda folder: tiny_sdxl().save(folder) or folder, marks=pytest.mark.long, id="sdxl"),
    ],
)
def test_trainings_are_those_with_stored_embeddings(make: Any, workplace: Workplace, tmp_path: Path) -> None:
    teacher = make(tmp_path / "teacher")
    stored = run_all(recipe_of(teacher, store_text=True), workplace, tmp_path)
    without = run_all(recipe_of(teacher, store_text=False), workplace, tmp_path)
    # The held-out ones have theirs in any case, for what is measured on them.
    for artifacts, split, has_text in ((stored, "train", True), (without, "train", False), (without, "evaluate", True)):
        index = read_index(artifacts["encode"].facts[split]["uri"], storage=workplace.storage)
        members = next(iterate_samples(index.shards, storage=workplace.storage, decode=dict))
        assert ("text.npy" in members) is has_text
        assert "pooled.npy" not in members or has_text
    for name in ("relative_error", "training"):
        first, second = (artifacts["guidance"].facts[name] for artifacts in (stored, without))
        if name == "training":
            first, second = first["figures"]["loss"], second["figures"]["loss"]
        # Stored ones are rounded to half precision.
        assert second == pytest.approx(first, rel=1e-3)
        assert second != first
    rungs = [artifacts["progressive"].facts["students"] for artifacts in (stored, without)]
    losses = [next(iter(each.values()))["training"]["figures"]["loss"] for each in rungs]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


def test_what_is_stored_names_the_latents_and_who_encodes_does_not() -> None:
    with_default = recipe_of("asset:emoji-teacher", store_text=True)
    other = recipe_of("asset:emoji-teacher", store_text=False)
    assert fingerprint(with_default, "encode") != fingerprint(other, "encode")
    many = with_default.model_copy(update={"encode": with_default.encode.model_copy(update={"encoders": 7})})
    assert fingerprint(with_default, "encode") == fingerprint(many, "encode")


def test_a_teacher_without_text_is_told(workplace: Workplace, tmp_path: Path) -> None:
    from tiny_classes import tiny_class_model

    tiny_class_model(latent=True).save(tmp_path / "classes")
    recipe = recipe_of(tmp_path / "classes", store_text=False)
    run_stage("prepare", recipe, workplace, out=tmp_path)
    with pytest.raises(ModelError, match=r"has no text encoder: leave encode\.store_text"):
        run_stage("encode", recipe, workplace, out=tmp_path)
