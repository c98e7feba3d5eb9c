"""guidance: stage one, one w-conditioned network instead of the classifier-free-guided pair."""

from __future__ import annotations

from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import nn

from fewstep.data.mixture import iterate_mixture, list_shards
from fewstep.data.part import stack_samples
from fewstep.diffusion.prediction import PredictionType
from fewstep.distill import GuidanceObjective, GuidedError, guided_relative_error
from fewstep.distill.ladders import check_ladders
from fewstep.distill.settings import GuidanceSettings
from fewstep.errors import RecipeError
from fewstep.models import StudentInfo, load_model, save_student
from fewstep.models.lora import check_peft, has_adapters, lora_student, merged, save_adapters
from fewstep.plan.work import STAGE_ONE
from fewstep.recipe import Recipe
from fewstep.stages.batches import format_batches
from fewstep.stages.context import StageContext
from fewstep.stages.device import driver_device
from fewstep.stages.fingerprints import guidance_fingerprint
from fewstep.stages.teacher_source import TeacherSource, told_of
from fewstep.stages.watched import watched
from fewstep.storage import join
from fewstep.tracking.fetch import fetch_model
from fewstep.train.job import TrainJob
from fewstep.train.run import finished_result, run_training

_VALIDATION_BATCH = 64


def guidance(context: StageContext) -> dict[str, Any]:
    """Train stage one, store the student, and measure its relative error on held-out prompts and weights."""
    recipe, storage = context.recipe, context.storage
    settings = recipe.guidance
    assert settings is not None
    check_lora(recipe)
    encoded = context.artifact("encode").facts
    teacher = TeacherSource(context.teacher(), storage, context.tracker.settings)
    if recipe.progressive is not None:
        check_ladders(recipe.progressive, teacher.load().denoiser(), prediction_type=settings.prediction_type)
    w_min, w_max = settings.weights
    info = StudentInfo(
        stage="guidance",
        num_inference_steps=None,
        w_min=w_min,
        w_max=w_max,
        guidance_scale=recipe.evaluate.guidance_scale,
        teacher=teacher.uri,
        fingerprint=guidance_fingerprint(
            recipe, teacher_digest=context.teacher_digest(), latents_digest=encoded["train"]["digest"]
        ),
        lora_base=None if settings.lora is None else teacher.uri,
    )
    job = TrainJob(
        name="guidance",
        fingerprint=info.fingerprint,
        objective=told_of(partial(_objective, settings, teacher), teacher, context.training_format()),
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
        export=partial(export_student, teacher, info, settings.prediction_type),
        settings=settings.train,
        seed=recipe.seed,
        num_streams=recipe.stream.num_streams,
        grouped=context.training_format().group_by is not None,
    )
    context.run.log_params(settings)
    uri = join(storage.root, "students", f"guidance-{info.fingerprint[:16]}")
    reused = finished_result(job, storage=storage, uri=uri) is not None
    job = watched(job, recipe, "guidance", planned=STAGE_ONE)
    result = run_training(job, cluster=recipe.cluster, storage=storage, uri=uri, tracker=context.run.handle())
    errors = _relative_errors(context, result.export_uri)
    context.run.log_metrics(
        {
            "relative_error": errors.mean,
            **{f"relative_error_w_{w:g}": error for w, error in errors.by_w.items()},
            **{f"relative_error_t_{times}": error for times, error in errors.by_time.items()},
        },
        step=result.updates,
    )
    facts = {
        "training": result.to_json(),
        "training_seconds": result.seconds,
        "reused": reused,
        "fingerprint": info.fingerprint,
        "relative_error": errors.mean,
        "relative_error_by_w": {f"{w:g}": error for w, error in errors.by_w.items()},
        "relative_error_by_time": errors.by_time,
    }
    return facts


def check_lora(recipe: Recipe) -> None:
    """Refuse adapters that cannot be trained here, or that the ladder could not go on from; before stage one.

    Raises:
        ModelError: the package peft is not installed.
        RecipeError: the two stages name different ones.
    """
    first = recipe.guidance.lora if recipe.guidance is not None else None
    then = recipe.progressive.lora if recipe.progressive is not None else None
    if first is not None or then is not None:
        check_peft()
    if first is not None and then is not None and first != then:
        raise RecipeError(
            f"guidance.lora is rank={first.rank}, alpha={first.alpha} and progressive.lora rank={then.rank}, "
            f"alpha={then.alpha} (or their target_modules differ): the rungs go on from the adapters of stage one, so "
            "give both the same"
        )


def export_student(
    teacher: TeacherSource,
    info: StudentInfo,
    prediction_type: PredictionType | None,
    network: nn.Module,
    folder: str,
) -> None:
    """Write a student's diffusers folder, and its adapters where it has them; the `export` of the training jobs of both
    stages."""
    whole = merged(network) if has_adapters(network) else network
    save_student(folder, teacher.load(), whole, info, prediction_type=prediction_type)
    if has_adapters(network):
        save_adapters(network, folder)


def _objective(settings: GuidanceSettings, source: TeacherSource, device: torch.device) -> GuidanceObjective:
    w_min, w_max = settings.weights
    teacher = source.load().to(device).denoiser()
    return GuidanceObjective(
        teacher,
        student=None if settings.lora is None else lora_student(teacher.network, settings.lora),
        w_min=w_min,
        w_max=w_max,
        embedding_dim=settings.embedding_dim,
        loss_weight=settings.loss_weight,
        error=settings.error,
        prediction_type=settings.prediction_type,
        pure_noise_at_end=settings.pure_noise_at_end,
    )


def _relative_errors(context: StageContext, student_uri: str) -> GuidedError:
    settings = context.recipe.guidance
    assert settings is not None
    device = driver_device(context.recipe.cluster)
    teacher = load_model(context.fetch(context.teacher())).to(device)
    student = load_model(fetch_model(student_uri, storage=context.storage)).to(device)
    samples = held_out_samples(context, settings.num_validation)
    batches = [
        {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
        for batch in (
            stack_samples(samples[start : start + _VALIDATION_BATCH])
            for start in range(0, len(samples), _VALIDATION_BATCH)
        )
    ]
    # Between the ends and off any round number: none of these weights is drawn in training.
    low, high = settings.weights
    weights = sorted({round(low + (high - low) * share, 3) for share in (0.02, 0.26, 0.51, 0.74, 0.98)})
    return guided_relative_error(
        teacher.denoiser(), student.denoiser(), batches, weights=weights, seed=context.recipe.seed
    )


def held_out_samples(context: StageContext, count: int) -> list[dict[str, Any]]:
    """Return the first held-out samples, as a network is trained on them."""
    storage = context.storage
    listed = list_shards(context.latents("evaluate"), storage=storage)
    decode = context.sample_format().decoder()
    # What cannot be used was counted when the latents were made.
    return list(islice(iterate_mixture(listed, storage=storage, decode=decode, max_bad_share=1.0), count))
