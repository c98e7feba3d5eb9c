"""Fingerprints: a stage is done again when what it depends on changed, and only then."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, get_args

import pytest

from fewstep.recipe import Recipe, StageName, parse_recipe
from fewstep.stages.context import fingerprint, rung_fingerprint

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
    assert [rung_fingerprint(before, n) for n in (8, 4, 2, 1)] == [rung_fingerprint(after, n) for n in (8, 4, 2, 1)]


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({"seed": 1}, "prepare"),
        ({"prepare__num_train": 100}, "prepare"),
        ({"data__evaluate": "s3://b/evaluate"}, "encode"),
        ({"guidance__w_max": 5.0}, "guidance"),
        ({"guidance__train__learning_rate": 1e-4}, "guidance"),
        ({"stream__shuffle_shards": 7}, "guidance"),
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


@pytest.mark.parametrize("rung", [8, 4, 2, 1])
def test_a_rungs_updates_change_that_rung_and_the_later_ones(teacher: Path, rung: int) -> None:
    before, after = _recipe(teacher), _recipe(teacher, progressive__updates={rung: 20})
    changed = [n for n in (8, 4, 2, 1) if rung_fingerprint(before, n) != rung_fingerprint(after, n)]
    assert changed == [n for n in (8, 4, 2, 1) if n <= rung]


def test_saying_a_rungs_updates_twice_is_no_change(teacher: Path) -> None:
    before, after = _recipe(teacher), _recipe(teacher, progressive__updates={4: 10})
    assert rung_fingerprint(before, 4) == rung_fingerprint(after, 4)


def test_a_longer_ladder_keeps_no_rung_and_a_shorter_one_keeps_its_beginning(teacher: Path) -> None:
    before = _recipe(teacher)
    shorter = _recipe(teacher, progressive__ladder=[8, 4])
    longer = _recipe(teacher, progressive__ladder=[16, 8, 4, 2, 1])
    assert [rung_fingerprint(shorter, n) for n in (8, 4)] == [rung_fingerprint(before, n) for n in (8, 4)]
    assert rung_fingerprint(longer, 8) != rung_fingerprint(before, 8)


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
