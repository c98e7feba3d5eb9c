"""evaluate: students against the teacher and its plain samplers, on held-out prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.data.emoji.dataset import Split
from fewstep.data.masks import mask_of
from fewstep.data.mixture import iterate_mixture, list_shards
from fewstep.data.pictures import decode_picture
from fewstep.data.samples import with_rules
from fewstep.errors import ModelError
from fewstep.evaluate.alignment import AlignmentScorer
from fewstep.evaluate.compare import Comparison, compare, row_specs
from fewstep.evaluate.features import Lite0Features
from fewstep.evaluate.report import ReportFiles, write_report
from fewstep.evaluate.schema import StageUsage
from fewstep.models import Denoiser, Parts, load_model, read_student_info
from fewstep.recipe import Recipe
from fewstep.stages.context import Artifact, StageContext, find_artifact, pin_teacher
from fewstep.stages.device import driver_device
from fewstep.stages.evaluate_classes import evaluate_classes
from fewstep.stages.progress import Progress
from fewstep.storage import Storage, join
from fewstep.tracking.fetch import fetch_model
from fewstep.tracking.tracker import Tracker


def evaluate(context: StageContext) -> dict[str, Any]:
    """Compare, write the report to the local folder and to the store, and log its figures."""
    recipe, storage = context.recipe, context.storage
    if recipe.evaluate_classes is not None:
        return evaluate_classes(context)
    trained = context.artifact("progressive").facts["students"]
    students = {steps: fetch_model(trained[str(steps)]["uri"], storage=storage) for steps in recipe.evaluate.steps}
    before = [(name, find_artifact(recipe, storage, name)) for name in recipe.stages if name != "evaluate"]
    usage = [_stage_usage(name, found, context.begun) for name, found in before if found is not None]
    comparison = _compare(context, context.teacher(), students)
    own = context.usage
    if own is not None:
        own.count()
        usage.append(StageUsage(name="evaluate", seconds=own.seconds, peak_memory_bytes=own.peak_memory_bytes))
    error = context.artifact("guidance").facts["relative_error"]
    comparison = replace(comparison, report=comparison.report.model_copy(update={"stage_one_relative_error": error}))
    files = write_report(comparison, context.out, stages=usage, title=f"fewstep · {recipe.name}")
    for file in (files.json, files.html, files.samples):
        storage.write_bytes(join(context.uri("evaluate"), file.name), file.read_bytes())
        context.run.log_artifact(file)
    for result in comparison.report.results:
        row = f"{result.method}_{result.num_inference_steps}"
        figures = {name: getattr(result, name) for name in _FIGURES}
        context.run.log_metrics({f"{row}.{name}": value for name, value in figures.items() if value is not None})
    inpainting = comparison.report.inpainting
    for hole in inpainting.results if inpainting is not None else ():
        row = f"{hole.method}_{hole.num_inference_steps}"
        figures = {"hole_mse": hole.hole_mse, "known_mse": hole.known_mse}
        context.run.log_metrics({f"{row}.{name}": value for name, value in figures.items() if value is not None})
    return {"report": join(context.uri("evaluate"), files.json.name)}


def _stage_usage(name: str, found: Artifact, begun: datetime | None) -> StageUsage:
    """Return what a stage took; where it found its trainings done by an earlier recipe, what those took."""
    older = begun is not None and bool(found.finished) and datetime.fromisoformat(found.finished) < begun
    return StageUsage(
        name=name,
        seconds=max(found.seconds, found.facts.get("training_seconds", 0.0)),
        peak_memory_bytes=found.peak_memory_bytes,
        skipped=older or found.facts.get("reused", False),
    )


def evaluate_models(
    recipe: Recipe, storage: Storage, tracker: Tracker, *, students: Sequence[str], out: Path
) -> ReportFiles:
    """Compare any students with the teacher of a recipe on its held-out shards, and write the report to `out`.

    Raises:
        ModelError: a MODEL is no student for a fixed number of steps, or two are for the same number.
    """
    found: dict[int, Path] = {}
    for uri in students:
        folder = fetch_model(uri, storage=storage, tracking=tracker)
        info = read_student_info(folder)
        if info is None or info.num_inference_steps is None:
            raise ModelError(
                f"{uri} does not say how many steps it was made for: name students of the progressive stage"
            )
        if info.num_inference_steps in found:
            raise ModelError(
                f"{uri} is a second student for {info.num_inference_steps} steps: name one for each number"
            )
        found[info.num_inference_steps] = folder
    if not found:
        raise ModelError("no student to evaluate: name at least one MODEL")
    settings = recipe.evaluate.model_copy(update={"steps": tuple(sorted(found, reverse=True))})
    recipe = recipe.model_copy(update={"evaluate": settings})
    with tracker.run(f"evaluate {recipe.name}", key=f"evaluate/{recipe.digest()}/{'/'.join(students)}") as run:
        context = StageContext(recipe=recipe, storage=storage, tracker=tracker, run=run, parent=run.id, out=out)
        # Of the same teacher as the stage: what convert made of it, where the recipe converts it.
        teacher = context.teacher() if "convert" in recipe.stages else pin_teacher(context)
        return write_report(_compare(context, teacher, found), out, title=f"fewstep · {recipe.name}")


def _compare(context: StageContext, teacher_uri: str, students: Mapping[int, Path]) -> Comparison:
    recipe, settings = context.recipe, context.recipe.evaluate
    device = driver_device(recipe.cluster)
    teacher = load_model(context.fetch(teacher_uri)).to(device)
    if teacher.num_classes is not None:
        raise ModelError(
            f"{teacher_uri} is class-conditional (family {teacher.family}), and this report is of models that take "
            "prompts: class-conditional students are judged by the stage evaluate with the key evaluate_classes"
        )
    real, prompts, keys = _read(context, "evaluate", teacher.resolution)
    masks = None
    if "mask" in teacher.denoiser().condition_names:
        masks = torch.stack(
            [mask_of(key, teacher.resolution, settings=recipe.encode.masks, seed=recipe.seed) for key in keys]
        )
    first = {"caption": prompts[0], "pixels": real[0], **({} if masks is None else {"mask": masks[0]})}
    models: dict[int, Denoiser] = {}
    for steps, folder in students.items():
        student, info = load_model(folder).to(device), read_student_info(folder)
        _check_fits(student, teacher, first, str(folder))
        student.to("cpu")  # until it is drawn from
        if info is not None:
            info.check_kind("this comparison", "deterministic")
            info.check(num_inference_steps=steps, guidance_scale=settings.guidance_scale)
        model = models[steps] = student.denoiser()
        if model.embedding_dim is None and (info is None or not info.has_single_w):
            raise ModelError(
                f"the student in {folder} has no time_cond_proj_dim, so it takes no guidance weight, and is of no "
                "single one: use the network that the guidance and progressive stages made"
            )
    features = Lite0Features(num_threads=settings.num_threads)
    scorer = AlignmentScorer(image_features=features).fit(*_read(context, "alignment", teacher.resolution)[:2])
    each = settings.num_prompts
    with Progress("evaluate", len(row_specs(settings)) * each, "images") as progress:
        return compare(
            teacher=teacher,
            students=models,
            prompts=prompts,
            seeds=list(range(len(prompts))),
            real_images=real,
            real_captions=prompts,
            masks=masks,
            settings=settings,
            scorer=scorer,
            image_features=features,
            progress=lambda message, done, total: progress.advance(done * each - progress.done),
        )


def _check_fits(student: Parts, teacher: Parts, sample: Mapping[str, Any], name: str) -> None:
    """Refuse a student of another teacher: sampled with this one's times and embeddings, its figures would be wrong."""
    same = (
        type(student) is type(teacher)
        and student.schedule.same_as(teacher.schedule)
        and student.sample_shape == teacher.sample_shape
        and _same_condition(student.conditions([sample]), teacher.conditions([sample]))
    )
    if not same:
        raise ModelError(
            f"the student in {name} was not made from the recipe's teacher: its family, schedule, latents or text "
            "encoder differ. Name the teacher that it was distilled from"
        )


def _same_condition(own: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return all(
        value.shape == other[name].shape and torch.allclose(value.float(), other[name].float(), atol=1e-3)
        for name, value in own.items()
    )


_FIGURES = (
    "kid_lite0_to_real",
    "kid_lite0_to_teacher",
    "fd_lite0_to_real",
    "alignment",
    "paired_mse",
    "seconds_per_image",
)


#: Pictures read at most, whatever the shards hold: they are kept in memory, and the figures gain little beyond.
_MAX_PICTURES = 10_000


def _read(context: StageContext, split: Split, resolution: int) -> tuple[Tensor, list[str], list[str]]:
    """Return pictures, captions and keys of a split."""
    listed = list_shards(context.shards(split), storage=context.storage)
    decode = with_rules(partial(decode_picture, resolution=resolution), context.recipe.sample_rules)
    bad = context.recipe.stream.max_bad_share
    read = iterate_mixture(listed, storage=context.storage, decode=decode, max_bad_share=bad)
    samples = list(islice(read, _MAX_PICTURES))
    pixels = torch.stack([sample["pixels"] for sample in samples])
    return pixels, [sample["caption"] for sample in samples], [sample["key"] for sample in samples]
