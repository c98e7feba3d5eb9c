"""Every shipped recipe is planned without network or weights, and its head says what the plan says."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from fewstep.plan import Plan, plan_recipe, render, summary
from fewstep.plan.memory import MEMORY_ERROR, memory_of
from fewstep.plan.teacher import find_shape
from fewstep.plan.work import Training, work_of
from fewstep.recipe import load_recipe

FILES = sorted(Path("workflows/recipes").glob("*.yaml"))

#: Of the real models: their heads carry figures.
REAL = [file for file in FILES if "`fewstep plan" in file.read_text(encoding="utf-8")]


@cache
def plan_of(file: Path) -> Plan:
    return plan_recipe(load_recipe(file))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_recipe_is_planned_and_fits(file: Path) -> None:
    plan = plan_of(file)
    assert plan.fits, render(plan)
    assert plan.fullest is not None
    assert plan.fullest.memory is not None
    # With the room that the estimate may be wrong by.
    assert plan.fullest.memory.total < (1 - MEMORY_ERROR) * plan.gpu.memory_bytes
    computing = [stage for stage in load_recipe(file).stages if stage not in ("prepare", "register", "promote")]
    in_pixels = find_shape(load_recipe(file)).vae is None
    assert list(dict.fromkeys(step.stage for step in plan.steps)) == [
        stage for stage in computing if not (stage == "encode" and in_pixels)
    ]
    assert all(step.flops > 0 and step.read_bytes > 0 for step in plan.steps)
    assert "in short: " in render(plan)


def test_the_real_models_are_there() -> None:
    assert {file.stem for file in REAL} == {
        "sd15-laion-512",
        "sd21-laion-512",
        "sd21-laion-256",
        "sdxl-laion-1024",
        "sd15-inpainting-laion-512",
        "cifar10",
        "imagenet64",
        "imagenet256",
    }


@pytest.mark.parametrize("file", REAL, ids=lambda file: file.stem)
def test_the_head_of_a_recipe_says_what_the_plan_says(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    found = re.search(r"^# `fewstep plan (\S+)` estimates, at an MFU of 40 %; .*\n#   (.+)$", text, re.MULTILINE)
    assert found is not None
    assert Path(found[1]) == file
    said, says = found[2], summary(plan_of(file))
    number = r"\d[\d,]*(?:\.\d+)?"
    assert re.sub(number, "…", said) == re.sub(number, "…", says), says
    for ours, its in zip(re.findall(number, said), re.findall(number, says), strict=True):
        assert float(ours.replace(",", "")) == pytest.approx(float(its.replace(",", "")), rel=0.02), says


@pytest.mark.parametrize(
    ("num_workers", "changes", "fits"),
    [
        (32, {}, True),
        (32, {"gradient_checkpointing": False}, False),
        (32, {"gradient_checkpointing": False, "micro_batch_size": 4}, False),
        (32, {"gradient_checkpointing": False, "micro_batch_size": 2}, True),
        (8, {}, False),
        (8, {"micro_batch_size": 16}, True),
    ],
    ids=str,
)
def test_what_the_head_of_the_sdxl_recipe_says_of_80_gb(
    num_workers: int, changes: dict[str, object], fits: bool
) -> None:
    file = Path("workflows/recipes/sdxl-laion-1024.yaml")
    recipe = load_recipe(file)
    shape = find_shape(recipe)
    training = next(w for w in work_of(recipe, shape) if isinstance(w, Training) and w.stage == "progressive")
    memory = memory_of(training, training.settings.model_copy(update=changes), shape, num_workers=num_workers)
    assert (memory.total <= plan_of(file).gpu.memory_bytes) == fits
