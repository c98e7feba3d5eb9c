"""One row of the comparison: sample, decode, measure. Rows need one another for nothing, so each can be a task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from fewstep.evaluate import distances
from fewstep.evaluate.alignment import AlignmentScorer
from fewstep.evaluate.baselines import Conditions, RowSpec, Sampler, Samples
from fewstep.evaluate.features import Lite0Features
from fewstep.evaluate.holes import Holes, measure_holes
from fewstep.evaluate.schema import HoleResult, Result
from fewstep.evaluate.settings import EvaluateSettings

#: latents (B, C, h, w) -> pictures, uint8 (B, 3, H, W).
Decode = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Pictures:
    """The pictures of one row.

    Attributes:
        images: uint8, (N, 3, H, W), on the CPU.
        latents: float32, (N, C, h, w), on the CPU.
        features: (N, 1280).
        network_evaluations: per picture.
        shown: pictures for the grid alone, uint8 (S, 3, H, W).
    """

    images: Tensor
    latents: Tensor
    features: Tensor
    network_evaluations: int
    shown: Tensor


@dataclass(frozen=True)
class References:
    """What every row is measured against.

    Attributes:
        real_features: of held-out real pictures, (M, 1280); of inpainting, of the N pictures that have the holes.
        teacher: the guided teacher's pictures with many steps, of the same prompts and noise.
        prompts: N of them.
        scorer: a fitted alignment scorer; None leaves the alignment out.
        holes: of inpainting, N of them.
    """

    real_features: Tensor
    teacher: Pictures
    prompts: Sequence[str]
    scorer: AlignmentScorer | None
    holes: Holes | None = None


@dataclass(frozen=True)
class RowOutcome:
    """A row's figures, with the draws that comparisons between rows need.

    Attributes:
        result: the row of the report, still without its time.
        kid_to_real: with draws that are shared by all rows.
        grid: the pictures of the prompts to show and of the first held-out ones, uint8.
        hole: of inpainting.
    """

    spec: RowSpec
    result: Result
    kid_to_real: distances.Estimate
    grid: Tensor
    hole: HoleResult | None = None


def make_pictures(
    spec: RowSpec,
    *,
    sampler: Sampler,
    decode: Decode,
    conditions: Conditions,
    image_features: Lite0Features,
    settings: EvaluateSettings,
    shown: Conditions | None = None,
) -> Pictures:
    """Return the pictures of one row with their features, and those that are only shown.

    Raises:
        ModelError: there is no student for the row's number of steps.
    """

    def draw(of: Conditions) -> tuple[Samples, Tensor]:
        samples = sampler(spec, of, batch_size=settings.batch_size)
        with torch.no_grad():
            return samples, torch.cat([decode(z).cpu() for z in samples.latents.split(settings.batch_size)])

    samples, images = draw(conditions)
    extra = images[:0] if shown is None else draw(shown)[1]
    return Pictures(images, samples.latents, image_features(images), samples.network_evaluations, extra)


def measure_row(spec: RowSpec, pictures: Pictures, *, references: References, settings: EvaluateSettings) -> RowOutcome:
    """Return every metric of a row except its time.

    Raises:
        DataError: sets of different sizes where one-to-one partners are needed.
    """
    draws: dict[str, Any] = {"num_bootstrap": settings.num_bootstrap, "seed": settings.seed}
    # An inpainted picture shares what is around the hole with its real one: those two are left out of the cross term.
    holes = references.holes
    to_real = distances.kid_with_interval(
        pictures.features, references.real_features, paired=holes is not None, **draws
    )
    # The partners share prompt and noise, so they are left out of the cross term.
    to_teacher = distances.kid_with_interval(pictures.features, references.teacher.features, paired=True, **draws)
    frechet = distances.frechet_with_interval(pictures.features, references.real_features, seed=settings.seed)
    paired = distances.mean_with_interval(distances.paired_mse(pictures.latents, references.teacher.latents), **draws)
    alignment = None
    if references.scorer is not None:
        scores = references.scorer.score_features(pictures.features, references.prompts)
        alignment = distances.mean_with_interval(scores, **draws)
    result = Result(
        method=spec.method,
        num_inference_steps=spec.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        network_evaluations=pictures.network_evaluations,
        kid_lite0_to_real=to_real.value,
        kid_lite0_to_real_ci=to_real.interval,
        kid_lite0_to_teacher=to_teacher.value,
        kid_lite0_to_teacher_ci=to_teacher.interval,
        fd_lite0_to_real=frechet.value,
        fd_lite0_to_real_ci=frechet.interval,
        alignment=alignment.value if alignment else None,
        alignment_ci=alignment.interval if alignment else None,
        paired_mse=paired.value,
        paired_mse_ci=paired.interval,
        seconds_per_image=None,
        seconds_per_image_ci=None,
        num_images=pictures.images.shape[0],
    )
    # A copy: a view would keep every picture of the row alive.
    grid = torch.cat([pictures.shown, pictures.images])[: settings.grid_prompts].clone()
    hole = None
    if holes is not None:
        hole = measure_holes(spec, pictures.images, teacher=references.teacher.images, holes=holes, settings=settings)
    return RowOutcome(spec, result, to_real, grid, hole)


def evaluate_row(
    spec: RowSpec,
    *,
    sampler: Sampler,
    decode: Decode,
    conditions: Conditions,
    references: References,
    image_features: Lite0Features,
    settings: EvaluateSettings,
    shown: Conditions | None = None,
) -> RowOutcome:
    """Sample one row and return its figures.

    Args:
        spec: the method and its steps.
        sampler: the networks.
        decode: latents to pictures.
        conditions: prompts and noise, the same for every row.
        references: real pictures, the teacher's, the scorer.
        image_features: the extractor.
        settings: of the comparison.
        shown: prompts and noise of what is only shown in the grid.

    Raises:
        ModelError: there is no student for the row's number of steps.
    """
    pictures = make_pictures(
        spec,
        sampler=sampler,
        decode=decode,
        conditions=conditions,
        image_features=image_features,
        settings=settings,
        shown=shown,
    )
    return measure_row(spec, pictures, references=references, settings=settings)


def time_rows(
    specs: Sequence[RowSpec], *, sampler: Sampler, conditions: Conditions, settings: EvaluateSettings
) -> dict[RowSpec, list[float]]:
    """Return seconds a picture of each row, one for each round.

    Each round runs every row once, one after the other, in this process at one batch size, after a warm-up: what
    slows the machine for a while slows all of them, and the ratio within a round stays fair.
    """
    batch = conditions.head(settings.timing_batch_size)
    pictures = batch.noise.shape[0]
    for spec in specs:
        # The warm-up is for the network's first calls, not for the number of steps.
        sampler(_warm_up_of(spec), batch, batch_size=pictures)
    seconds: dict[RowSpec, list[float]] = {spec: [] for spec in specs}
    for _ in range(settings.timing_repeats):
        for spec in specs:
            seconds[spec].append(sampler(spec, batch, batch_size=pictures).seconds / pictures)
    return seconds


def with_time(result: Result, seconds: Sequence[float]) -> Result:
    """Return the row with its median time and the range of the rounds (six or more: a 95 % interval of the median)."""
    times = {"seconds_per_image": median(seconds), "seconds_per_image_ci": (min(seconds), max(seconds))}
    return result.model_copy(update=times)


def _warm_up_of(spec: RowSpec) -> RowSpec:
    return spec if spec.method == "student" else RowSpec(spec.method, min(spec.num_inference_steps, 2))
