"""evaluate, for class-conditional students: the shape of the paper's Table 1, on the recipe's own pictures."""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.data.emoji.dataset import Split
from fewstep.data.mixture import iterate_mixture, list_shards
from fewstep.data.samples import NO_RULES
from fewstep.diffusion import CosineSchedule, RowRandom, ddim, stochastic
from fewstep.diffusion.prediction import from_sample, to_sample
from fewstep.diffusion.samplers import Model
from fewstep.errors import RecipeError
from fewstep.evaluate.baselines import dpm_solver
from fewstep.evaluate.classes.classifier import PictureClassifier
from fewstep.evaluate.classes.compare import compare_classes, table_specs
from fewstep.evaluate.classes.report import write_class_report
from fewstep.evaluate.classes.schema import ClassRowSpec
from fewstep.models import ClassModel, Denoiser, initial_noise, load_model
from fewstep.stages.batches import picture_decoder
from fewstep.stages.context import StageContext
from fewstep.stages.device import driver_device
from fewstep.stages.progress import Progress
from fewstep.storage import join
from fewstep.tracking.fetch import fetch_model

_LABELS = {"student": "{n}", "student_stochastic": "stochastic-{n}", "student_single_w": "single_w-{w:g}-{n}"}


def evaluate_classes(context: StageContext) -> dict[str, Any]:
    """Sample every row, judge it by a classifier's features, and write the report to the local folder and the store.

    The pictures of a row are stored when they are made, with the time that took: a run that was killed goes on at the
    next row. Those of a model in latents are decoded first; the classifier sees pictures alone.

    Raises:
        RecipeError: the teacher is told no class.
    """
    recipe, storage = context.recipe, context.storage
    settings = recipe.evaluate_classes
    assert settings is not None
    device = driver_device(recipe.cluster)
    teacher = load_model(context.fetch(context.teacher())).to(device)
    if not isinstance(teacher, ClassModel):
        raise RecipeError(
            f"evaluate_classes judges models that are told a class, and the teacher is of the family {teacher.family}: "
            "leave evaluate_classes out, and evaluate does the judging"
        )
    students = context.artifact("progressive").facts["students"]
    sampler = _Sampler(context, teacher, {label: each["uri"] for label, each in students.items()})
    singles = [w for w in settings.weights if f"single_w-{w:g}-{settings.steps[0]}" in students]
    specs = table_specs(
        reference_steps=settings.reference_steps,
        weights=settings.weights,
        steps=settings.steps,
        single_w=singles,
        stochastic=f"stochastic-{settings.steps[0]}" in students,
    )
    classifier = _classifier(context, teacher)
    real, real_labels = _pictures(context, "evaluate", teacher, settings.num_real)
    labels = torch.arange(settings.num_pictures) % teacher.num_classes
    with Progress("evaluate", len(specs), "rows") as progress:
        comparison = compare_classes(
            sampler,
            specs,
            labels,
            seeds=range(settings.num_pictures),
            classifier=classifier,
            real_pictures=real,
            real_labels=real_labels,
            settings=settings.compare,
            seconds=sampler.seconds,
            progress=lambda what, done, total: progress.advance(done - progress.done),
        )
    names = teacher.class_names or None
    files = write_class_report(comparison, context.out, class_names=names, title=f"fewstep · {recipe.name}")
    for file in sorted(context.out.iterdir()):
        if file.is_file():
            storage.write_bytes(join(context.uri("evaluate"), file.name), file.read_bytes())
            context.run.log_artifact(file)
    for result in comparison.report.results:
        row = f"{result.method}_{result.num_inference_steps}_w{result.w:g}"
        if result.fd_classifier.value is not None:
            context.run.log_metrics({f"{row}.fd_classifier": result.fd_classifier.value})
    return {"report": join(context.uri("evaluate"), files.json.name), "classes": True}


def _label(spec: ClassRowSpec) -> str | None:
    """Return how stage two calls the student of a row; None for rows of the teacher."""
    made = _LABELS.get(spec.method)
    return None if made is None else made.format(n=spec.num_inference_steps, w=spec.w)


def _classifier(context: StageContext, teacher: ClassModel) -> PictureClassifier:
    """Return the classifier, trained on the training pictures."""
    settings = context.recipe.evaluate_classes
    assert settings is not None
    pixels, labels = _pictures(context, "train", teacher, settings.num_train)
    classifier = PictureClassifier(
        channels=teacher.picture_channels,
        resolution=teacher.resolution,
        num_classes=teacher.num_classes,
        settings=settings.classifier,
        device=teacher.device,
    ).fit(pixels, labels)
    return classifier


