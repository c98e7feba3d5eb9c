"""FLOPs of a training for those who watch it: those of its plan, without what is computed twice."""

from __future__ import annotations

from typing import Any

import pytest

from fewstep.plan.plan import update_flops
from fewstep.plan.teacher import find_shape
from fewstep.plan.work import STAGE_ONE, Training, rung_name, work_of
from fewstep.recipe import Recipe, parse_recipe
from fewstep.stages.watched import training_flops

TRAIN = {"updates": 10, "global_batch_size": 64, "learning_rate": 1.0e-4}


def recipe_of(**train: Any) -> Recipe:
    return parse_recipe(
        {
            "name": "small",
            "stages": ["prepare", "encode", "guidance", "progressive"],
            "teacher": "asset:emoji-teacher",
            "prepare": {"resolution": 32, "num_train": 5000},
            "guidance": {"embedding_dim": 256, "train": {**TRAIN, **train}},
            "progressive": {"ladder": [2, 1], "train": TRAIN},
        }
    )


def test_every_training_of_a_plan_is_found() -> None:
    recipe = recipe_of()
    planned = {each.name: each for each in work_of(recipe, find_shape(recipe)) if isinstance(each, Training)}
    assert planned.keys() == {STAGE_ONE, rung_name("deterministic", 2, w=None), rung_name("deterministic", 1, w=None)}
    for name, work in planned.items():
        assert training_flops(recipe, work.stage, name) == update_flops(work) > 1e6
    with pytest.raises(LookupError, match="has no training '8 steps' in its stage progressive"):
        training_flops(recipe, "progressive", "8 steps")


def test_what_is_computed_again_is_no_work_of_the_network() -> None:
    again = recipe_of(gradient_checkpointing=True)
    assert training_flops(again, "guidance", STAGE_ONE) == training_flops(recipe_of(), "guidance", STAGE_ONE)
