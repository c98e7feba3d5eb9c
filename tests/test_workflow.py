"""Fingerprints: a stage is done again when what it depends on changed, and only then."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from fewstep.recipe import Recipe, StageName, parse_recipe
from fewstep.stages import memory
from fewstep.stages.context import shards_uri
from fewstep.stages.fingerprints import (
    fingerprint,
    guidance_fingerprint,
    guided_pair_fingerprint,
    latents_fingerprint,
    rung_fingerprint,
    split_fingerprint,
)
from fewstep.stages.memory import Usage
from fewstep.storage import Storage

STAGES: tuple[StageName, ...] = ("prepare", "encode", "guidance", "progressive", "evaluate", "register")


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """A folder with what counts as a teacher's content."""
    folder = tmp_path / "teacher"
    (folder / "unet").mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    (folder / "unet" / "config.json").write_text("{}")
    (folder / "unet" / "model.safetensors").write_bytes(b"weights")
    return folder


def _recipe(teacher: Path, **changes: Any) -> Recipe:
    train = {"updates": 10, "global_batch_size": 8, "learning_rate": 1e-3}
    content: dict[str, Any] = {
        "name": "small",
        "stages": list(STAGES),
        "teacher": str(teacher),
        "prepare": {"resolution": 32},
        "guidance": {"w_max": 4.0, "train": dict(train)},
        "progressive": {"ladder": [8, 4, 2, 1], "train": dict(train)},
        "evaluate": {"steps": [4], "guidance_scale": 4.0},
        "register": {"num_inference_steps": 4},
    }
    for path, value in changes.items():
        *parents, key = path.split("__")
        place = content
        for parent in parents:
            place = place.setdefault(parent, {})
        place[key] = value
    return parse_recipe(content)


def _changed(before: Recipe, after: Recipe) -> set[str]:
    return {stage for stage in STAGES if fingerprint(before, stage) != fingerprint(after, stage)}


def _rungs(recipe: Recipe) -> dict[int, str]:
    """Return the fingerprints of the trainings: 0 is stage one, the others are the rungs."""
    assert recipe.progressive is not None
    prints = {0: guidance_fingerprint(recipe, teacher_digest="t", latents_digest="l")}
    for steps in recipe.progressive.ladder:
        prints[steps] = rung_fingerprint(recipe, "deterministic", steps, before=list(prints.values())[-1])
    return prints


def _retrained(before: Recipe, after: Recipe) -> set[int]:
    old, new = _rungs(before), _rungs(after)
    return {steps for steps in old if old[steps] != new.get(steps)}


def test_every_stage_has_its_own_fingerprint_and_keeps_it(teacher: Path) -> None:
    recipe = _recipe(teacher)
    prints = [fingerprint(recipe, stage) for stage in STAGES]
    assert len(set(prints)) == len(STAGES)
    assert prints == [fingerprint(_recipe(teacher), stage) for stage in STAGES]
    assert all(len(print_) == 64 for print_ in prints)


