"""Writing the class-conditional comparison down: JSON for machines; page, tables, charts and pictures for people."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fewstep.errors import DataError
from fewstep.evaluate.classes.chart import frechet_chart, precision_recall_chart
from fewstep.evaluate.classes.compare import ClassComparison
from fewstep.evaluate.classes.grid import draw_class_grid
from fewstep.evaluate.classes.page import render_class_page
from fewstep.evaluate.classes.schema import ClassReport
from fewstep.evaluate.classes.tables import all_tables, to_markdown
from fewstep.evaluate.files import read_json_report, replace_text


@dataclass(frozen=True)
class ClassReportFiles:
    """Where the report lies.

    Attributes:
        json: report.json.
        html: report.html.
        tables: tables.md.
        charts: frechet.svg and precision_recall.svg.
        pictures: pictures_w0.3.png and so on, one for each w.
    """

    json: Path
    html: Path
    tables: Path
    charts: tuple[Path, ...]
    pictures: tuple[Path, ...]


def write_class_report(
    comparison: ClassComparison,
    folder: str | os.PathLike[str],
    *,
    class_names: Sequence[str] | None = None,
    title: str = "fewstep: class-conditional pictures",
) -> ClassReportFiles:
    """Write the report into a folder (made if need be) and return its paths.

    Args:
        comparison: from `compare_classes`.
        folder: local.
        class_names: of class 0, 1 …; None writes the numbers.
        title: heading of the page.

    Raises:
        DataError: another number of class names than classes.
    """
    report = comparison.report
    count = report.classifier.num_classes
    if class_names is not None and len(class_names) != count:
        raise DataError(
            f"{len(class_names)} class names came, but the classifier has {count} classes: one name a class"
        )
    names = class_names or [str(label) for label in range(count)]
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)

    shown = [names[label] for label in comparison.shown_labels]
    evaluations = {row.spec: row.network_evaluations for row in report.results}
    sheets, pictures = {}, []
    for w in sorted({spec.w for spec in comparison.grid}):
        rows = {spec: images for spec, images in comparison.grid.items() if spec.w == w}
        sheets[w] = draw_class_grid(rows, shown, evaluations=evaluations)
        pictures.append(root / f"pictures_w{w:g}.png")
        sheets[w].save(pictures[-1], format="PNG", optimize=True)
    charts = {
        root / "frechet.svg": frechet_chart(report),
        root / "precision_recall.svg": precision_recall_chart(report),
    }
    for path, svg in charts.items():
        replace_text(path, svg + "\n")
    files = ClassReportFiles(
        root / "report.json", root / "report.html", root / "tables.md", tuple(charts), tuple(pictures)
    )
    replace_text(files.tables, to_markdown(all_tables(report)))
    replace_text(files.html, render_class_page(report, sheets, title=title))
    # The JSON is last: who finds it finds the rest.
    replace_text(files.json, report.model_dump_json(indent=2) + "\n")
    return files


def read_class_report(path: str | os.PathLike[str]) -> ClassReport:
    """Return the report that `write_class_report` wrote.

    Raises:
        DataError: the file is missing, or is no report of this version.
    """
    return read_json_report(ClassReport, path, what="class-conditional report", remedy="run the evaluate stage")
