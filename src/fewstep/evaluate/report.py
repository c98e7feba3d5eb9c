"""Writing a comparison down: report.json for machines, report.html and samples.png for people."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fewstep.evaluate.baselines import RowSpec
from fewstep.evaluate.compare import Comparison
from fewstep.evaluate.files import read_json_report, replace_text
from fewstep.evaluate.grid import draw_grid
from fewstep.evaluate.page import render_page
from fewstep.evaluate.schema import Report, StageUsage


@dataclass(frozen=True)
class ReportFiles:
    """Where the report lies."""

    json: Path
    html: Path
    samples: Path


def write_report(
    comparison: Comparison,
    folder: str | os.PathLike[str],
    *,
    stages: Sequence[StageUsage] = (),
    title: str = "fewstep report",
) -> ReportFiles:
    """Write report.json, report.html and samples.png into a folder (made if need be) and return their paths.

    Args:
        comparison: from `compare`.
        folder: local.
        stages: what the workflow's stages took.
        title: heading of the page.
    """
    files = ReportFiles(*(Path(folder) / name for name in ("report.json", "report.html", "samples.png")))
    files.json.parent.mkdir(parents=True, exist_ok=True)
    report = comparison.report.model_copy(update={"stages": list(stages)})
    evaluations = {RowSpec(row.method, row.num_inference_steps): row.network_evaluations for row in report.results}
    sheet = draw_grid(comparison.grid, comparison.prompts, evaluations=evaluations, given=comparison.given)
    sheet.save(files.samples, format="PNG", optimize=True)
    replace_text(files.html, render_page(report, sheet, title=title))
    # The JSON is last: who finds it finds the rest.
    replace_text(files.json, report.model_dump_json(indent=2) + "\n")
    return files


def read_report(path: str | os.PathLike[str]) -> Report:
    """Return the report that `write_report` wrote.

    Raises:
        DataError: the file is missing, or is no report of this version.
    """
    return read_json_report(Report, path, what="report", remedy="run the evaluate stage")