@pytest.mark.parametrize(
    "changes",
    [
        {"guidance__train__log_every": 3, "progressive__train__log_every": 3},
        {"guidance__train__checkpoint_every": 3, "progressive__train__num_checkpoints_to_keep": 5},
        {"cluster__num_workers": 2, "cluster__max_failures": 9},
        {"storage__bucket": "other", "tracking__experiment": "other"},
        {"name": "renamed"},
    ],
    ids=str,
)
def test_what_changes_no_result_changes_no_fingerprint(teacher: Path, changes: dict[str, Any]) -> None:
    before, after = _recipe(teacher), _recipe(teacher, **changes)
    assert _changed(before, after) == set()
    assert _retrained(before, after) == set()


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({"seed": 1}, "prepare"),
        ({"prepare__num_train": 100}, "prepare"),
        ({"data__evaluate": "s3://b/evaluate"}, "prepare"),
        ({"data__filters": [{"field": "width", "min": 9}]}, "encode"),
        ({"data__captions": [{"template": "{caption}"}]}, "encode"),
        ({"guidance__w_max": 5.0}, "guidance"),
        ({"guidance__num_validation": 9}, "guidance"),
        ({"evaluate__guidance_scale": 3.0}, "progressive"),
        ({"guidance__train__learning_rate": 1e-4}, "guidance"),
        ({"stream__shuffle_bytes": 7}, "guidance"),
        ({"progressive__loss_weight": "x"}, "progressive"),
        ({"progressive__updates": {1: 20}}, "progressive"),
        ({"evaluate__num_prompts": 100}, "evaluate"),
        ({"register__name": "other"}, "register"),
    ],
    ids=str,
)
def test_a_change_reaches_its_stage_and_those_after_it(teacher: Path, changes: dict[str, Any], first: str) -> None:
    expected = set(STAGES[STAGES.index(first) :])  # type: ignore[arg-type]
    assert _changed(_recipe(teacher), _recipe(teacher, **changes)) == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"prepare__num_evaluate": 5000, "prepare__num_alignment": 5000},
        {"data__evaluate": "s3://b/evaluate", "data__alignment": "s3://b/alignment"},
        {"evaluate__guidance_scale": 3.0, "evaluate__num_prompts": 100},
        {"guidance__num_validation": 9},
        {"register__name": "other"},
    ],
    ids=str,
)
def test_evaluating_otherwise_trains_nothing_anew(teacher: Path, storage: Storage, changes: dict[str, Any]) -> None:
    before, after = _recipe(teacher), _recipe(teacher, **changes)
    assert _retrained(before, after) == set()
    assert shards_uri(before, storage, "train") == shards_uri(after, storage, "train")


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"guidance__w_max": 5.0},
        {"guidance__train__updates": 11},
        {"stream__shuffle_bytes": 7},
        {"guidance__loss_weight": "snr"},
    ],
    ids=str,
)
def test_what_stage_one_depends_on_trains_everything_anew(teacher: Path, changes: dict[str, Any]) -> None:
    assert _retrained(_recipe(teacher), _recipe(teacher, **changes)) == {0, 8, 4, 2, 1}


@pytest.mark.parametrize("w", [None, 1.0], ids=["naive", "single_w"])
def test_ladders_without_stage_one_are_named_by_all_that_they_begin_with(teacher: Path, w: float | None) -> None:
    def first(model: str = "t", data: str = "l", **changes: Any) -> str:
        recipe = _recipe(teacher, **changes)
        before = guided_pair_fingerprint(recipe, w=w, teacher_digest=model, latents_digest=data)
        return rung_fingerprint(recipe, "naive" if w is None else "single_w", 8, w=w, before=before)

    changed = [first(seed=1), first(stream__shuffle_bytes=7), first(model="other"), first(data="other")]
    assert len({first(), *changed}) == 5
    # A student of one weight does not see the range of stage one; one of the guided pair is trained on it.
    assert (first(guidance__w_max=5.0) == first()) == (w is not None)
    assert first(guidance__loss_weight="snr") == first()


def test_what_trains_the_judging_classifier_makes_another_report(teacher: Path) -> None:
    def evaluated(**changes: Any) -> str:
        judged = {"weights": [1.0], "steps": [4], **changes}
        return fingerprint(_recipe(teacher, stages=list(STAGES[:-1]), evaluate_classes=judged), "evaluate")

    assert evaluated(classifier={"batch_size": 16}) != evaluated()
    assert evaluated(compare={"batch_size": 16}) == evaluated(), "pictures at once"


def test_picture_files_count_by_their_content_wherever_they_lie(teacher: Path, tmp_path: Path) -> None:
    def shards(folder: str) -> list[str]:
        pictures = {"source": "idx", "path": str(tmp_path / folder)}
        recipe = _recipe(teacher, prepare=None, prepare_classes=pictures)
        return [fingerprint(recipe, "prepare"), *(split_fingerprint(recipe, split) for split in ("train", "evaluate"))]

    names = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).write_bytes(name.encode())
    before = shards("here")
    assert shards("there") == before
    (tmp_path / "here" / names[2]).write_bytes(b"other pictures")
    after = shards("here")
    assert [old == new for old, new in zip(before, after, strict=True)] == [False, True, False], "t10k is held out"
    assert shards("nowhere") not in (before, after)


def test_masks_belong_to_the_latents_of_inpainting_models_alone(teacher: Path) -> None:
    plain, other = _recipe(teacher), _recipe(teacher, encode={"masks": {"max_boxes": 2}})
    names: dict[str, str] = {"shards_digest": "d", "encoders_digest": "t"}
    assert latents_fingerprint(plain, **names) == latents_fingerprint(other, **names)
    assert latents_fingerprint(plain, **names, masks=True) != latents_fingerprint(other, **names, masks=True)


