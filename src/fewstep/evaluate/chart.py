"""The report's one chart, as inline SVG: distance to real pictures against network evaluations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from fewstep.evaluate.schema import Report, Result

_WIDTH, _HEIGHT = 720, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 14, 46
_SERIES = (("student", "student", "#1f6feb"), ("dpmpp", "DPM-Solver++", "#c2571a"), ("ddim", "DDIM", "#8a8f98"))


def kid_chart(report: Report) -> str:
    """Return an SVG of kid_lite0_to_real against network evaluations, both axes logarithmic, with 95 % intervals."""
    rows = [row for row in report.results if row.kid_lite0_to_real is not None]
    values = [value for row in rows for value in (_kid(row), *_interval(row)) if value > 0]
    if not values:
        return ""
    # A row at or below the floor's size cannot be told from zero; a logarithm would stretch that noise.
    lowest = max(min(values), max(values) / 1000)
    x = _log_axis(1, max(row.network_evaluations for row in rows) * 1.2, _LEFT + 20, _WIDTH - _RIGHT)
    y = _log_axis(lowest / 1.15, max(values) * 1.15, _HEIGHT - _BOTTOM, _TOP)
    parts = [*_frame(x, y, lowest, max(values), [row.network_evaluations for row in rows])]
    teacher = report.find("teacher")
    if teacher is not None and teacher.kid_lite0_to_real is not None:
        parts += _reference(y, teacher)
    for method, name, colour in _SERIES:
        series = sorted((row for row in rows if row.method == method), key=lambda row: row.network_evaluations)
        parts += _series(x, y, series, name, colour)
    parts += _legend()
    body = "".join(parts)
    label = "Distance to real pictures against network evaluations a picture"
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{body}</svg>'


def _log_axis(low: float, high: float, start_px: float, end_px: float) -> Callable[[float], float]:
    span = math.log(high / low)

    def to_px(value: float) -> float:
        share = math.log(min(max(value, low), high) / low) / span
        return round(start_px + share * (end_px - start_px), 1)

    return to_px


def _frame(
    x: Callable[[float], float], y: Callable[[float], float], lowest: float, highest: float, evaluations: Sequence[int]
) -> list[str]:
    bottom = _HEIGHT - _BOTTOM
    parts = []
    for value in _round_values(lowest, highest):
        parts.append(f'<line class="rule" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(value)}" y2="{y(value)}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{y(value) + 4}" text-anchor="end">{value:g}</text>')
    for count in sorted(set(evaluations)):
        parts.append(f'<text class="tick" x="{x(count)}" y="{bottom + 16}" text-anchor="middle">{count}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(
        f'<text class="tick" x="{middle}" y="{_HEIGHT - 8}" text-anchor="middle">network evaluations a picture</text>'
    )
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    return parts


def _reference(y: Callable[[float], float], teacher: Result) -> list[str]:
    low, high = _interval(teacher)
    right, top, bottom = _WIDTH - _RIGHT, y(high), y(low)
    level = y(_kid(teacher))
    return [
        f'<rect class="band" x="{_LEFT}" y="{top}" width="{right - _LEFT}" height="{max(bottom - top, 1):.1f}"/>',
        f'<line class="teacher" x1="{_LEFT}" x2="{right}" y1="{level}" y2="{level}"/>',
        f'<text class="tick" x="{right - 4}" y="{level - 6}" text-anchor="end">'
        f"teacher, {teacher.num_inference_steps} guided steps</text>",
    ]


def _legend() -> list[str]:
    parts = []
    for line, (_, name, colour) in enumerate(_SERIES):
        left, level = _WIDTH - _RIGHT - 130, _TOP + 14 + 20 * line
        parts.append(f'<circle cx="{left}" cy="{level - 4}" r="4.5" fill="{colour}"/>')
        parts.append(f'<text class="name" x="{left + 12}" y="{level}" fill="{colour}">{name}</text>')
    return parts


def _series(
    x: Callable[[float], float], y: Callable[[float], float], rows: Sequence[Result], name: str, colour: str
) -> list[str]:
    if not rows:
        return []
    points = " ".join(f"{x(row.network_evaluations)},{y(_kid(row))}" for row in rows)
    parts = [f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>']
    for row in rows:
        low, high = _interval(row)
        at, level = x(row.network_evaluations), y(_kid(row))
        parts.append(f'<line x1="{at}" x2="{at}" y1="{y(low)}" y2="{y(high)}" stroke="{colour}" stroke-width="1.5"/>')
        title = f"{name}, {row.num_inference_steps} steps: {_kid(row):.4f} [{low:.4f}, {high:.4f}]"
        parts.append(f'<circle cx="{at}" cy="{level}" r="4.5" fill="{colour}"><title>{title}</title></circle>')
    return parts


def _round_values(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    values = [step * 10.0**decade for decade in decades for step in (1, 1.5, 2, 3, 5, 7)]
    return [value for value in values if low <= value <= high]


def _kid(row: Result) -> float:
    assert row.kid_lite0_to_real is not None, "rows without the figure are left out before"
    return row.kid_lite0_to_real


def _interval(row: Result) -> tuple[float, float]:
    return row.kid_lite0_to_real_ci or (_kid(row), _kid(row))
