"""One row of the class-conditional comparison: ask for pictures, judge them. Each row can be a task of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from fewstep.errors import DataError
from fewstep.evaluate.classes.classifier import Judged, PictureClassifier
from fewstep.evaluate.classes.figures import class_accuracy, classifier_score, fd_classifier
from fewstep.evaluate.classes.jackknife import Measured, make_groups
from fewstep.evaluate.classes.precision_recall import Manifold, make_manifold, precision_and_recall
from fewstep.evaluate.classes.schema import ClassResult, ClassRowSpec, RealFloor
from fewstep.evaluate.classes.settings import ClassCompareSettings
from fewstep.evaluate.distances import CONFIDENCE

#: (row, asked classes (B,) int64, B noise seeds) -> pictures, uint8 (B, C, H, W). It must return when they are there:
#: its time is taken.
ClassSampler = Callable[[ClassRowSpec, Tensor, Sequence[int]], Tensor]

#: (row, B noise seeds) -> seconds that making those pictures took, for a sampler that may have them from earlier.
SecondsOf = Callable[[ClassRowSpec, Sequence[int]], float]


@dataclass(frozen=True)
class ClassConditions:
    """What all rows start from; item i of each belongs together.

    Attributes:
        labels: asked classes, (N,) int64.
        seeds: of the starting noise, N of them.
        shown: which pictures are in the grid: the first of each class, (K,).
    """

    labels: Tensor
    seeds: tuple[int, ...]
    shown: Tensor


@dataclass(frozen=True)
class RealPictures:
    """The real side, measured once.

    Attributes:
        features: (M, d).
        groups: (M,).
        manifold: of P ≤ M of them, for precision and recall.
        floor: what the figures read for real pictures.
    """

    features: Tensor
    groups: Tensor
    manifold: Manifold
    floor: RealFloor


@dataclass(frozen=True)
class ClassRowOutcome:
    """A row's figures and the pictures that are shown, uint8 (K, C, H, W)."""

    result: ClassResult
    shown: Tensor


def make_class_conditions(
    labels: Tensor, seeds: Sequence[int], *, classifier: PictureClassifier, settings: ClassCompareSettings
) -> ClassConditions:
    """Return the conditions of all rows.

    Args:
        labels: asked classes, (N,) int64, N ≥ 20.
        seeds: N of them, all different: a noise that comes twice with one class is one picture twice.
        classifier: that will judge; it knows the number of classes.
        settings: of the comparison.

    Raises:
        DataError: labels out of range, a wrong number of seeds, or seeds that repeat.
    """
    classifier.check_labels(labels)
    if len(seeds) != labels.shape[0]:
        raise DataError(f"{labels.shape[0]} labels and {len(seeds)} noise seeds came: one seed a picture")
    if len(set(seeds)) != len(seeds):
        raise DataError(
            f"{len(seeds)} noise seeds came, but only {len(set(seeds))} different ones: intervals need pictures that "
            "are independent, so give every picture a seed of its own"
        )
    first = [int((labels == label).nonzero()[0]) for label in labels.unique()]
    return ClassConditions(labels.cpu(), tuple(seeds), torch.tensor(first[: settings.grid_columns]))


def measure_real(
    classifier: PictureClassifier,
    pixels: Tensor,
    labels: Tensor,
    *,
    num_generated: int,
    settings: ClassCompareSettings,
) -> RealPictures:
    """Judge the real pictures.

    Args:
        classifier: fitted, on other pictures than these.
        pixels: uint8, (M, C, H, W), M ≥ 40.
        labels: their classes, (M,).
        num_generated: N, pictures of each row: precision and recall take equal numbers.
        settings: of the comparison.

    Raises:
        DataError: too few pictures, or pictures or labels that the classifier was not built for.
    """
    if pixels.shape[0] < 40:
        raise DataError(f"{pixels.shape[0]} real pictures came; the real-against-real floor needs at least 40")
    classifier.check_labels(labels)
    if labels.shape[0] != pixels.shape[0]:
        raise DataError(f"{pixels.shape[0]} real pictures and {labels.shape[0]} labels came: one label a picture")
    judged = classifier.judge(pixels)
    count = pixels.shape[0]
    groups = make_groups(count, seed=settings.seed + 1)
    rows = _some(count, min(count, num_generated, settings.max_manifold_pictures), seed=settings.seed + 1)
    return RealPictures(
        features=judged.features,
        groups=groups,
        manifold=_manifold(judged.features[rows], settings),
        floor=_floor(judged, labels.cpu(), groups, num_generated, settings),
    )


