"""report.html: one file, nothing loaded from elsewhere, readable without knowing the field."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

from PIL import Image

from fewstep.evaluate.baselines import RowSpec
from fewstep.evaluate.chart import kid_chart
from fewstep.evaluate.distances import Interval
from fewstep.evaluate.excess import STAGE_ONE_GOAL
from fewstep.evaluate.grid import grid_order, row_label
from fewstep.evaluate.schema import Excess, Inpainting, Report, Result

PAGE_STYLE = """
:root{--ink:#1c2330;--soft:#667085;--line:#e4e7ec;--paper:#fff;--wash:#f6f8fa;--good:#12805c;--bad:#b42318}
*{box-sizing:border-box}body{margin:0;background:var(--wash);color:var(--ink);font:16px/1.55 system-ui,sans-serif}
main{max-width:1180px;margin:0 auto;padding:40px 24px 80px}h1{font-size:30px;margin:0 0 4px;letter-spacing:-.02em}
h2{font-size:20px;margin:0 0 8px}p{margin:0 0 12px;max-width:78ch}
.soft,.ci{color:var(--soft)}.ci{font-size:12px;display:block}
section{background:var(--paper);border:1px solid var(--line);border-radius:12px;padding:22px 24px;margin-top:20px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(200px,1fr));gap:14px;margin-top:22px}
.card{background:var(--paper);border:1px solid var(--line);border-radius:12px;padding:16px 18px}
.card b{display:block;font-size:27px;letter-spacing:-.02em}.card span{color:var(--soft);font-size:14px}
.wide{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums}
th{font-weight:600;text-align:right;color:var(--soft);vertical-align:bottom;font-size:13px}
td,th{padding:7px 10px;border-bottom:1px solid var(--line);white-space:nowrap}td{text-align:right}
td:first-child,th:first-child{text-align:left}td:first-child{white-space:normal;min-width:11em}
td .soft{white-space:normal}tr.student td{background:#eef5ff}tr.first td{border-top:2px solid #cbd2dc}
.good{color:var(--good);font-weight:600}.bad{color:var(--bad);font-weight:600}
img.grid{max-width:100%;height:auto;display:block;image-rendering:auto}
dl{display:grid;grid-template-columns:max-content 1fr;gap:6px 18px;margin:0;font-size:14px}
dt{font-weight:600}dd{margin:0}
svg{width:100%;max-width:820px;height:auto}.tick{font-size:12px;fill:var(--soft)}.name{font-size:13px;font-weight:600}
.rule{stroke:var(--line)}.axis{stroke:#98a2b3}.teacher{stroke:#12805c;stroke-width:1.5;stroke-dasharray:5 4}
.band{fill:#12805c;opacity:.1}code{font-size:13px;background:var(--wash);padding:1px 4px;border-radius:4px}
"""

_COLUMNS = (
    ("KID to real", "kid_lite0_to_real", "{:.4f}"),
    ("KID to teacher", "kid_lite0_to_teacher", "{:.4f}"),
    ("FD to real", "fd_lite0_to_real", "{:.1f}"),
    ("alignment", "alignment", "{:.3f}"),
    ("paired distance", "paired_mse", "{:.4f}"),
    ("ms a picture", "seconds_per_image", "{:.2f}"),
)


def render_page(report: Report, sheet: Image.Image, *, title: str) -> str:
    """Return the page as a string.

    Args:
        report: what to show.
        sheet: the picture grid.
        title: heading, for example the recipe's name.
    """
    scale = report.results[0].guidance_scale
    sections = (
        f"<h1>{escape(title)}</h1><p class='soft'>{_summary(report)}</p>",
        _cards(report),
        _section("The pictures", _pictures(sheet), _pictures_text(report)),
        _section("Quality against cost", kid_chart(report), _CHART_TEXT),
        _section("Every figure", _results_table(report), _RESULTS_TEXT),
        _section("Inside and around the holes", _holes_table(report.inpainting), _HOLES_TEXT)
        if report.inpainting
        else "",
        _section("The goals", _goals_table(report), _GOALS_TEXT),
        _section("What the figures read when nothing is wrong", _floor_table(report), ""),
        _section("What the columns mean", _glossary(scale), ""),
        _section("The stages", _stages_table(report), "") if report.stages else "",
        _section("Made with", _versions(report), ""),
    )
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width,initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{PAGE_STYLE}</style></head>"
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )


_PICTURES_TEXT = (
    "One column is one prompt and one starting noise, which all methods share. A good student repeats the top row; the "
    "teacher's plain samplers blur or break as the steps get fewer."
)
_CHART_TEXT = (
    "Lower is better, further left is cheaper. Bars are 95 % intervals, the dashed line and its band are the "
    "teacher with many steps: the best that a student can be expected to reach."
)
_RESULTS_TEXT = (
    "Below each figure is its 95 % interval. Rows of students are tinted. Lower is better, except for the alignment."
)
_HOLES_TEXT = (
    "Mean squared differences of pixels from 0 to 1; lower is better. Inside a hole a student should draw what its "
    "teacher draws from the same noise. Outside, the picture should stay what it is: nothing can do better there than "
    "the VAE, the last line. Of the distances above, KID leaves out each picture's own original; FD does not, and is "
    "smaller for it."
)
_GOALS_TEXT = (
    "Excess = KID to real minus the teacher's own with many steps: what is lost by taking fewer. Each line gives the "
    "share of the better plain sampler's loss that the student still has. At equal evaluations the plain sampler gets "
    "half the student's steps, since each of its guided steps costs two evaluations."
)


def _pictures_text(report: Report) -> str:
    prompts = report.settings.get("show", ())
    shown = len(prompts) if isinstance(prompts, list | tuple) else 0
    if not shown:
        return f"{_PICTURES_TEXT} The prompts were held out from training."
    own = "first prompt was" if shown == 1 else f"first {shown} prompts were"
    return f"{_PICTURES_TEXT} The {own} chosen to be shown and no figure counts them; any others were held out."


def _summary(report: Report) -> str:
    teacher = report.results[0]
    students = [row.num_inference_steps for row in report.results if row.method == "student"]
    return (
        f"Students of {_listed(students)} steps against their teacher ({teacher.num_inference_steps} guided steps, "
        f"{teacher.network_evaluations} network evaluations), {teacher.num_images} held-out prompts, "
        f"{report.num_real_images} real pictures, guidance scale {teacher.guidance_scale:g}."
    )


def _listed(numbers: Sequence[int]) -> str:
    words = [str(number) for number in numbers]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _cards(report: Report) -> str:
    cards = []
    clock = report.ratios.wall_clock
    if clock is not None:
        text = f"faster: {clock.student_steps} steps against {clock.teacher_steps} guided steps, side by side"
        cards.append((f"{clock.ratio:.1f} ×", text))
        text = f"network evaluations a picture (teacher {report.results[0].network_evaluations})"
        student = report.find("student", clock.student_steps)
        cards.append((str(student.network_evaluations) if student else "–", text))
    for row in report.ratios.kid_to_teachers_own:
        if row.ratio is not None and row.goal is not None:
            steps = "1 step" if row.num_inference_steps == 1 else f"{row.num_inference_steps} steps"
            cards.append((f"{row.ratio:.2f} ×", f"the teacher's distance to real pictures, with {steps}"))
    body = "".join(f"<div class='card'><b>{value}</b><span>{escape(text)}</span></div>" for value, text in cards)
    return f"<div class='cards'>{body}</div>"


def _section(heading: str, body: str, text: str) -> str:
    paragraph = f"<p class='soft'>{escape(text)}</p>" if text else ""
    return f"<section><h2>{escape(heading)}</h2>{paragraph}<div class='wide'>{body}</div></section>"


def _pictures(sheet: Image.Image) -> str:
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    alt = "Pictures by method and steps (rows) and prompt (columns)"
    return f"<img class='grid' alt='{alt}' src='data:image/png;base64,{data}'>"


def _table(head: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Return a table; each row is (CSS classes, cells that are HTML already)."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(f"<tr class='{css}'>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>" for css, cells in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _with_interval(value: float | None, interval: Interval | None, form: str, *, factor: float = 1.0) -> str:
    if value is None:
        return "<span class='soft'>–</span>"
    text = form.format(value * factor)
    if interval is None:
        return text
    low, high = (form.format(bound * factor) for bound in interval)
    return f"{text}<span class='ci'>{low} … {high}</span>"


def _results_table(report: Report) -> str:
    by_spec = {RowSpec(row.method, row.num_inference_steps): row for row in report.results}
    rows = []
    for group in grid_order(list(by_spec)):
        for position, spec in enumerate(group):
            css = f"{'student' if spec.method == 'student' else ''}{' first' if position == 0 else ''}"
            rows.append((css, _result_cells(spec, by_spec[spec])))
    return _table(["method", "evaluations", *(name for name, _, _ in _COLUMNS), "pictures"], rows)


def _result_cells(spec: RowSpec, row: Result) -> list[str]:
    cells = [escape(row_label(spec)), str(row.network_evaluations)]
    for _, field, form in _COLUMNS:
        factor = 1000.0 if field == "seconds_per_image" else 1.0
        cells.append(_with_interval(getattr(row, field), getattr(row, f"{field}_ci"), form, factor=factor))
    return [*cells, str(row.num_images)]


def _holes_table(inpainting: Inpainting) -> str:
    rows = []
    for row in inpainting.results:
        label = escape(row_label(RowSpec(row.method, row.num_inference_steps)))
        hole = _with_interval(row.hole_mse, row.hole_mse_ci, "{:.5f}")
        known = _with_interval(row.known_mse, row.known_mse_ci, "{:.5f}")
        rows.append(("student" if row.method == "student" else "", [label, hole, known]))
    vae = _with_interval(inpainting.vae_known_mse, inpainting.vae_known_mse_ci, "{:.5f}")
    rows.append(("first", ["real pictures through the VAE and back", "", vae]))
    share = f"inside, to the teacher's picture ({inpainting.hole_share:.0%} of a picture is hole)"
    return _table(["method", share, "outside, to the real picture"], rows)


def _verdict(met: bool | None) -> str:
    if met is None:
        return "<span class='soft'>none set</span>"
    return "<span class='good'>met</span>" if met else "<span class='bad'>not met</span>"


def _goals_table(report: Report) -> str:
    rows: list[tuple[str, list[str]]] = []
    for excess in report.ratios.excess:
        rows.append(("", _excess_cells(excess)))
    for kid in report.ratios.kid_to_teachers_own:
        goal = "" if kid.goal is None else f"≤ {kid.goal:.2f}"
        rows.append(
            (
                "",
                [
                    f"{kid.num_inference_steps}: KID to real over the teacher's own",
                    _with_interval(kid.ratio, kid.ratio_ci, "{:.3f}"),
                    goal,
                    _verdict(kid.met),
                ],
            )
        )
    clock = report.ratios.wall_clock
    if clock is not None:
        name = f"{clock.student_steps}: wall clock, teacher over student ({clock.evaluation_ratio:g} × evaluations)"
        value = _with_interval(clock.ratio, clock.ratio_ci, "{:.1f}")
        rows.append(("", [name, value, f"≥ {clock.goal:g}", _verdict(clock.met)]))
    if report.stage_one_relative_error is not None:
        name = "stage one: relative error of v against the guided pair, held-out prompts (in a short demo ≤ 10 %)"
        met = report.stage_one_relative_error <= STAGE_ONE_GOAL
        rows.append(("", [name, f"{report.stage_one_relative_error:.1%}", f"≤ {STAGE_ONE_GOAL:.0%}", _verdict(met)]))
    return _table(["student's steps: what", "value", "goal", ""], rows)


def _excess_cells(excess: Excess) -> list[str]:
    at = "equal evaluations" if excess.at == "equal_evaluations" else "equal steps"
    against = row_label(RowSpec(excess.baseline_method, excess.baseline_steps))
    goal = "" if excess.goal is None else f"≤ {excess.goal:.2f}"
    value = _with_interval(excess.ratio, excess.ratio_ci, "{:.3f}")
    if excess.ratio is None:
        value = "<span class='soft'>not shown: the plain sampler's excess is within the noise</span>"
    detail = f"excess {excess.student_excess:.4f} against {excess.baseline_excess:.4f}"
    name = (
        f"{excess.num_inference_steps}: share of the excess at {at} ({escape(against)})<span class='ci'>{detail}</span>"
    )
    return [name, value, goal, _verdict(excess.met)]


def _floor_table(report: Report) -> str:
    floor = report.floor
    halves = f"real against real, {floor.num_images} pictures a side"
    rows = [
        ("", [f"KID, {halves}", _with_interval(floor.kid_lite0, floor.kid_lite0_ci, "{:.4f}")]),
        ("", [f"FD, {halves}", _with_interval(floor.fd_lite0, floor.fd_lite0_ci, "{:.1f}")]),
        (
            "",
            [
                "KID, real pictures through the VAE and back",
                _with_interval(floor.vae_kid_lite0, floor.vae_kid_lite0_ci, "{:.4f}"),
            ],
        ),
        (
            "",
            [
                "alignment, real pictures with their captions",
                _with_interval(floor.alignment, floor.alignment_ci, "{:.3f}"),
            ],
        ),
    ]
    return _table(["", "value"], rows)


def _glossary(guidance_scale: float) -> str:
    entries = {
        "DDIM, DPM-Solver++": "The teacher itself, guided, with a plain sampler and few steps: what one has without "
        "distillation. At 1 and 2 steps the two are the same.",
        "evaluations": "Runs of the U-Net for one picture, counted while sampling. A guided step of the teacher needs "
        "two (with and without the prompt), a step of the student one.",
        "guidance scale": f"g = {guidance_scale:g} here, as in diffusers: how strongly the prompt is followed. The "
        f"paper writes w = g − 1 = {guidance_scale - 1:g}; the student gets w as an input, so it serves a range.",
        "KID to real": "kid_lite0: squared kernel distance between the features of two sets of pictures, unbiased, so "
        "it may be slightly negative. The features are EfficientNet-Lite0's, not those of the usual KID: compare "
        "within this report only.",
        "KID to teacher": "The same to the teacher's own pictures, of the same prompts and noise.",
        "FD to real": "fd_lite0: Fréchet distance on the same features. It falls as the number of pictures grows: look "
        "at the real-against-real value, and compare equal counts only. It is not FID.",
        "alignment": "alignment_lite0_minilm: how well a small scorer, trained on pictures that no generator here has "
        "seen, finds the prompt in the picture (mean cosine). It is not a CLIP score.",
        "paired distance": "Mean squared difference of the latents to the teacher's picture of the same prompt and "
        "noise: how exactly the student repeats its teacher.",
        "ms a picture": "Network and sampler on this machine, all methods in turn in one process at one batch size; "
        "the median of the rounds and their range.",
        "95 % interval": "For KID, alignment and the paired distance: bootstrap over prompts and real pictures, with "
        "draws shared by all rows. For FD: jackknife over ten groups. For times: the range of the rounds.",
    }
    body = "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in entries.items())
    return f"<dl>{body}</dl>"


def _stages_table(report: Report) -> str:
    rows = []
    for stage in report.stages:
        memory = "–" if stage.peak_memory_bytes is None else f"{stage.peak_memory_bytes / 1e9:.2f} GB"
        note = "done in an earlier run" if stage.skipped else ""
        rows.append(("", [escape(stage.name), f"{stage.seconds:.1f} s", memory, note]))
    return _table(["stage", "time", "peak memory", ""], rows)


def _versions(report: Report) -> str:
    versions = ", ".join(f"{escape(name)} {escape(number)}" for name, number in report.versions.items())
    settings = ", ".join(f"{escape(name)} = {escape(str(value))}" for name, value in report.settings.items())
    return f"<p>{versions}</p><p class='soft'>{settings}</p>"
