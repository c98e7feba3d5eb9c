"""evaluate: students against the teacher and its plain samplers, on held-out prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.data.pictures import decode_picture
from fewstep.data.shards import read_index
from fewstep.data.source import iterate_samples
from fewstep.errors import ModelError
from fewstep.evaluate.alignment import AlignmentScorer
from fewstep.evaluate.compare import Comparison, compare
from fewstep.evaluate.features import Lite0Features
from fewstep.evaluate.report import ReportFiles, write_report
from fewstep.evaluate.schema import StageUsage
from fewstep.models import load_parts, read_student_info
from fewstep.recipe import Recipe
from fewstep.stages.context import StageContext, find_artifact
from fewstep.stages.progress import Progress
from fewstep.storage import Storage, join
from fewstep.tracking.fetch import fetch_model
from fewstep.tracking.tracker import Tracker


def evaluate(context: StageContext) -> dict[str, Any]:
    """Compare, write the report to the local folder and to the store, and log its figures."""
    recipe, storage = context.recipe, context.storage
    trained = context.artifact("progressive").facts["students"]
    students = {steps: fetch_model(trained[str(steps)]["uri"], storage=storage) for steps in recipe.evaluate.steps}
    before = [(name, find_artifact(recipe, storage, name)) for name in recipe.stages if name != "evaluate"]
    usage = [
        StageUsage(name=name, seconds=found.seconds, peak_memory_bytes=found.peak_memory_bytes)
        for name, found in before
        if found is not None
    ]
    comparison = _compare(context, students)
    files = write_report(comparison, context.out, stages=usage, title=f"fewstep · {recipe.name}")
    for file in (files.json, files.html, files.samples):
        storage.write_bytes(join(context.uri("evaluate"), file.name), file.read_bytes())
        context.run.log_artifact(file)
    for result in comparison.report.results:
        row = f"{result.method}_{result.num_inference_steps}"
        figures = {name: getattr(result, name) for name in _FIGURES}
        context.run.log_metrics({f"{row}.{name}": value for name, value in figures.items() if value is not None})
    return {"report": join(context.uri("evaluate"), files.json.name)}


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
        return write_report(_compare(context, found), out, title=f"fewstep · {recipe.name}")


def _compare(context: StageContext, students: Mapping[int, Path]) -> Comparison:
    storage, settings = context.storage, context.recipe.evaluate
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher = load_parts(context.teacher_folder()).to(device)
    networks = {steps: load_parts(folder).to(device).unet for steps, folder in students.items()}
    real, prompts = _read(storage, context.shards("evaluate"), teacher.resolution)
    features = Lite0Features(num_threads=settings.num_threads)
    unseen = _read(storage, context.shards("alignment"), teacher.resolution)
    scorer = AlignmentScorer(image_features=features).fit(*unseen)
    with Progress("evaluate", None, "rows") as progress:
        return compare(
            teacher=teacher,
            students=networks,
            prompts=prompts,
            seeds=list(range(len(prompts))),
            real_images=real,
            real_captions=prompts,
            settings=settings,
            scorer=scorer,
            image_features=features,
            progress=lambda message, done, total: progress.advance(),
        )


_FIGURES = (
    "kid_lite0_to_real",
    "kid_lite0_to_teacher",
    "fd_lite0_to_real",
    "alignment",
    "paired_mse",
    "seconds_per_image",
)


def _read(storage: Storage, uri: str, resolution: int) -> tuple[Tensor, list[str]]:
    shards = read_index(uri, storage=storage).shards
    samples = list(iterate_samples(shards, storage=storage, decode=partial(decode_picture, resolution=resolution)))
    return torch.stack([sample["pixels"] for sample in samples]), [sample["caption"] for sample in samples]
