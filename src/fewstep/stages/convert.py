"""convert: a teacher becomes one of another prediction type by fine-tuning, most often eps to v (Meng et al. §4.2)."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewstep.diffusion import NoiseSchedule
from fewstep.diffusion.prediction import PredictionType
from fewstep.distill import DenoisingObjective
from fewstep.distill.guidance import refuse_epsilon_without_signal
from fewstep.errors import RecipeError
from fewstep.models import Parts, copy_unet
from fewstep.stage_settings import ConvertStage
from fewstep.stages.batches import format_batches
from fewstep.stages.context import StageContext
from fewstep.stages.fingerprints import convert_fingerprint, folder_digest
from fewstep.stages.teacher_source import TeacherSource, told_of
from fewstep.stages.watched import watched
from fewstep.storage import join
from fewstep.tracking.fetch import fetch_model
from fewstep.train.job import TrainJob
from fewstep.train.run import run_training


def convert(context: StageContext) -> dict[str, Any]:
    """Fine-tune the denoising network to output something else (and perhaps on a schedule of zero terminal SNR); the
    artifact names a teacher that is sampled like the old one and distills better."""
    recipe, storage = context.recipe, context.storage
    settings = recipe.convert
    assert settings is not None
    encoded = context.artifact("encode").facts
    source = TeacherSource(encoded["teacher"], storage, context.tracker.settings)
    converted_config(settings, source.load())  # what cannot work is told now, not by a worker
    fingerprint = convert_fingerprint(
        recipe, teacher_digest=encoded["teacher_digest"], latents_digest=encoded["train"]["digest"]
    )
    job = TrainJob(
        name="convert",
        fingerprint=fingerprint,
        objective=told_of(partial(_objective, settings, source), source, context.training_format()),
        batches=partial(
            format_batches,
            context.latents("train"),
            samples=context.training_format(),
            storage=storage,
            tracking=context.tracker.settings,
            stream=recipe.stream,
            global_batch_size=settings.train.global_batch_size,
            seed=recipe.seed,
        ),
        export=partial(_export, settings, source),
        settings=settings.train,
        seed=recipe.seed,
        num_streams=recipe.stream.num_streams,
        grouped=context.training_format().group_by is not None,
    )
    context.run.log_params(settings)
    uri = join(storage.root, "teachers", f"convert-{fingerprint[:16]}")
    job = watched(job, recipe, "convert")
    result = run_training(job, cluster=recipe.cluster, storage=storage, uri=uri, tracker=context.run.handle())
    return {
        "converted": result.to_json(),
        "training_seconds": result.seconds,
        "teacher": result.export_uri,
        "teacher_digest": folder_digest(fetch_model(result.export_uri, storage=storage)),
    }


def converted_config(settings: ConvertStage, parts: Parts) -> dict[str, Any]:
    """Return the scheduler configuration of the converted teacher.

    Raises:
        RecipeError: nothing would change.
        ModelError: eps-prediction with zero terminal SNR.
    """
    config = changed_config(parts, settings.prediction_type, rescale_betas_zero_snr=settings.rescale_betas_zero_snr)
    schedule = NoiseSchedule.from_scheduler_config(config)
    if settings.prediction_type == parts.prediction_type and schedule.same_as(parts.schedule):
        raise RecipeError(
            f"convert.prediction_type={settings.prediction_type} is what the teacher outputs already, and its noise "
            "schedule stays as it is: leave convert out of the stages"
        )
    return config


def changed_config(
    parts: Parts, prediction_type: PredictionType | None, *, rescale_betas_zero_snr: bool | None
) -> dict[str, Any]:
    """Return the scheduler configuration of a model that learns to output something else; None: what it does now.

    Raises:
        ModelError: eps-prediction with zero terminal SNR.
    """
    config = dict(parts.scheduler_config)
    if prediction_type is not None:
        config["prediction_type"] = prediction_type
    if rescale_betas_zero_snr is not None:
        config["rescale_betas_zero_snr"] = rescale_betas_zero_snr
    refuse_epsilon_without_signal(NoiseSchedule.from_scheduler_config(config), config["prediction_type"])
    return config


def _objective(settings: ConvertStage, source: TeacherSource, device: torch.device) -> DenoisingObjective:
    parts = source.load().to(device)
    model = parts.with_network(copy_unet(parts.network), converted_config(settings, parts)).denoiser()
    return DenoisingObjective(model, condition_dropout=settings.condition_dropout, loss_weight=settings.loss_weight)


def _export(settings: ConvertStage, source: TeacherSource, network: nn.Module, folder: str) -> None:
    parts = source.load()
    parts.with_network(network, converted_config(settings, parts)).save(Path(folder))
