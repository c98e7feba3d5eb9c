"""The whole comparison on tiny networks, and what is written of it."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from fewstep.errors import DataError, ModelError
from fewstep.evaluate.alignment import AlignmentScorer, AlignmentSettings
from fewstep.evaluate.baselines import RowSpec
from fewstep.evaluate.compare import Comparison, compare, row_specs
from fewstep.evaluate.features import Lite0Features
from fewstep.evaluate.report import read_report, write_report
from fewstep.evaluate.schema import StageUsage
from fewstep.evaluate.settings import EvaluateSettings
from fewstep.models import Denoiser, TextToImageParts

SETTINGS = EvaluateSettings(
    num_prompts=20,
    steps=(4, 1),
    reference_steps=6,
    batch_size=16,
    num_bootstrap=100,
    timing_batch_size=2,
    grid_prompts=3,
    num_threads=1,
)
PROMPTS = [f"a {colour} {thing}" for colour in ("red", "blue") for thing in ("apple", "car", "cat", "hat", "sun")] * 2
SEEDS = list(range(100, 120))

#: The fields that the interface names, each metric with its interval.
FIELDS = {
    "method",
    "num_inference_steps",
    "guidance_scale",
    "network_evaluations",
    "num_images",
    *(
        name + end
        for name in (
            "kid_lite0_to_real",
            "kid_lite0_to_teacher",
            "fd_lite0_to_real",
            "alignment",
            "paired_mse",
            "seconds_per_image",
        )
        for end in ("", "_ci")
    ),
}


def real_pictures(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    small = torch.randint(0, 256, (count, 3, 4, 4), dtype=torch.uint8, generator=generator)
    return torch.nn.functional.interpolate(small, size=(16, 16), mode="nearest")


@pytest.fixture(scope="module")
def students(teacher: TextToImageParts, student: UNet2DConditionModel) -> dict[int, Denoiser]:
    model = teacher.denoiser().with_network(student)
    return {4: model, 1: model}


@pytest.fixture(scope="module")
def scorer(lite0: Lite0Features) -> AlignmentScorer:
    settings = AlignmentSettings(dim=8, epochs=1, batch_size=20)
    return AlignmentScorer(settings, image_features=lite0).fit(real_pictures(20), PROMPTS)


@pytest.fixture(scope="module")
def messages() -> list[tuple[str, int, int]]:
    return []


@pytest.fixture(scope="module")
def comparison(
    teacher: TextToImageParts,
    students: dict[int, Denoiser],
    scorer: AlignmentScorer,
    messages: list[tuple[str, int, int]],
) -> Comparison:
    return compare(
        teacher=teacher,
        students=students,
        prompts=PROMPTS,
        seeds=SEEDS,
        real_images=real_pictures(40),
        settings=SETTINGS,
        scorer=scorer,
        real_captions=PROMPTS * 2,
        image_features=scorer.image_features,
        progress=lambda *message: messages.append(message),
    )


def test_rows_hold_every_step_count_and_its_half() -> None:
    assert row_specs(EvaluateSettings(steps=(2, 8))) == [
        RowSpec("teacher", 50),
        RowSpec("ddim", 8),
        RowSpec("dpmpp", 8),
        RowSpec("student", 8),
        RowSpec("ddim", 4),
        RowSpec("dpmpp", 4),
        RowSpec("ddim", 2),
        RowSpec("dpmpp", 2),
        RowSpec("student", 2),
        RowSpec("ddim", 1),
        RowSpec("dpmpp", 1),
    ]


def test_every_row_has_every_figure_inside_its_interval(comparison: Comparison) -> None:
    results = comparison.report.results
    assert [RowSpec(row.method, row.num_inference_steps) for row in results] == row_specs(SETTINGS)
    for row in results:
        figures = row.model_dump()
        assert set(figures) == FIELDS
        for name in (field for field in FIELDS if field.endswith("_ci")):
            low, high = figures[name]
            assert low <= high
        assert row.num_images == 20
        expected = row.num_inference_steps * (1 if row.method == "student" else 2)
        assert row.network_evaluations == expected
        assert row.seconds_per_image is not None
        assert row.seconds_per_image > 0


def test_the_reference_is_at_no_distance_from_itself(comparison: Comparison) -> None:
    reference, *others = comparison.report.results
    assert reference.paired_mse == 0
    assert reference.kid_lite0_to_teacher == pytest.approx(0, abs=1e-9)
    assert all(row.paired_mse is not None and row.paired_mse > 0 for row in others)


def test_more_steps_of_ddim_come_nearer_to_the_reference(comparison: Comparison) -> None:
    rows = {row.num_inference_steps: row.paired_mse for row in comparison.report.results if row.method == "ddim"}
    assert rows[4] < rows[2] < rows[1]


def test_ratios_and_floor(comparison: Comparison) -> None:
    report = comparison.report
    assert [(row.num_inference_steps, row.at) for row in report.ratios.excess] == [
        (4, "equal_evaluations"),
        (4, "equal_steps"),
        (1, "equal_steps"),
    ]
    assert report.ratios.wall_clock is not None
    assert report.ratios.wall_clock.evaluation_ratio == 3
    assert report.floor.num_images == 20
    assert report.floor.alignment is not None
    assert report.floor.vae_kid_lite0 is not None
    assert report.floor.vae_kid_lite0 > report.floor.kid_lite0_ci[1], "a random VAE does not keep pictures"


def test_progress_counts_up(comparison: Comparison, messages: list[tuple[str, int, int]]) -> None:
    rows = len(comparison.report.results)
    assert [done for _, done, _ in messages] == list(range(rows + 1))
    assert {total for _, _, total in messages} == {rows}


def test_written_report_is_whole_and_reads_back(comparison: Comparison, tmp_path: Path) -> None:
    stages = [StageUsage(name="guidance", seconds=12.5, peak_memory_bytes=2_000_000_000)]
    files = write_report(comparison, tmp_path / "report", stages=stages, title="A <report> & more")
    plain = json.loads(files.json.read_text(encoding="utf-8"))
    assert set(plain["results"][0]) == FIELDS
    assert plain["stages"][0]["peak_memory_bytes"] == 2_000_000_000
    assert read_report(files.json) == comparison.report.model_copy(update={"stages": stages})
    assert sorted(path.name for path in files.json.parent.iterdir()) == ["report.html", "report.json", "samples.png"]

    page = files.html.read_text(encoding="utf-8")
    assert "A &lt;report&gt; &amp; more" in page
    assert not re.search(r"(src|href)=['\"](?!data:)", page), "the page must load nothing"
    assert "student, 1 step" in page
    assert "2.00 GB" in page
    embedded = re.search(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)
    assert embedded is not None
    assert base64.b64decode(embedded[1])[:8] == b"\x89PNG\r\n\x1a\n"


def test_page_marks_stages_of_an_earlier_run_and_tells_stage_ones_error(comparison: Comparison, tmp_path: Path) -> None:
    report = comparison.report.model_copy(update={"stage_one_relative_error": 0.0834})
    stages = [StageUsage(name="guidance", seconds=1.0, skipped=True), StageUsage(name="progressive", seconds=2.0)]
    page = write_report(replace(comparison, report=report), tmp_path, stages=stages).html.read_text(encoding="utf-8")
    assert page.count("done in an earlier run") == 1
    assert "<td>8.3%</td><td>≤ 5%</td><td>" in re.sub(r" class='[^']*'", "", page)
    assert "8.3%" not in write_report(comparison, tmp_path).html.read_text(encoding="utf-8")


def test_grid_shows_each_picture_where_it_belongs(comparison: Comparison, tmp_path: Path) -> None:
    files = write_report(comparison, tmp_path)
    sheet = Image.open(files.samples).convert("RGB")
    grid = comparison.grid[RowSpec("teacher", 6)]
    assert grid.shape[0] == len(comparison.prompts) == 3
    # The last column's cell of the first row ends 16 px from the right edge; 16 px pictures are enlarged 8 times.
    data = sheet.crop((sheet.width - 16 - 128, 0, sheet.width - 16, sheet.height))
    wanted = [tuple(grid[2, :, 8, column].tolist()) for column in (0, 8, 15)]
    found = any([data.getpixel((column * 8 + 4, y)) for column in (0, 8, 15)] == wanted for y in range(data.height))
    assert found


def test_damaged_report(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    with pytest.raises(DataError, match="run the evaluate stage"):
        read_report(path)
    path.write_text('{"results": 3}')
    with pytest.raises(DataError, match="no report of this version"):
        read_report(path)


def test_what_cannot_be_compared(
    teacher: TextToImageParts, students: dict[int, Denoiser], lite0: Lite0Features
) -> None:
    def run(**changes: object) -> Comparison:
        arguments = {
            "teacher": teacher,
            "students": students,
            "prompts": PROMPTS,
            "seeds": SEEDS,
            "real_images": real_pictures(40),
            "settings": SETTINGS,
            "scorer": None,
            "image_features": lite0,
        }
        return compare(**(arguments | changes))  # type: ignore[arg-type]

    with pytest.raises(ModelError, match=r"no student for \[1\]"):
        run(students={4: students[4]})
    with pytest.raises(DataError, match="num_prompts=20, but 12 held-out prompts"):
        run(prompts=PROMPTS[:12], seeds=SEEDS[:12])
    with pytest.raises(DataError, match="30 real pictures"):
        run(real_images=real_pictures(30))
    with pytest.raises(ValueError, match="different numbers"):
        EvaluateSettings(steps=(4, 4))


def test_prompts_to_show_come_first_in_the_grid_and_count_nowhere(
    teacher: TextToImageParts,
    students: dict[int, Denoiser],
    scorer: AlignmentScorer,
    comparison: Comparison,
    tmp_path: Path,
) -> None:
    shown = compare(
        teacher=teacher,
        students=students,
        prompts=PROMPTS,
        seeds=SEEDS,
        real_images=real_pictures(40),
        settings=SETTINGS.model_copy(update={"show": ("a known thing", "another")}),
        scorer=scorer,
    )
    assert shown.prompts == ("a known thing", "another", PROMPTS[0])
    for spec, pictures in comparison.grid.items():
        assert torch.equal(shown.grid[spec][2], pictures[0]), "the first held-out prompt, from its own noise"
        assert not torch.equal(shown.grid[spec][0], shown.grid[spec][1])
    for before, after in zip(comparison.report.results, shown.report.results, strict=True):
        assert before.kid_lite0_to_real == after.kid_lite0_to_real
        assert after.num_images == SETTINGS.num_prompts
    page = write_report(shown, tmp_path).html.read_text(encoding="utf-8")
    assert "The first 2 prompts were chosen to be shown" in page


def test_more_prompts_to_show_than_columns_are_refused() -> None:
    with pytest.raises(ValueError, match=r"show has 2 prompts.*grid_prompts=1 columns: set grid_prompts to 2"):
        EvaluateSettings(show=("a", "b"), grid_prompts=1)
