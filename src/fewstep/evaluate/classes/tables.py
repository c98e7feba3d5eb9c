"""The tables of the comparison as plain text, which the page and the markdown both draw, and the markdown itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fewstep.evaluate.classes.jackknife import Measured
from fewstep.evaluate.classes.schema import (
    METHOD_NAMES,
    ClassMethod,
    ClassReport,
    EarlyRatio,
    MetricName,
    SingleW,
    Speedup,
    TeacherMatch,
)

#: Name for people and decimal places; None = three significant digits (the scale depends on the classifier).
METRICS: Mapping[MetricName, tuple[str, int | None]] = {
    "fd_classifier": ("Fréchet distance to real pictures (fd_classifier), lower is better", None),
    "classifier_score": ("Classifier score, higher is surer and more varied", 2),
    "accuracy": ("Accuracy: share taken for the asked class", 3),
    "precision": ("Precision", 3),
    "recall": ("Recall", 3),
}
_NOTHING = "–"


@dataclass(frozen=True)
class Table:
    """A table: heading, one line of explanation, column names, rows of cells."""

    title: str
    note: str
    head: list[str]
    rows: list[list[str]]


def all_tables(report: ClassReport) -> list[Table]:
    """Return every table of the report that has rows, the figures first."""
    tables = [metric_table(report, name) for name in METRICS]
    tables += [
        cost_table(report),
        _matches(report.headline.teacher_matches),
        _speedups(report.headline.speedups),
        _early(report.headline.early_ratios),
        _singles(report.headline.single_w),
        _floor(report),
    ]
    return [table for table in tables if table.rows]


def metric_table(report: ClassReport, metric: MetricName) -> Table:
    """Return a figure's table: rows are N × method, the many-step teacher last; columns are w.

    Cells read "value [low, high]"; a row is there when one of its cells is.
    """
    title, places = METRICS[metric]
    cells = {
        (row.num_inference_steps, row.method, row.w): with_interval(row.metric(metric), places)
        for row in report.results
    }
    return _by_weight(report, cells, title=title, note="95 % intervals in brackets.")


def cost_table(report: ClassReport) -> Table:
    """Return network evaluations and time a picture, in the form of `metric_table`."""
    cells = {}
    for row in report.results:
        seconds = row.seconds_per_picture.value
        took = "" if seconds is None else f" ({seconds * 1000:.3g} ms)"
        cells[(row.num_inference_steps, row.method, row.w)] = f"{row.network_evaluations}{took}"
    note = (
        "A guided step of the teacher costs two evaluations, at w = 0 one. Times are medians over batches, "
        "taken one row after the other."
    )
    return _by_weight(report, cells, title="Network evaluations (and time) a picture", note=note)


def to_markdown(tables: Sequence[Table]) -> str:
    """Return the tables as GitHub markdown, each under a third-level heading."""
    return "\n".join(_markdown(table) for table in tables)


def with_interval(figure: Measured, places: int | None = None) -> str:
    """Return "value [low, high]", or a dash where there is no value.

    Args:
        figure: what to write.
        places: decimal places; None = as many as give the value three significant digits.
    """
    if figure.value is None:
        return _NOTHING
    form = f".{_places(figure.value) if places is None else places}f"
    if figure.interval is None:
        return format(figure.value, form)
    low, high = figure.interval
    return f"{figure.value:{form}} [{low:{form}}, {high:{form}}]"


def _places(value: float) -> int:
    size, places = abs(value), 2
    while size and size < 1 and places < 6:
        size, places = size * 10, places + 1
    return places if abs(value) < 10 else 1


def _by_weight(
    report: ClassReport, cells: Mapping[tuple[int, ClassMethod, float], str], *, title: str, note: str
) -> Table:
    weights = sorted({w for _, _, w in cells})
    methods = list(METHOD_NAMES)
    keys = sorted(
        {(steps, method) for steps, method, _ in cells},
        key=lambda key: (key[1] == "teacher", key[0], methods.index(key[1])),
    )
    rows = [
        [str(steps), METHOD_NAMES[method], *(cells.get((steps, method, w), _NOTHING) for w in weights)]
        for steps, method in keys
    ]
    return Table(title, note, ["N", "method", *(f"w = {w:g}" for w in weights)], rows)


def _matches(matches: Sequence[TeacherMatch]) -> Table:
    rows = []
    for match in matches:
        places = METRICS[match.metric][1]
        verdict = {None: _NOTHING, True: "within", False: "not worse" if match.not_worse else "worse"}[match.within]
        rows.append(
            [
                f"{match.w:g}",
                METHOD_NAMES[match.method],
                str(match.num_inference_steps),
                match.metric,
                with_interval(match.student, places),
                with_interval(match.teacher, places),
                with_interval(match.difference, places),
                verdict,
            ]
        )
    note = (
        "Is the student's value within the many-step teacher's interval? \"Not worse\" = outside on the better side. "
        "The difference is taken over pictures of one class and noise each."
    )
    head = ["w", "method", "N", "figure", "student", "teacher", "student − teacher", "verdict"]
    return Table("Students against the many-step teacher", note, head, rows)


def _speedups(speedups: Sequence[Speedup]) -> Table:
    rows = []
    for speedup in speedups:
        plain = _NOTHING
        if speedup.plain_method is not None:
            name = METHOD_NAMES[speedup.plain_method]
            plain = f"{speedup.plain_evaluation_ratio:.3g} × ({name}, {speedup.plain_steps} steps)"
        rows.append(
            [
                f"{speedup.w:g}",
                METHOD_NAMES[speedup.method],
                str(speedup.num_inference_steps),
                "distance" if speedup.equal_in == "distance" else "distance and score",
                with_interval(speedup.fd_ratio),
                with_interval(speedup.score_ratio),
                f"{speedup.evaluation_ratio:.4g} ×",
                plain,
                "yes" if speedup.certain else "no",
            ]
        )
    note = (
        "The fewest steps that equal the many-step teacher or are better (within the allowed share), by Fréchet "
        "distance alone or by distance and classifier score, and how many more evaluations the teacher needs; beside "
        "it the cheapest plain sampler that is as good. Certain = the whole interval of the ratio counts as equal."
    )
    head = [
        "w",
        "method",
        "N",
        "equal in",
        "FD, student / teacher",
        "score, student / teacher",
        "fewer evaluations",
        "than the cheapest plain sampler",
        "certain",
    ]
    return Table("As good, with fewer evaluations", note, head, rows)


def _early(ratios: Sequence[EarlyRatio]) -> Table:
    rows = [
        [
            f"{early.w:g}",
            str(early.num_inference_steps),
            METHOD_NAMES[early.baseline],
            METHOD_NAMES[early.method],
            with_interval(early.fd_ratio),
        ]
        for early in ratios
    ]
    note = (
        "Fréchet distance of the teacher's plain sampler over the student's, at one N; above 1 the student is better."
    )
    return Table("Few steps: plain samplers over students", note, ["w", "N", "baseline", "student", "FD ratio"], rows)


def _singles(pairs: Sequence[SingleW]) -> Table:
    names = {"single_w": "single w", "w_conditioned": "w-conditioned", "neither": "neither", None: _NOTHING}
    rows = [
        [
            f"{pair.w:g}",
            str(pair.num_inference_steps),
            with_interval(pair.single_w),
            with_interval(pair.w_conditioned),
            with_interval(pair.fd_ratio),
            names[pair.better],
        ]
        for pair in pairs
    ]
    note = "One student for each w against one for all; neither = the interval of their ratio holds 1."
    head = ["w", "N", "FD, single w", "FD, w-conditioned", "ratio", "better"]
    return Table("Single w against w-conditioned", note, head, rows)


def _floor(report: ClassReport) -> Table:
    floor = report.floor
    halves = f"{floor.num_half} against {floor.num_half} real pictures"
    few = f"{floor.num_manifold_half} against {floor.num_manifold_half} real pictures"
    rows = [
        ["fd_classifier", halves, with_interval(floor.fd_classifier)],
        ["precision", few, with_interval(floor.precision, 3)],
        ["recall", few, with_interval(floor.recall, 3)],
        ["classifier_score", f"{floor.num_pictures} real pictures", with_interval(floor.classifier_score, 2)],
        ["accuracy", f"{floor.num_pictures} real pictures", with_interval(floor.accuracy, 3)],
    ]
    return Table("What the figures read for real pictures", "", ["figure", "of", "value"], rows)


def _markdown(table: Table) -> str:
    # A bar would end a cell.
    lines = [table.head, ["---"] * len(table.head), *([cell.replace("|", "\\|") for cell in row] for row in table.rows)]
    body = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    note = f"{table.note}\n\n" if table.note else ""
    return f"### {table.title}\n\n{note}{body}\n"