def _pictures(context: StageContext, split: Split, teacher: ClassModel, count: int) -> tuple[Tensor, Tensor]:
    listed = list_shards(context.shards(split), storage=context.storage)
    bad = context.recipe.stream.max_bad_share
    decode = picture_decoder(teacher, NO_RULES)
    read = islice(iterate_mixture(listed, storage=context.storage, decode=decode, max_bad_share=bad), count)
    if listed.num_samples is not None:
        count = min(count, listed.num_samples)
    # In place: a list of them beside their stack would take twice the memory, some 24 GB at 256 px.
    pixels = torch.empty(count, teacher.picture_channels, teacher.resolution, teacher.resolution, dtype=torch.uint8)
    labels = torch.empty(count, dtype=torch.int64)
    found = 0
    for sample in read:
        pixels[found], labels[found] = sample["pixels"], sample["label"]
        found += 1
    return pixels[:found], labels[:found]


class _Sampler:
    """Makes the pictures of any row, and keeps them in the store."""

    def __init__(self, context: StageContext, teacher: ClassModel, students: dict[str, str]) -> None:
        self._context, self._teacher, self._students = context, teacher, students
        self._load = lru_cache(maxsize=1)(self._load_student)

    def __call__(self, spec: ClassRowSpec, labels: Tensor, seeds: Sequence[int]) -> Tensor:
        storage, uri = self._context.storage, self._uri(spec, seeds)
        if storage.exists(f"{uri}.json"):
            return torch.from_numpy(np.load(io.BytesIO(storage.read_bytes(f"{uri}.npy")), allow_pickle=False))
        began = time.perf_counter()
        pictures = self._sample(spec, labels, seeds)
        seconds = time.perf_counter() - began
        buffer = io.BytesIO()
        np.save(buffer, pictures.numpy(), allow_pickle=False)
        storage.write_bytes(f"{uri}.npy", buffer.getvalue())
        storage.write_json(f"{uri}.json", {"seconds": seconds})  # comes last
        return pictures

    def seconds(self, spec: ClassRowSpec, seeds: Sequence[int]) -> float:
        """Return how long it took to make the pictures, storing them not counted."""
        return float(self._context.storage.read_json(f"{self._uri(spec, seeds)}.json")["seconds"])

    def _uri(self, spec: ClassRowSpec, seeds: Sequence[int]) -> str:
        name = f"{spec.method}-{spec.num_inference_steps}-w{spec.w:g}-{seeds[0]}-{len(seeds)}"
        return join(self._context.uri("evaluate"), "rows", name)

    def _load_student(self, label: str) -> Denoiser:
        folder = fetch_model(self._students[label], storage=self._context.storage)
        return load_model(folder).to(self._teacher.device).denoiser()

    @torch.no_grad()
    def _sample(self, spec: ClassRowSpec, labels: Tensor, seeds: Sequence[int]) -> Tensor:
        parts, n = self._teacher, spec.num_inference_steps
        noise = initial_noise(seeds, parts.sample_shape, device=parts.device)
        condition, student = {"label": labels.to(parts.device)}, _label(spec)
        if student is not None:
            model = self._load(student)
            network = model.conditional(condition, spec.w)
        else:
            model = parts.denoiser()
            # At w = 0 the unconditional branch has no weight.
            network = model.guided(condition, spec.w) if spec.w else model.conditional(condition)
        common: dict[str, Any] = {
            "schedule": model.schedule,
            "prediction_type": model.prediction_type,
            "num_inference_steps": n,
            "clip_sample": model.clip_sample,
        }
        if spec.method == "dpmpp":
            z = _dpm_solver(parts, network, noise, n)
        elif spec.method == "student_stochastic":
            random = RowRandom(seed=1, step=0, rows=seeds, device=parts.device)
            z = stochastic(network, noise, noise=lambda step: random.normal(*noise.shape[1:]), **common)
        else:
            z = ddim(network, noise, **common)
        return parts.decode(z).cpu()


#: Times of the table that DPM-Solver++ looks the cosine schedule up in.
_TABLE = 1000


def _dpm_solver(parts: ClassModel, network: Model, z: Tensor, num_inference_steps: int) -> Tensor:
    """Return the end of diffusers' DPM-Solver++ (2M) on the model's schedule; a continuous one becomes a table."""
    schedule, config = parts.schedule, parts.scheduler_config
    times = schedule.times(config.get("num_train_timesteps", _TABLE))[1:]
    if isinstance(schedule, CosineSchedule):
        squares = schedule.angle(times).cos().square()
        betas = 1 - squares / torch.cat([torch.ones(1, dtype=torch.float64), squares[:-1]])
        config = {"num_train_timesteps": _TABLE, "trained_betas": betas.tolist()}
    scheduler = dpm_solver(config, parts.prediction_type)
    scheduler.set_timesteps(num_inference_steps, device=z.device)
    clip_sample = parts.denoiser().clip_sample
    for t in scheduler.timesteps:
        at = times[int(t)].to(z.device).expand(z.shape[0])
        output = network(z, at).float()
        if clip_sample:
            # As the other samplers do; diffusers' scheduler knows thresholding alone.
            alpha_sigma = schedule.alpha_sigma(at, ndim=z.ndim)
            x = to_sample(output, z, *alpha_sigma, parts.prediction_type).clamp(-1, 1)
            output = from_sample(x, z, *alpha_sigma, parts.prediction_type)
        z = scheduler.step(output, t, z, return_dict=False)[0]
    return z
