"""The trainings of the teacher stage, whatever the teacher's family: each a run of its own at the tracker."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from fewstep.data.mixture import Shards, sources_of
from fewstep.data.shards import read_index
from fewstep.recipe import digest
from fewstep.stages.context import DATA_DIGEST_TAG, StageContext
from fewstep.stages.fingerprints import data_digest, fingerprint
from fewstep.stages.watched import watched
from fewstep.storage import join
from fewstep.tracking.fetch import fetch_model
from fewstep.train.job import TrainJob, TrainResult
from fewstep.train.run import run_training
from fewstep.train.settings import TrainSettings


def source_digests(context: StageContext, shards: Shards) -> dict[str, str]:
    """Return the digest of the picture shards at each address."""
    return {
        source.uri: read_index(source.uri, storage=context.storage, counted=False).digest
        for source in sources_of(shards)
    }


def tag_data(context: StageContext, shards: Shards, *, resolution: int) -> dict[str, str]:
    """Name the data in the stage's run, and return the tag for the runs of its trainings.

    Args:
        context: of the stage.
        shards: the picture shards that a teacher is trained on.
        resolution: side of its pictures in pixels.
    """
    by_uri = source_digests(context, shards)
    digests = [by_uri[source.uri] for source in sources_of(shards)]
    tags = {DATA_DIGEST_TAG: data_digest(context.recipe, shards_digests=digests, resolution=resolution)}
    context.run.set_tags(tags)
    return tags


def train_job(context: StageContext, job: TrainJob, uri: str, *, tags: Mapping[str, str] | None = None) -> TrainResult:
    """Run one of the trainings of a stage, in a run of its own at the tracker.

    Args:
        context: of the stage.
        job: the training.
        uri: where its checkpoints and its export go.
        tags: of the run.
    """
    with context.tracker.run(job.name, key=f"{context.recipe.name}/{job.fingerprint}", parent=context.parent) as run:
        run.log_params(job.settings)
        run.set_tags(tags or {})
        result = run_training(
            watched(job, context.recipe, "teacher"),
            cluster=context.recipe.cluster,
            storage=context.storage,
            uri=uri,
            tracker=run.handle(),
        )
        run.log_metrics({f"final_{name}": value for name, value in result.figures.items()}, step=result.updates)
    return result


def train_teacher_network(
    context: StageContext,
    settings: TrainSettings,
    *,
    objective: Callable[[torch.device], Any],
    batches: Callable[..., Any],
    export: Callable[[nn.Module, str], None],
    tags: Mapping[str, str],
) -> TrainResult:
    """Train the network of the teacher stage, and put its folder into the stage's export/.

    Args:
        context: of the stage.
        settings: of the training.
        objective: makes the objective on a worker's device.
        batches: makes the samples, without the arguments that are the recipe's.
        export: writes the teacher's folder.
        tags: of the training's run.
    """
    recipe, uri = context.recipe, context.uri("teacher")
    job = TrainJob(
        name="teacher",
        fingerprint=digest([fingerprint(recipe, "teacher"), "network"]),
        objective=objective,
        batches=partial(
            batches,
            storage=context.storage,
            stream=recipe.stream,
            global_batch_size=settings.global_batch_size,
            seed=recipe.seed,
        ),
        export=export,
        settings=settings,
        seed=recipe.seed,
        num_streams=recipe.stream.num_streams,
    )
    result = train_job(context, job, join(uri, "network"), tags=tags)
    context.storage.upload_folder(fetch_model(result.export_uri, storage=context.storage), join(uri, "export"))
    return result