def measure_class_row(
    spec: ClassRowSpec,
    sample: ClassSampler,
    *,
    conditions: ClassConditions,
    real: RealPictures,
    classifier: PictureClassifier,
    settings: ClassCompareSettings,
    network_evaluations: int | None = None,
    seconds: SecondsOf | None = None,
) -> ClassRowOutcome:
    """Sample one row and return its figures.

    Args:
        spec: the row.
        sample: makes pictures.
        conditions: classes and noise, the same for every row.
        real: the real side, from `measure_real`.
        classifier: the same.
        settings: the same.
        network_evaluations: a picture, where the sampler counted them; None takes `spec.network_evaluations`.
        seconds: asked after each batch how long it took; None takes the time of the call.

    Raises:
        DataError: the sampler returned another number, size or type of pictures.
    """
    pixels, seconds_per_picture = _pictures(spec, sample, conditions, settings.batch_size, seconds)
    judged = classifier.judge(pixels)
    count, num_manifold = pixels.shape[0], real.manifold.centres.shape[0]
    groups = make_groups(count, seed=settings.seed)
    rows = _some(count, num_manifold, seed=settings.seed)
    precision, recall = precision_and_recall(_manifold(judged.features[rows], settings), real.manifold)
    result = ClassResult(
        method=spec.method,
        num_inference_steps=spec.num_inference_steps,
        w=spec.w,
        network_evaluations=spec.network_evaluations if network_evaluations is None else network_evaluations,
        fd_classifier=fd_classifier(judged.features, real.features, groups=groups, real_groups=real.groups),
        classifier_score=classifier_score(judged.probabilities, groups=groups),
        accuracy=class_accuracy(judged.probabilities, conditions.labels, groups=groups),
        precision=precision,
        recall=recall,
        seconds_per_picture=seconds_per_picture,
        num_pictures=count,
        num_manifold_pictures=num_manifold,
    )
    # Indexing copies: a view would keep every picture of the row alive.
    return ClassRowOutcome(result, pixels[conditions.shown])


def _floor(
    judged: Judged, labels: Tensor, groups: Tensor, num_generated: int, settings: ClassCompareSettings
) -> RealFloor:
    count = judged.features.shape[0]
    half = min(count // 2, num_generated)
    first, second = judged.features[_some(count, 2 * half, seed=settings.seed + 2)].split(half)
    half_groups = [make_groups(half, seed=settings.seed + offset) for offset in (0, 1)]
    some = min(half, settings.max_manifold_pictures)
    precision, recall = precision_and_recall(_manifold(first[:some], settings), _manifold(second[:some], settings))
    return RealFloor(
        fd_classifier=fd_classifier(first, second, groups=half_groups[0], real_groups=half_groups[1]),
        precision=precision,
        recall=recall,
        classifier_score=classifier_score(judged.probabilities, groups=groups),
        accuracy=class_accuracy(judged.probabilities, labels, groups=groups),
        num_pictures=count,
        num_half=half,
        num_manifold_half=some,
    )


def _manifold(features: Tensor, settings: ClassCompareSettings) -> Manifold:
    return make_manifold(features, make_groups(features.shape[0], seed=settings.seed), neighbours=settings.neighbours)


def _some(count: int, chosen: int, *, seed: int) -> Tensor:
    """Return `chosen` of `count` numbers at random: pictures may come sorted by class."""
    return torch.from_numpy(np.random.default_rng(seed).permutation(count)[:chosen])


def _pictures(
    spec: ClassRowSpec,
    sample: ClassSampler,
    conditions: ClassConditions,
    batch_size: int,
    seconds_of: SecondsOf | None,
) -> tuple[Tensor, Measured]:
    """Return all pictures of a row, and the sampler's seconds a picture."""
    parts: list[Tensor] = []
    seconds: list[float] = []
    for start in range(0, len(conditions.seeds), batch_size):
        labels, seeds = conditions.labels[start : start + batch_size], conditions.seeds[start : start + batch_size]
        began = time.perf_counter()
        pixels = sample(spec, labels, seeds)
        elapsed = time.perf_counter() - began if seconds_of is None else seconds_of(spec, seeds)
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[0] != len(seeds):
            raise DataError(
                f"{spec}: the sampler was asked for {len(seeds)} pictures, uint8 ({len(seeds)}, C, H, W), but returned "
                f"{pixels.dtype} {tuple(pixels.shape)}"
            )
        parts.append(pixels.cpu())
        # The last batch is smaller and costs more a picture.
        if len(seeds) == batch_size or not seconds:
            seconds.append(elapsed / len(seeds))
    return torch.cat(parts), _median_of(seconds)


def _median_of(seconds: Sequence[float]) -> Measured:
    """Return the median with its 95 % interval by order statistics; null under six batches, which are too few."""
    count = len(seconds)
    # The r-th smallest and the r-th largest: as far inside as leaves at most 2.5 % on either side.
    outside = int(stats.binom.ppf((1 - CONFIDENCE) / 2, count, 0.5))
    if stats.binom.cdf(outside, count, 0.5) > (1 - CONFIDENCE) / 2:
        outside -= 1
    ordered = sorted(seconds)
    interval = (ordered[outside], ordered[-1 - outside]) if outside >= 0 else None
    return Measured(value=median(seconds), interval=interval)
