"""progressive: stage two, the ladders; one student is kept for every step count."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from fewstep.distill import NaiveProgressiveObjective, Objective, ProgressiveObjective
from fewstep.distill.settings import LadderKind, ProgressiveSettings, student_kind, student_label
from fewstep.errors import ModelError
from fewstep.models import StudentInfo, load_model, read_student_info
from fewstep.models.lora import LoraSettings, adapters_in, lora_student
from fewstep.plan.work import rung_name
from fewstep.stages.batches import format_batches
from fewstep.stages.context import StageContext, data_tags
from fewstep.stages.fingerprints import guided_pair_fingerprint, rung_fingerprint
from fewstep.stages.grids import picture_grid
from fewstep.stages.guidance import check_lora, export_student
from fewstep.stages.teacher_source import TeacherSource, told_of
from fewstep.stages.watched import watched
from fewstep.storage import Storage, join
from fewstep.tracking.fetch import fetch_model
from fewstep.tracking.lineage import lineage
from fewstep.train.job import TrainJob
from fewstep.train.run import finished_result, run_training, trained_by


def progressive(context: StageContext) -> dict[str, Any]:
    """Train every rung of every ladder from the one before it; each is a run of its own, with a picture grid."""
    settings = context.recipe.progressive
    assert settings is not None
    check_lora(context.recipe)
    students: dict[str, Any] = {}
    for kind in settings.kinds:
        for w in settings.single_w if kind == "single_w" else (None,):
            students |= _ladder(context, kind, w)
    reused = [student.pop("reused") for student in students.values()]
    return {
        "students": students,
        "training_seconds": sum(student["training"]["seconds"] for student in students.values()),
        "reused": all(reused),
    }


def _ladder(context: StageContext, ladder: LadderKind, w: float | None) -> dict[str, Any]:
    """Train the rungs of one ladder; returns what is known of each student, by its label."""
    recipe, storage = context.recipe, context.storage
    settings = recipe.progressive
    assert settings is not None
    assert recipe.guidance is not None
    kind = student_kind(ladder)
    teacher = TeacherSource(context.teacher(), storage, context.tracker.settings)
    stage_one = context.artifact("guidance").facts
    # These ladders begin with the guided teacher itself.
    without_stage_one = ladder in ("naive", "single_w")
    first = {
        "uri": stage_one["training"]["export_uri"],
        "fingerprint": stage_one["fingerprint"],
        "prediction_type": recipe.guidance.prediction_type,
    }
    if without_stage_one:
        before_all = guided_pair_fingerprint(
            recipe,
            w=w,
            teacher_digest=context.teacher_digest(),
            latents_digest=context.artifact("encode").facts["train"]["digest"],
        )
        first = {"uri": teacher.uri, "fingerprint": before_all, "prediction_type": None}
    rungs: dict[int | None, dict[str, Any]] = {None: first}
    # Adapters of stage one sit on the teacher, and those of its rungs go on from them.
    lora_base = None
    if settings.lora is not None:
        lora_base = first["uri"] if recipe.guidance.lora is None else teacher.uri
    w_min, w_max = recipe.guidance.weights if w is None else (w, w)
    for steps in settings.ladder:
        taught_by, teacher_steps = settings.teacher_of(steps)
        before = rungs[taught_by]
        fingerprint = rung_fingerprint(recipe, ladder, steps, w=w, before=before["fingerprint"])
        label = student_label(ladder, steps, w=w)
        info = StudentInfo(
            stage="progressive",
            num_inference_steps=steps,
            w_min=w_min,
            w_max=w_max,
            guidance_scale=recipe.evaluate.guidance_scale if w is None else 1 + w,
            teacher=teacher.uri,
            fingerprint=fingerprint,
            kind=kind,
            start_times=settings.start_times.get(steps) if kind == "deterministic" else None,
            lora_base=lora_base,
        )
        train = settings.rung(steps)
        prediction_type = settings.prediction_type.get(steps, before["prediction_type"])
        name = f"{steps} step{'s' if steps > 1 else ''}" + ("" if ladder == "deterministic" else f" {ladder}")
        name += "" if w is None else f" {w:g}"
        job = TrainJob(
            name=name,
            fingerprint=info.fingerprint,
            objective=told_of(
                partial(_objective, settings, before["uri"], teacher_steps, info, storage, teacher),
                teacher,
                context.training_format(),
            ),
            batches=partial(
                format_batches,
                context.latents("train"),
                samples=context.training_format(),
                storage=storage,
                tracking=context.tracker.settings,
                stream=recipe.stream,
                global_batch_size=train.global_batch_size,
                # Another order for each rung: the first samples are no more seen than the others.
                seed=recipe.seed + steps,
            ),
            export=partial(export_student, teacher, info, prediction_type),
            settings=train,
            seed=recipe.seed + steps,
            num_streams=recipe.stream.num_streams,
            grouped=context.training_format().group_by is not None,
            tags=lineage(),
        )
        uri = join(storage.root, "students", f"{name.replace(' ', '-')}-{info.fingerprint[:16]}")
        with context.tracker.run(
            f"progressive {name}", key=f"{recipe.name}/{recipe.digest()}/{info.fingerprint}", parent=context.parent
        ) as run:
            run.log_params(train)
            run.set_tags(data_tags(recipe, storage))
            reused = finished_result(job, storage=storage, uri=uri) is not None
            job = watched(job, recipe, "progressive", planned=rung_name(ladder, steps, w=w))
            result = run_training(job, cluster=recipe.cluster, storage=storage, uri=uri, tracker=run.handle())
            # A rung that an earlier recipe trained has its curves there, and here its end.
            run.log_metrics({f"final_{name}": value for name, value in result.figures.items()}, step=result.updates)
            run.log_image(picture_grid(context, result.export_uri), f"samples_{label}", step=result.updates)
        rungs[steps] = {
            "uri": result.export_uri,
            "training": result.to_json(),
            "fingerprint": info.fingerprint,
            "code": trained_by(storage=storage, uri=uri),
            "kind": ladder,
            "w": w,
            "num_inference_steps": steps,
            "prediction_type": prediction_type,
            "reused": reused,
        }
    return {student_label(ladder, steps, w=w): rungs[steps] for steps in settings.ladder}


def _lora_student(
    settings: LoraSettings,
    before: str,
    info: StudentInfo,
    storage: Storage,
    source: TeacherSource,
    device: torch.device,
) -> Any:
    """Return the base with adapters that begin as those of the student before, if it has any."""
    assert info.lora_base is not None
    is_teacher = info.lora_base == source.uri
    base = source.load() if is_teacher else load_model(fetch_model(info.lora_base, storage=storage))
    start = None
    if before != info.lora_base:
        start = fetch_model(before, storage=storage)
        info_before = read_student_info(start)
        if adapters_in(start) is None or info_before is None or info_before.lora_base != info.lora_base:
            raise ModelError(
                f"{before} has no adapters on {info.lora_base} to go on from: leave lora out, or train all rungs anew"
            )
    return lora_student(base.to(device).network, settings, start=start)


def _objective(
    settings: ProgressiveSettings,
    before: str,
    teacher_steps: int,
    info: StudentInfo,
    storage: Storage,
    source: TeacherSource,
    device: torch.device,
) -> Objective:
    assert info.num_inference_steps is not None
    steps = info.num_inference_steps
    shared: dict[str, Any] = {
        "num_inference_steps": steps,
        "teacher_steps": teacher_steps,
        "w_min": info.w_min,
        "w_max": info.w_max,
        "loss_weight": settings.loss_weight,
        "error": settings.error,
    }
    from_teacher = before == source.uri
    parts = source.load() if from_teacher else load_model(fetch_model(before, storage=storage))
    teacher = parts.to(device).denoiser()
    if info.kind == "naive":
        return NaiveProgressiveObjective(
            teacher, guided_share=settings.guided_share, denoising_weight=settings.denoising_weight, **shared
        )
    student = None
    if settings.lora is not None:
        student = _lora_student(settings.lora, before, info, storage, source, device)
    return ProgressiveObjective(
        teacher,
        guided_teacher=from_teacher,
        student=student,
        feature_weight=settings.feature_weight,
        kind=info.kind,
        start_times=info.start_times,
        prediction_type=settings.prediction_type.get(steps),
        pure_noise_at_end=settings.pure_noise_at_end,
        trajectory_inputs=settings.trajectory_inputs and info.kind == "deterministic",
        denoising_weight=settings.denoising_weight,
        **shared,
    )
