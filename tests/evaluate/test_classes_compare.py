"""A whole comparison of fake samplers on scikit-learn's digits, and what is written of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image
from tests.evaluate.class_pictures import fake_sampler, fitted_classifier, real_digits
from torch import Tensor

from fewstep.errors import DataError
from fewstep.evaluate.classes.compare import ClassComparison, compare_classes, table_specs
from fewstep.evaluate.classes.report import read_class_report, write_class_report
from fewstep.evaluate.classes.rows import _median_of
from fewstep.evaluate.classes.schema import ClassRowSpec
from fewstep.evaluate.classes.settings import ClassCompareSettings
from fewstep.evaluate.classes.tables import all_tables, metric_table, to_markdown

LABELS = torch.arange(200) % 10
SEEDS = range(1000, 1200)
COLLAPSED = ClassRowSpec("student", 4, 100.0)
SPECS = [*table_specs(reference_steps=32, weights=(0.0, 1.0), steps=(1, 4), single_w=(1.0,)), COLLAPSED]
SETTINGS = ClassCompareSettings(batch_size=40, grid_columns=4)


def compared(specs: Sequence[ClassRowSpec] = SPECS, **changes: object) -> ClassComparison:
    real_pictures, real_labels = real_digits()
    arguments = {
        "sample": fake_sampler,
        "labels": LABELS,
        "seeds": SEEDS,
        "classifier": fitted_classifier(),
        "real_pictures": real_pictures,
        "real_labels": real_labels,
        "settings": SETTINGS,
    } | changes
    return compare_classes(specs=specs, **arguments)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def comparison() -> ClassComparison:
    return compared(network_evaluations={ClassRowSpec("ddim", 4, 0.0): 8})


def value(comparison: ClassComparison, spec: ClassRowSpec, metric: str) -> float:
    found = comparison.report.find(spec.method, spec.w, spec.num_inference_steps)
    assert found is not None
    figure = found.metric(metric)  # type: ignore[arg-type]
    assert figure.value is not None
    return figure.value


def test_every_row_has_every_figure_inside_its_interval(comparison: ClassComparison) -> None:
    report = comparison.report
    assert [row.spec for row in report.results] == SPECS
    for row in report.results:
        for name in ("fd_classifier", "classifier_score", "accuracy", "precision", "recall"):
            figure = row.metric(name)  # type: ignore[arg-type]
            assert figure.value is not None
            assert figure.interval is not None
            assert figure.interval[0] <= figure.value <= figure.interval[1]
            assert len(figure.left_out) == 10
        assert (row.num_pictures, row.num_manifold_pictures) == (200, 200)
        assert row.seconds_per_picture.value is not None
        counted = 8 if row.spec == ClassRowSpec("ddim", 4, 0.0) else row.spec.network_evaluations
        assert row.network_evaluations == counted
    assert report.noise_seeds == [(1000, 1200)]
    assert report.pictures_per_class == [20] * 10
    assert report.classifier.fingerprint == fitted_classifier().fingerprint
    assert "torch" in report.versions


def test_real_blurred_and_one_class_pictures_read_as_they_should(comparison: ClassComparison) -> None:
    teacher, student = ClassRowSpec("teacher", 32, 1.0), ClassRowSpec("student", 1, 1.0)
    blurred, floor = ClassRowSpec("ddim", 1, 1.0), comparison.report.floor
    order = [teacher, student, ClassRowSpec("dpmpp", 1, 1.0), blurred]
    fd = [value(comparison, spec, "fd_classifier") for spec in order]
    assert fd == sorted(fd), "the more it is blurred, the further from real pictures"
    assert fd[3] > 10 * fd[0]
    assert floor.fd_classifier.value is not None
    assert fd[0] < 3 * floor.fd_classifier.value, "real pictures of other writers are near the floor"
    assert value(comparison, teacher, "accuracy") > 0.9
    assert value(comparison, teacher, "precision") > 0.7
    assert value(comparison, teacher, "classifier_score") > 8
    assert value(comparison, blurred, "precision") < 0.5

    assert value(comparison, COLLAPSED, "accuracy") == pytest.approx(0.1), "right for the one class that it makes"
    assert value(comparison, COLLAPSED, "classifier_score") == pytest.approx(1.0, abs=1e-6)
    assert value(comparison, COLLAPSED, "recall") < 0.05
    assert value(comparison, COLLAPSED, "fd_classifier") > fd[0]


def test_headline(comparison: ClassComparison) -> None:
    headline = comparison.report.headline
    early = {
        (early.method, early.baseline, early.num_inference_steps, early.w): early for early in headline.early_ratios
    }
    gain = early["student", "ddim", 1, 1.0].fd_ratio
    assert gain.interval is not None
    assert gain.interval[0] > 1, "at one step DDIM is blurred and the student hardly"
    singles = {pair.num_inference_steps: pair for pair in headline.single_w}
    assert singles[1].better == "neither", "both blur alike"
    assert singles[4].fd_ratio.value is not None
    assert singles[4].fd_ratio.value > 1
    assert {(match.w, match.num_inference_steps) for match in headline.teacher_matches} == {(0.0, 4), (1.0, 4)}
    perfect = [match for match in headline.teacher_matches if match.method == "student"]
    assert [(match.within, match.difference.value) for match in perfect] == [(True, 0.0)] * 4
    best = headline.largest_speedup
    assert best is not None
    assert (best.method, best.num_inference_steps, best.w, best.evaluation_ratio) == ("student", 4, 1.0, 64 / 4)
    assert best.certain
    assert best.fd_ratio.value == 1.0


def test_same_inputs_same_figures_in_any_batch_size(comparison: ClassComparison) -> None:
    specs = [ClassRowSpec("teacher", 32, 1.0), ClassRowSpec("student", 1, 1.0)]
    again = compared(specs, settings=SETTINGS.model_copy(update={"batch_size": 33}))
    for row in again.report.results:
        before = comparison.report.find(row.method, row.w, row.num_inference_steps)
        assert before is not None
        assert row.model_dump(exclude={"seconds_per_picture"}) == before.model_dump(exclude={"seconds_per_picture"})


def test_manifolds_take_equal_counts_and_seeds_are_told_in_runs() -> None:
    real_pictures, real_labels = real_digits()
    seeds = [5, 6, 7, *range(50, 247)]
    outcome = compared(
        SPECS[:2], seeds=seeds, real_pictures=real_pictures[:60], real_labels=real_labels[:60], progress=None
    ).report
    assert {row.num_manifold_pictures for row in outcome.results} == {60}
    assert outcome.noise_seeds == [(5, 8), (50, 247)]
    assert (outcome.floor.num_pictures, outcome.floor.num_half) == (60, 30)


def test_written_report_is_whole_and_reads_back(comparison: ClassComparison, tmp_path: Path) -> None:
    names = [f"digit <{label}>" for label in range(10)]
    files = write_class_report(comparison, tmp_path / "report", class_names=names, title="Digits & <more>")
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == [
        "frechet.svg",
        "pictures_w0.png",
        "pictures_w1.png",
        "pictures_w100.png",
        "precision_recall.svg",
        "report.html",
        "report.json",
        "tables.md",
    ]
    assert read_class_report(files.json) == comparison.report
    page = files.html.read_text(encoding="utf-8")
    assert "Digits &amp; &lt;more&gt;" in page
    assert not re.search(r"(src|href)=['\"](?!data:)", page), "the page must load nothing"
    assert page.count("data:image/png;base64,") == 3
    for chart in files.charts:
        assert ElementTree.parse(chart).getroot().tag.endswith("svg")
    with pytest.raises(DataError, match="9 class names came"):
        write_class_report(comparison, tmp_path, class_names=names[:9])
    with pytest.raises(DataError, match="cannot be read"):
        read_class_report(tmp_path / "nowhere.json")
    files.json.write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match="no class-conditional report"):
        read_class_report(files.json)


def test_tables_have_rows_of_steps_and_method_and_columns_of_weights(comparison: ClassComparison) -> None:
    table = metric_table(comparison.report, "fd_classifier")
    assert table.head == ["N", "method", "w = 0", "w = 1", "w = 100"]
    assert [row[:2] for row in table.rows] == [
        ["1", "student, deterministic"],
        ["1", "student, stochastic"],
        ["1", "student, single w"],
        ["1", "teacher, DPM-Solver++"],
        ["1", "teacher, DDIM"],
        ["4", "student, deterministic"],
        ["4", "student, stochastic"],
        ["4", "student, single w"],
        ["4", "teacher, DPM-Solver++"],
        ["4", "teacher, DDIM"],
        ["32", "teacher, many steps"],
    ]
    assert table.rows[2][2] == "–", "there is no single-w student for w = 0"
    assert re.fullmatch(r"[\d.]+ \[[\d.]+, [\d.]+\]", table.rows[0][3])
    text = to_markdown(all_tables(comparison.report))
    lines = text.splitlines()
    assert "| N | method | w = 0 | w = 1 | w = 100 |" in lines
    assert text.count("### ") == 11
    widths = {line.count("|") for line in lines[lines.index("| N | method | w = 0 | w = 1 | w = 100 |") :][:12]}
    assert widths == {6}


def test_grid_shows_the_same_class_and_noise_in_a_column(comparison: ClassComparison, tmp_path: Path) -> None:
    assert comparison.shown_labels == (0, 1, 2, 3)
    spec = ClassRowSpec("teacher", 32, 1.0)
    assert torch.equal(comparison.grid[spec], fake_sampler(spec, LABELS[:4], SEEDS[:4]))
    files = write_class_report(comparison, tmp_path)
    sheet = Image.open(files.pictures[1]).convert("L")
    cell = 64
    # The teacher's row is on top; the last column's cell ends 8 px from the right edge; 8 px are enlarged 8 times.
    column = sheet.crop((sheet.width - 8 - cell, 0, sheet.width - 8, 200))
    wanted = comparison.grid[spec][3, 0].repeat_interleave(8, 0).repeat_interleave(8, 1)
    pixels = torch.frombuffer(bytearray(column.tobytes()), dtype=torch.uint8).view(200, cell)
    assert any(torch.equal(pixels[top : top + cell], wanted) for top in range(60))


def test_median_of_batches() -> None:
    assert _median_of([1.0]).interval is None
    assert _median_of([3.0, 1.0, 2.0, 5.0, 4.0]).interval is None
    six = _median_of([3.0, 1.0, 2.0, 5.0, 4.0, 6.0])
    assert (six.value, six.interval) == (3.5, (1.0, 6.0))
    assert _median_of([float(n) for n in range(9)]).interval == (1.0, 7.0), "96 %: the second of either end"


def half_of_them(spec: ClassRowSpec, labels: Tensor, seeds: Sequence[int]) -> Tensor:
    return fake_sampler(spec, labels, seeds)[: len(seeds) // 2]


def as_floats(spec: ClassRowSpec, labels: Tensor, seeds: Sequence[int]) -> Tensor:
    return fake_sampler(spec, labels, seeds) / 255


def too_large(spec: ClassRowSpec, labels: Tensor, seeds: Sequence[int]) -> Tensor:
    return fake_sampler(spec, labels, seeds).repeat(1, 1, 2, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample": half_of_them}, r"asked for 40 pictures.*returned torch.uint8 \(20, 1, 8, 8\)"),
        ({"sample": as_floats}, r"returned torch.float32"),
        ({"sample": too_large}, r"uint8 \(N, 1, 8, 8\)"),
        ({"labels": LABELS + 5}, "labels from 5 to 14"),
        ({"seeds": range(10)}, "200 labels and 10 noise seeds"),
        ({"seeds": [*range(199), 0]}, "only 199 different ones"),
        ({"labels": LABELS[:10], "seeds": range(10)}, "at least 20"),
        ({"real_pictures": real_digits()[0][:39], "real_labels": real_digits()[1][:39]}, "at least 40"),
        ({"real_labels": real_digits()[1][:39]}, "450 real pictures and 39 labels"),
        ({"specs": []}, "no rows came"),
        ({"specs": [SPECS[0], SPECS[0]]}, "these repeat: teacher, many steps, 32 steps, w = 0"),
        ({"specs": [SPECS[0], ClassRowSpec("teacher", 64, 0.0)]}, "one many-step teacher a weight"),
    ],
)
def test_what_it_refuses(changes: dict[str, object], message: str) -> None:
    specs = changes.pop("specs", SPECS[:2])
    with pytest.raises(DataError, match=message):
        compared(specs, **changes)  # type: ignore[arg-type]
