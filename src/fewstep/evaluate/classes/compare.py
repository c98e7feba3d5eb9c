"""The whole class-conditional comparison: the shape of the paper's Table 1, on pictures that fit a small machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from fewstep.errors import DataError
from fewstep.evaluate.classes.classifier import FEATURE_DIM, PictureClassifier
from fewstep.evaluate.classes.headline import compute_headline
from fewstep.evaluate.classes.rows import (
    ClassConditions,
    ClassRowOutcome,
    ClassSampler,
    SecondsOf,
    make_class_conditions,
    measure_class_row,
    measure_real,
)
from fewstep.evaluate.classes.schema import METHOD_NAMES, ClassifierFacts, ClassReport, ClassRowSpec, RealFloor
from fewstep.evaluate.classes.settings import ClassCompareSettings
from fewstep.evaluate.compare import installed_versions

#: Guidance weights and steps of the paper's Table 1 (and of its curves: w = 2).
TABLE_WEIGHTS = (0.0, 0.3, 1.0, 2.0, 4.0)
TABLE_STEPS = (1, 2, 4, 8, 16)

#: (what was done, rows done, rows in all)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ClassComparison:
    """What `compare_classes` returns.

    Attributes:
        report: for report.json.
        grid: the shown pictures by row, uint8 (K, C, H, W).
        shown_labels: the K classes of the grid.
    """

    report: ClassReport
    grid: dict[ClassRowSpec, Tensor]
    shown_labels: tuple[int, ...]


def table_specs(
    *,
    reference_steps: int,
    weights: Sequence[float] = TABLE_WEIGHTS,
    steps: Sequence[int] = TABLE_STEPS,
    single_w: Sequence[float] | None = None,
    stochastic: bool = True,
) -> list[ClassRowSpec]:
    """Return all rows of the table: for each w the many-step teacher, then for each N students and plain samplers.

    Args:
        reference_steps: of the many-step teacher.
        weights: guidance weights w.
        steps: N of the students and the plain samplers.
        single_w: weights for which there is a single-w student; None = all.
        stochastic: whether there are students for the stochastic sampler.

    Raises:
        SamplingError: a number of steps or a weight that cannot be.
        DataError: a weight of `single_w` that is not among `weights`.
    """
    singles = set(weights if single_w is None else single_w)
    if not singles <= set(weights):
        raise DataError(
            f"single_w={sorted(singles)} has weights that weights={list(weights)} has not: a single-w student is "
            "compared with the others at its own weight, so add it there"
        )
    rows = []
    for w in weights:
        rows.append(ClassRowSpec("teacher", reference_steps, w))
        for count in steps:
            for method in METHOD_NAMES:
                missing = (method == "student_single_w" and w not in singles) or (
                    method == "student_stochastic" and not stochastic
                )
                if method != "teacher" and not missing:
                    rows.append(ClassRowSpec(method, count, w))
    return rows


def compare_classes(
    sample: ClassSampler,
    specs: Sequence[ClassRowSpec],
    labels: Tensor,
    *,
    seeds: Sequence[int],
    classifier: PictureClassifier,
    real_pictures: Tensor,
    real_labels: Tensor,
    settings: ClassCompareSettings | None = None,
    network_evaluations: Mapping[ClassRowSpec, int] | None = None,
    seconds: SecondsOf | None = None,
    progress: Progress | None = None,
) -> ClassComparison:
    """Measure every row on the same classes and noise, and compare.

    Args:
        sample: makes the pictures of a batch of a row.
        specs: the rows, for example from `table_specs`.
        labels: asked classes, (N,) int64, N ≥ 20; usually equally many of each.
        seeds: of the starting noise, N different ones.
        classifier: fitted, on other pictures than the real ones here.
        real_pictures: uint8, (M, C, H, W), M ≥ 40. The Fréchet distance's bias depends on N and M: keep both.
        real_labels: their classes, (M,).
        settings: of the comparison.
        network_evaluations: a picture, of rows where the sampler counted them; the others get the spec's own number.
        seconds: how long a batch took, for a sampler that may have its pictures from earlier; see `measure_class_row`.
        progress: called after every row.

    Raises:
        DataError: rows that repeat, a w with two many-step teachers, or pictures, labels or seeds that do not fit.
    """
    settings = settings or ClassCompareSettings()
    _check_specs(specs)
    conditions = make_class_conditions(labels, seeds, classifier=classifier, settings=settings)
    real = measure_real(classifier, real_pictures, real_labels, num_generated=len(conditions.seeds), settings=settings)
    counted = network_evaluations or {}
    outcomes = []
    for spec in specs:
        outcome = measure_class_row(
            spec,
            sample,
            conditions=conditions,
            real=real,
            classifier=classifier,
            settings=settings,
            network_evaluations=counted.get(spec),
            seconds=seconds,
        )
        outcomes.append(outcome)
        if progress is not None:
            progress(f"{spec} measured", len(outcomes), len(specs))
    return assemble_classes(outcomes, conditions=conditions, floor=real.floor, classifier=classifier, settings=settings)


def assemble_classes(
    outcomes: Sequence[ClassRowOutcome],
    *,
    conditions: ClassConditions,
    floor: RealFloor,
    classifier: PictureClassifier,
    settings: ClassCompareSettings,
) -> ClassComparison:
    """Put rows that were measured anywhere together into a comparison.

    Args:
        outcomes: rows of one `conditions`, real side and classifier.
        conditions: of all rows.
        floor: of the real side.
        classifier: that judged.
        settings: of the comparison.

    Raises:
        DataError: rows that repeat, or a w with two many-step teachers.
    """
    results = [outcome.result for outcome in outcomes]
    _check_specs([result.spec for result in results])
    counts = conditions.labels.bincount(minlength=classifier.num_classes)
    report = ClassReport(
        results=results,
        floor=floor,
        headline=compute_headline(results, settings),
        classifier=ClassifierFacts(
            fingerprint=classifier.fingerprint,
            channels=classifier.channels,
            resolution=classifier.resolution,
            num_classes=classifier.num_classes,
            feature_dim=FEATURE_DIM,
            settings=classifier.settings.model_dump(mode="json"),
        ),
        settings=settings,
        pictures_per_class=counts.tolist(),
        noise_seeds=_runs(conditions.seeds),
        versions=installed_versions(),
    )
    grid = {outcome.result.spec: outcome.shown for outcome in outcomes}
    return ClassComparison(report, grid, tuple(conditions.labels[conditions.shown].tolist()))


def _check_specs(specs: Sequence[ClassRowSpec]) -> None:
    if not specs:
        raise DataError("no rows came to compare; table_specs(reference_steps=…) gives those of the paper's table")
    repeated = sorted({str(spec) for spec in specs if list(specs).count(spec) > 1})
    if repeated:
        raise DataError(f"each row may come once, but these repeat: {'; '.join(repeated)}")
    teachers = [spec.w for spec in specs if spec.method == "teacher"]
    if len(set(teachers)) != len(teachers):
        raise DataError(
            f"there is one many-step teacher a weight, but the rows have them at w = {sorted(teachers)}: "
            'put the shorter ones in as method "ddim"'
        )


def _runs(seeds: Sequence[int]) -> list[tuple[int, int]]:
    """Return whole numbers in order as half-open runs: 5, 6, 7, 1 → (5, 8), (1, 2)."""
    runs: list[tuple[int, int]] = []
    for seed in seeds:
        if runs and runs[-1][1] == seed:
            runs[-1] = (runs[-1][0], seed + 1)
        else:
            runs.append((seed, seed + 1))
    return runs
