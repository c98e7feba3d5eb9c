"""The charts, as SVG that stands alone: Fréchet distance, and precision and recall, against N; one panel a weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from fewstep.evaluate.chart import _log_axis
from fewstep.evaluate.classes.jackknife import Measured
from fewstep.evaluate.classes.schema import METHOD_NAMES, ClassMethod, ClassReport, MetricName

_WIDTH, _HEIGHT = 300, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 26, 38
_LEGEND_PX = 28
_COLOURS: Mapping[ClassMethod, str] = {
    "student": "#1f6feb",
    "student_stochastic": "#0a9396",
    "student_single_w": "#8250df",
    "dpmpp": "#c2571a",
    "ddim": "#8a8f98",
}
_TEACHER_COLOUR = "#12805c"
_STYLE = (
    "text{font:11px system-ui,sans-serif;fill:#667085}.title{font-weight:600;fill:#1c2330}"
    ".rule{stroke:#e4e7ec}.axis{stroke:#98a2b3}"
)

#: A number to a place in pixels.
_Axis = Callable[[float], float]


@dataclass(frozen=True)
class _Panel:
    """One small chart.

    Attributes:
        title: above it.
        series: (N, figure) of each method, N ascending.
        teacher: the many-step teacher's figure.
    """

    title: str
    series: Mapping[ClassMethod, Sequence[tuple[int, Measured]]]
    teacher: Measured | None


def frechet_chart(report: ClassReport) -> str:
    """Return fd_classifier against N, both axes logarithmic, with 95 % intervals; the teacher is a dashed line."""
    panels = [_panel(report, "fd_classifier", w, f"w = {w:g}") for w in _weights(report)]
    return _sheet(panels, columns=3, logarithmic=True, label="Fréchet distance to real pictures against steps")


def precision_recall_chart(report: ClassReport) -> str:
    """Return precision (first row of panels) and recall (second row) against N, with 95 % intervals."""
    weights = _weights(report)
    panels = [_panel(report, "precision", w, f"precision, w = {w:g}") for w in weights]
    panels += [_panel(report, "recall", w, f"recall, w = {w:g}") for w in weights]
    return _sheet(panels, columns=len(weights), logarithmic=False, label="Precision and recall against steps")


def _weights(report: ClassReport) -> list[float]:
    return sorted({row.w for row in report.results})


def _panel(report: ClassReport, metric: MetricName, w: float, title: str) -> _Panel:
    series = {}
    for method in _COLOURS:
        rows = [row for row in report.results if row.method == method and row.w == w]
        points = [(row.num_inference_steps, row.metric(metric)) for row in rows if row.metric(metric).value is not None]
        series[method] = sorted(points, key=lambda point: point[0])
    teacher = report.find("teacher", w)
    return _Panel(title, series, teacher.metric(metric) if teacher else None)


def _sheet(panels: Sequence[_Panel], *, columns: int, logarithmic: bool, label: str) -> str:
    """Return the panels side by side on common axes, with one legend above."""
    figures = [figure for panel in panels for points in panel.series.values() for _, figure in points]
    figures += [panel.teacher for panel in panels if panel.teacher is not None]
    steps = sorted({n for panel in panels for points in panel.series.values() for n, _ in points}) or [1]
    x = _log_axis(steps[0], steps[-1] * 1.001, _LEFT + 12, _WIDTH - _RIGHT - 12)
    y, ticks = _log_y(figures) if logarithmic else _share_y()
    columns = min(columns, len(panels))
    parts = [_legend(panels)]
    for index, panel in enumerate(panels):
        left, top = index % columns * _WIDTH, _LEGEND_PX + index // columns * _HEIGHT
        parts.append(f'<g transform="translate({left} {top})">{_draw(panel, x, y, steps, ticks)}</g>')
    width, height = max(columns, 2) * _WIDTH, _LEGEND_PX + -(-len(panels) // columns) * _HEIGHT
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(label)}"><style>{_STYLE}</style>{"".join(parts)}</svg>'
    )


def _log_y(figures: Sequence[Measured]) -> tuple[_Axis, list[float]]:
    values = [value for figure in figures for value in (figure.value, *(figure.interval or ())) if value]
    values = [value for value in values if value > 0] or [1.0]
    # An interval that reaches 0 has no place on a logarithmic axis; it is cut at the bottom.
    lowest = max(min(values), max(figure.value or 0.0 for figure in figures) / 1000) if figures else 1.0
    highest = max(*values, lowest)
    axis = _log_axis(lowest / 1.15, highest * 1.15, _HEIGHT - _BOTTOM, _TOP)
    return axis, _ticks(lowest, highest)


def _ticks(low: float, high: float) -> list[float]:
    """Return round numbers between; the more decades, the fewer in each, so that they do not run into one another."""
    steps = (1, 1.5, 2, 3, 5, 7) if high / low < 10 else (1, 3) if high / low < 1000 else (1,)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    values = [float(f"{step}e{decade}") for decade in decades for step in steps]
    return [value for value in values if low <= value <= high]


def _share_y() -> tuple[_Axis, list[float]]:
    bottom = _HEIGHT - _BOTTOM
    return (lambda value: round(bottom + value * (_TOP - bottom), 1)), [0, 0.25, 0.5, 0.75, 1]


def _draw(panel: _Panel, x: _Axis, y: _Axis, steps: Sequence[int], ticks: Sequence[float]) -> str:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = [f'<text class="title" x="{_LEFT}" y="{_TOP - 10}">{escape(panel.title)}</text>']
    for tick in ticks:
        parts.append(f'<line class="rule" x1="{_LEFT}" x2="{right}" y1="{y(tick)}" y2="{y(tick)}"/>')
        parts.append(f'<text x="{_LEFT - 5}" y="{y(tick) + 4}" text-anchor="end">{tick:g}</text>')
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    parts += [f'<text x="{x(n)}" y="{bottom + 14}" text-anchor="middle">{n}</text>' for n in steps]
    parts.append(f'<text x="{(_LEFT + right) / 2}" y="{bottom + 29}" text-anchor="middle">steps N</text>')
    if panel.teacher is not None and panel.teacher.value is not None:
        low, high = panel.teacher.interval or (panel.teacher.value, panel.teacher.value)
        height = max(y(low) - y(high), 1)
        parts.append(
            f'<rect x="{_LEFT}" y="{y(high)}" width="{right - _LEFT}" height="{height:.1f}" fill="{_TEACHER_COLOUR}" '
            f'opacity="0.12"/><line x1="{_LEFT}" x2="{right}" y1="{y(panel.teacher.value)}" '
            f'y2="{y(panel.teacher.value)}" stroke="{_TEACHER_COLOUR}" stroke-dasharray="5 4"/>'
        )
    for method, points in panel.series.items():
        parts.append(_series(method, points, x, y))
    return "".join(parts)


def _series(method: ClassMethod, points: Sequence[tuple[int, Measured]], x: _Axis, y: _Axis) -> str:
    colour, name = _COLOURS[method], escape(METHOD_NAMES[method])
    aside = 3 * (list(_COLOURS).index(method) - len(_COLOURS) // 2)
    places, parts = [], []
    for n, figure in points:
        if figure.value is None:
            continue
        # Side by side: intervals of one N would hide one another.
        at, level = round(x(n) + aside, 1), y(figure.value)
        places.append(f"{at},{level}")
        low, high = figure.interval or (figure.value, figure.value)
        title = f"{name}, N = {n}: {figure.value:.4g} [{low:.4g}, {high:.4g}]"
        parts.append(f'<line x1="{at}" x2="{at}" y1="{y(low)}" y2="{y(high)}" stroke="{colour}"/>')
        parts.append(f'<circle cx="{at}" cy="{level}" r="3" fill="{colour}"><title>{title}</title></circle>')
    line = f'<polyline points="{" ".join(places)}" fill="none" stroke="{colour}" stroke-width="1.5"/>' if places else ""
    return line + "".join(parts)


def _legend(panels: Sequence[_Panel]) -> str:
    there = [method for method in _COLOURS if any(panel.series[method] for panel in panels)]
    entries = [(METHOD_NAMES[method].removeprefix("teacher, "), _COLOURS[method]) for method in there]
    if any(panel.teacher is not None for panel in panels):
        entries.append((METHOD_NAMES["teacher"], _TEACHER_COLOUR))
    parts, left = [], _LEFT
    for name, colour in entries:
        parts.append(f'<circle cx="{left}" cy="12" r="4" fill="{colour}"/><text x="{left + 8}" y="16">{name}</text>')
        left += 30 + 6 * len(name)
    return "".join(parts)