def test_other_data_or_another_teacher_trains_everything_anew(teacher: Path, storage: Storage) -> None:
    recipe = _recipe(teacher)
    prints = {
        guidance_fingerprint(recipe, teacher_digest=model, latents_digest=data) for model in "ab" for data in "cd"
    }
    assert len(prints) == 4
    names = {latents_fingerprint(recipe, shards_digest=data, encoders_digest=model) for data in "cd" for model in "ab"}
    assert len(names) == 4
    more = _recipe(teacher, prepare__num_train=100)
    assert shards_uri(recipe, storage, "train") != shards_uri(more, storage, "train")


@pytest.mark.parametrize("rung", [8, 4, 2, 1])
def test_a_rungs_updates_change_that_rung_and_the_later_ones(teacher: Path, rung: int) -> None:
    before, after = _recipe(teacher), _recipe(teacher, progressive__updates={rung: 20})
    assert _retrained(before, after) == {n for n in (8, 4, 2, 1) if n <= rung}


def test_saying_a_rungs_updates_twice_is_no_change(teacher: Path) -> None:
    before, after = _recipe(teacher), _recipe(teacher, progressive__updates={4: 10})
    assert _retrained(before, after) == set()


def test_a_longer_ladder_keeps_no_rung_and_a_shorter_one_keeps_its_beginning(teacher: Path) -> None:
    before = _recipe(teacher)
    shorter = _recipe(teacher, progressive__ladder=[8, 4])
    longer = _recipe(teacher, progressive__ladder=[16, 8, 4, 2, 1])
    assert _retrained(before, shorter) == {2, 1}
    assert _retrained(before, longer) == {8, 4, 2, 1}


@pytest.mark.parametrize("file", ["unet/model.safetensors", "unet/config.json", "tokenizer/merges.txt"])
def test_a_teacher_is_its_content_not_its_name(teacher: Path, tmp_path: Path, file: str) -> None:
    same = Path(shutil.copytree(teacher, tmp_path / "same"))
    other = Path(shutil.copytree(teacher, tmp_path / "other"))
    (other / file).parent.mkdir(exist_ok=True)
    (other / file).write_bytes(b"changed")
    assert _changed(_recipe(teacher), _recipe(same)) == set()
    assert _changed(_recipe(teacher), _recipe(other)) == set(STAGES) - {"prepare"}


def test_a_teacher_elsewhere_is_named_by_its_uri(teacher: Path) -> None:
    one, two = _recipe(Path("a/b")), _recipe(Path("a/c"))
    assert _changed(one, two) == set(STAGES) - {"prepare"}


def test_a_trained_teacher_is_its_recipe(teacher: Path) -> None:
    def recipe(**changes: Any) -> Recipe:
        train = {"updates": 10, "global_batch_size": 8, "learning_rate": 1e-3}
        stages = ["prepare", "teacher", "encode"]
        settings = {"autoencoder_train": train, "train": {**train, **changes}}
        return parse_recipe({"name": "t", "stages": stages, "prepare": {}, "train_teacher": settings})

    assert set(recipe().stages) <= set(get_args(StageName))
    assert fingerprint(recipe(), "encode") != fingerprint(recipe(updates=11), "encode")
    assert fingerprint(recipe(), "encode") == fingerprint(recipe(log_every=7), "encode")
    assert fingerprint(recipe(), "prepare") == fingerprint(recipe(updates=11), "prepare")


def test_usage_goes_on_from_what_a_killed_process_used(monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[tuple[float, int]] = []
    with Usage() as first:
        time.sleep(0.05)
    assert 0.05 <= first.seconds < 5
    assert first.peak_memory_bytes > 2**20
    huge = 2**50
    monkeypatch.setattr(memory, "_SAVE_EVERY_S", 0.05)
    monkeypatch.setattr(memory, "_EVERY_S", 0.05)
    with Usage((100.0, huge), save=lambda usage: saved.append((usage.seconds, usage.peak_memory_bytes))) as second:
        time.sleep(1)
    assert 101 <= second.seconds < 110
    assert second.peak_memory_bytes == huge
    assert len(saved) >= 2
    assert all(100 < seconds <= second.seconds and peak == huge for seconds, peak in saved)


def test_memory_that_comes_later_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_EVERY_S", 0.05)

    def until(reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not reached():
            assert time.monotonic() < deadline
            time.sleep(0.05)

    with Usage() as usage:
        until(lambda: usage.peak_memory_bytes > 0)
        before = usage.peak_memory_bytes
        block = bytearray(os.urandom(2**20) * 200)
        until(lambda: usage.peak_memory_bytes - before > 150 * 2**20)
        del block
