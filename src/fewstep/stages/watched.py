"""What those who watch a training are told of it: which it is, and how many FLOPs a sample takes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from fewstep.plan.plan import update_flops
from fewstep.plan.teacher import find_shape
from fewstep.plan.work import Training, work_of
from fewstep.recipe import Recipe, StageName
from fewstep.train.job import TrainJob


def watched(job: TrainJob, recipe: Recipe, stage: StageName, *, planned: str | None = None) -> TrainJob:
    """Return the training with its labels, and the way to count its FLOPs.

    Args:
        job: the training.
        recipe, stage: that it belongs to.
        planned: what `fewstep plan` calls it; None: as it is called itself.
    """
    labels = {"recipe": recipe.name, "stage": stage, "training": job.name}
    return replace(job, labels=labels, flops=partial(training_flops, recipe, stage, planned or job.name))


def training_flops(recipe: Recipe, stage: StageName, name: str) -> float:
    """Return the FLOPs of one sample in an update, of the networks themselves: what gradient checkpointing computes
    again is no work of theirs.

    Raises:
        ModelError: the sizes of the teacher are not known on this machine.
        LookupError: `fewstep plan` knows no such training.
    """
    for work in work_of(recipe, find_shape(recipe)):
        if isinstance(work, Training) and (work.stage, work.name) == (stage, name):
            settings = work.settings.model_copy(update={"gradient_checkpointing": False})
            return update_flops(replace(work, settings=settings))
    raise LookupError(f"the plan of recipe {recipe.name} has no training {name!r} in its stage {stage}")
