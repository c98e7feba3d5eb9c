"""What the evaluate stage hands to the comparison: students of any family, and for inpainting the holes."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.data.masks import mask_of
from fewstep.data.shards import write_shards
from fewstep.errors import FewstepError, ModelError, SamplingError
from fewstep.evaluate.settings import EvaluateSettings
from fewstep.models import Parts, StudentInfo, save_student
from fewstep.recipe import parse_recipe
from fewstep.stages.context import DONE, StageContext, stage_uri
from fewstep.storage import Storage, join
from fewstep.tracking.settings import TrackingSettings
from fewstep.tracking.tracker import Tracker
from tiny import (
    picture_samples,
    tiny_inpainting,
    tiny_sdxl,
    tiny_student_folder,
    tiny_teacher,
    tiny_teacher_folder,
    w_student,
)

# The package has a function of that name.
evaluate_stage = importlib.import_module("fewstep.stages.evaluate")


class _NoScorer:
    """In place of the scorer of alignment, which would be trained first."""

    def __init__(self, image_features: Any) -> None:
        self.image_features = image_features

    def fit(self, images: torch.Tensor, captions: list[str]) -> _NoScorer:
        assert len(images) == len(captions)
        return self


@pytest.fixture
def handed(
    storage: Storage, bucket_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Any]]:
    """Return a function that gives what `compare` is called with for a teacher and a student of two steps."""
    write_shards(picture_samples(24), join(bucket_uri, "pictures"), samples_per_shard=12, storage=storage)
    monkeypatch.setattr(evaluate_stage, "compare", lambda **arguments: arguments)
    monkeypatch.setattr(evaluate_stage, "AlignmentScorer", _NoScorer)

    def hand(
        teacher: Parts,
        of: Parts,
        *,
        kind: Any = "deterministic",
        weights: tuple[float, float] = (0.0, 6.0),
        w: bool = True,
    ) -> dict[str, Any]:
        teacher.save(tmp_path / "teacher")
        info = StudentInfo("progressive", 2, *weights, 4.0, "tiny", "test", kind=kind)
        save_student(tmp_path / "student", of, w_student(of.network) if w else of.network, info)
        pictures = join(bucket_uri, "pictures")
        recipe = parse_recipe(
            {
                "name": "tiny",
                "stages": ["encode", "evaluate"],
                "teacher": str(tmp_path / "teacher"),
                "data": {"train": pictures, "evaluate": pictures, "alignment": pictures},
                "cluster": {"use_gpu": False},
                "evaluate": {"num_prompts": 20, "steps": [2], "num_threads": 1},
                "seed": 3,
            }
        )
        nothing: Any = None
        context = StageContext(recipe, storage, nothing, nothing, "", tmp_path)
        return evaluate_stage._compare(context, str(tmp_path / "teacher"), {2: tmp_path / "student"})

    return hand


def test_holes_are_those_of_the_latents(handed: Callable[..., dict[str, Any]]) -> None:
    teacher = tiny_inpainting()
    arguments = handed(teacher, teacher)
    settings = parse_recipe({"name": "x", "stages": ["encode"], "teacher": "x", "data": {"train": "x"}}).encode.masks
    keys = [sample["__key__"] for sample in picture_samples(24)]
    expected = torch.stack([mask_of(key, 16, settings=settings, seed=3) for key in keys])
    assert torch.equal(arguments["masks"], expected)
    assert arguments["students"][2].condition_names == ("text", "mask", "masked_latents")


@pytest.mark.parametrize("make", [tiny_sdxl, tiny_teacher])
def test_models_of_prompts_alone_get_none(handed: Callable[..., dict[str, Any]], make: Callable[[], Parts]) -> None:
    teacher = make()
    arguments = handed(teacher, teacher)
    assert arguments["masks"] is None
    assert arguments["students"][2].embedding_dim == 16
    assert len(arguments["prompts"]) == len(arguments["real_images"]) == 24


def test_a_student_of_a_single_w_is_judged_at_its_own(handed: Callable[..., dict[str, Any]]) -> None:
    teacher = tiny_teacher()
    scale = EvaluateSettings().guidance_scale
    arguments = handed(teacher, teacher, weights=(scale - 1, scale - 1), w=False)
    assert arguments["students"][2].embedding_dim is None
    with pytest.raises(SamplingError, match=r"made for the one weight w = 1: use 2"):
        handed(teacher, teacher, weights=(1.0, 1.0), w=False)
    with pytest.raises(ModelError, match="has no time_cond_proj_dim, so it takes no guidance weight, and is of no"):
        handed(teacher, teacher, w=False)


def test_students_of_a_converted_teacher_are_held_against_it(
    storage: Storage,
    bucket_uri: str,
    new_database: Callable[[], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student = tiny_student_folder(tmp_path / "student", num_inference_steps=2)
    train = {"updates": 1, "global_batch_size": 8, "learning_rate": 1e-3}
    content = {
        "name": "tiny",
        "stages": ["encode", "convert", "evaluate"],
        "teacher": str(tiny_teacher_folder(tmp_path / "teacher")),
        "data": {"train": bucket_uri, "evaluate": bucket_uri, "alignment": bucket_uri},
        "convert": {"train": train},
    }
    recipe = parse_recipe(content)
    judged: list[str] = []

    def compare(context: StageContext, teacher: str, students: Any) -> Any:
        judged.append(teacher)
        raise ModelError("far enough")

    monkeypatch.setattr(evaluate_stage, "_compare", compare)
    tracker = Tracker.open(TrackingSettings(uri=new_database(), experiment="t"), storage)
    with pytest.raises(FewstepError, match="stage convert of recipe tiny has not finished"):
        evaluate_stage.evaluate_models(recipe, storage, tracker, students=[str(student)], out=tmp_path)
    facts = {"teacher": "s3://converted", "teacher_digest": "d"}
    storage.write_json(join(stage_uri(recipe, storage, "convert"), DONE), {"fingerprint": "x", "facts": facts})
    with pytest.raises(ModelError, match="far enough"):
        evaluate_stage.evaluate_models(recipe, storage, tracker, students=[str(student)], out=tmp_path)
    assert judged == ["s3://converted"]


def test_students_of_others_and_of_other_kinds_are_refused(handed: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(ModelError, match="was not made from the recipe's teacher: its family"):
        handed(tiny_sdxl(), tiny_teacher())
    with pytest.raises(ModelError, match="was not made from the recipe's teacher"):
        handed(tiny_sdxl(), tiny_sdxl(seed=1))
    with pytest.raises(SamplingError, match="of the kind stochastic"):
        handed(tiny_sdxl(), tiny_sdxl(), kind="stochastic")
