"""report.html of the class-conditional comparison: one file, nothing loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from PIL import Image

from fewstep.evaluate.classes.chart import frechet_chart, precision_recall_chart
from fewstep.evaluate.classes.schema import METHOD_NAMES, ClassReport
from fewstep.evaluate.classes.tables import METRICS, Table, all_tables
from fewstep.evaluate.page import PAGE_STYLE, _pictures, _section, _table

_MORE_STYLE = "svg{max-width:none}td:nth-child(2),th:nth-child(2){text-align:left}h3{font-size:15px;margin:18px 0 6px}"

_PICTURES_TEXT = (
    "One column is one class and one starting noise, which all rows of all weights share. A good student repeats the "
    "top row; the teacher's plain samplers blur or break as the steps get fewer."
)
_CHART_TEXT = "Lower is better. Bars are 95 % intervals; the dashed line and its band are the teacher with many steps."
_PRECISION_TEXT = (
    "Precision: how many generated pictures look real. Recall: how much of the real variety is generated. Guidance "
    "buys precision with recall."
)


def render_class_page(report: ClassReport, sheets: Mapping[float, Image.Image], *, title: str) -> str:
    """Return the page as a string.

    Args:
        report: what to show.
        sheets: the picture grid of each w.
        title: heading.
    """
    tables = all_tables(report)
    titles = {heading for heading, _ in METRICS.values()}
    figures = [table for table in tables if table.title in titles]
    pictures = "".join(f"<h3>w = {w:g}</h3>{_pictures(sheet)}" for w, sheet in sorted(sheets.items()))
    sections = (
        f"<h1>{escape(title)}</h1><p class='soft'>{escape(_summary(report))}</p>",
        _cards(report),
        _section("The pictures", pictures, _PICTURES_TEXT),
        _section("Fréchet distance against steps", frechet_chart(report), _CHART_TEXT),
        _section("Precision and recall against steps", precision_recall_chart(report), _PRECISION_TEXT),
        *(_table_section(table) for table in tables if table not in figures),
        *(_table_section(table) for table in figures),
        _section("What the figures are", _glossary(report), ""),
        _section("Made with", _made_with(report), ""),
    )
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width,initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{PAGE_STYLE}{_MORE_STYLE}</style></head>"
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )


def _summary(report: ClassReport) -> str:
    weights = ", ".join(f"{w:g}" for w in sorted({row.w for row in report.results}))
    count = report.results[0].num_pictures
    return (
        f"{len(report.results)} rows of {count} pictures in {report.classifier.num_classes} classes, each picture with "
        f"the same class and starting noise in every row, against {report.floor.num_pictures} real pictures; guidance "
        f"weights w = {weights} (guidance_scale = 1 + w)."
    )


def _cards(report: ClassReport) -> str:
    cards = []
    best = report.headline.largest_speedup
    if best is not None:
        text = (
            f"fewer network evaluations than the many-step teacher at an equal or better Fréchet distance and score: "
            f"{METHOD_NAMES[best.method]}, N = {best.num_inference_steps}, w = {best.w:g}"
        )
        cards.append((f"{best.evaluation_ratio:.4g} ×", text))
    matches = [match for match in report.headline.teacher_matches if match.metric == "fd_classifier"]
    if matches:
        good = sum(bool(match.not_worse) for match in matches)
        steps = " and ".join(str(n) for n in sorted({match.num_inference_steps for match in matches}))
        text = f"students of {steps} steps not outside the teacher's interval of the Fréchet distance for the worse"
        cards.append((f"{good} of {len(matches)}", text))
    pairs = [pair for pair in report.headline.single_w if pair.better is not None]
    if pairs:
        worse = sum(pair.better == "single_w" for pair in pairs)
        cards.append((f"{worse} of {len(pairs)}", "pairs in which a student of one w beats the one for all w"))
    body = "".join(f"<div class='card'><b>{value}</b><span>{escape(text)}</span></div>" for value, text in cards)
    return f"<div class='cards'>{body}</div>"


def _table_section(table: Table) -> str:
    rows = [("", [escape(cell) for cell in row]) for row in table.rows]
    return _section(table.title, _table(table.head, rows), table.note)


def _glossary(report: ClassReport) -> str:
    facts, some = report.classifier, report.results[0].num_manifold_pictures
    entries = {
        "classifier": "A small network trained on real pictures of this data set, fingerprint "
        f"{facts.fingerprint}. The figures compare under this fingerprint only.",
        "fd_classifier": f"Fréchet distance on its {facts.feature_dim} features. It is not FID. Its bias falls as the "
        "number of pictures grows: look at the real-against-real value, and compare equal counts only.",
        "classifier score": f"exp(mean KL(p(y|x) ‖ p(y))), 1 to {facts.num_classes}: the form of the Inception score "
        "with this classifier's probabilities. It rewards clear pictures, also where they are unlike the data.",
        "accuracy": "Share of pictures that the classifier takes for the class that was asked for.",
        "precision, recall": f"Share of generated pictures in the manifold of real ones, and the reverse; balls that "
        f"reach {report.settings.neighbours} neighbours, {some} pictures a side.",
        "w": "The paper's guidance weight; diffusers' guidance_scale is 1 + w. At w = 0 the teacher is not guided and "
        "one evaluation a step is counted, not two.",
        "95 % interval": "Jackknife over ten groups of pictures, shared by all rows, so that ratios and differences "
        "are sharper than their parts. It is the random error at these counts under one classifier and one training "
        "run of each network: that of other trainings is not in it.",
    }
    body = "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in entries.items())
    return f"<dl>{body}</dl>"


def _made_with(report: ClassReport) -> str:
    versions = ", ".join(f"{escape(name)} {escape(number)}" for name, number in report.versions.items())
    settings = report.settings.model_dump() | {"classifier": report.classifier.settings}
    seeds = ", ".join(f"{start} … {stop - 1}" for start, stop in report.noise_seeds[:5])
    more = " and more" if len(report.noise_seeds) > 5 else ""
    text = ", ".join(f"{escape(name)} = {escape(str(value))}" for name, value in settings.items())
    return f"<p>{versions}</p><p class='soft'>noise seeds {seeds}{more}; {text}</p>"
