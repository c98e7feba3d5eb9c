"""The comparison of other families than Stable Diffusion's: XL, and inpainting with what only it is judged by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.errors import DataError
from fewstep.evaluate.baselines import RowSpec
from fewstep.evaluate.compare import Comparison, compare, make_conditions, make_sampler
from fewstep.evaluate.features import Lite0Features
from fewstep.evaluate.grid import draw_grid
from fewstep.evaluate.holes import Holes, masked_mse
from fewstep.evaluate.report import read_report, write_report
from fewstep.evaluate.settings import EvaluateSettings
from fewstep.models import InpaintingParts, Parts, StudentInfo, TextToImageParts, load_model, save_student
from tiny import pictures_with_holes, tiny_inpainting, tiny_sdxl, w_student

#: As few rows as there can be: the reference, and one step of each method.
SETTINGS = EvaluateSettings(
    num_prompts=20,
    steps=(1,),
    reference_steps=2,
    num_bootstrap=100,
    timing_batch_size=2,
    grid_prompts=3,
    num_threads=1,
)


def _compare(teacher: Parts, lite0: Lite0Features, **changes: Any) -> Comparison:
    samples = pictures_with_holes(40)
    student = teacher.denoiser().with_network(w_student(teacher.network))
    arguments: dict[str, Any] = {
        "teacher": teacher,
        "students": {1: student},
        "prompts": [sample["caption"] for sample in samples],
        "seeds": range(40),
        "real_images": torch.stack([sample["pixels"] for sample in samples]),
        "settings": SETTINGS,
        "scorer": None,
        "image_features": lite0,
    }
    return compare(**arguments | changes)


def _masks(count: int) -> Tensor:
    return torch.stack([sample["mask"] for sample in pictures_with_holes(count)])


def test_sdxl_is_compared_like_any_text_model(lite0: Lite0Features) -> None:
    report = _compare(tiny_sdxl(), lite0).report
    assert [row.network_evaluations for row in report.results] == [4, 2, 2, 1]
    assert [row.paired_mse == 0 for row in report.results] == [True, False, False, False]
    assert report.inpainting is None


@pytest.fixture(scope="module")
def inpainting() -> InpaintingParts:
    return tiny_inpainting()


@pytest.fixture(scope="module")
def comparison(inpainting: InpaintingParts, lite0: Lite0Features) -> Comparison:
    settings = SETTINGS.model_copy(update={"show": ("a prompt of my own",)})
    return _compare(inpainting, lite0, masks=_masks(40), settings=settings)


def test_inpainting_is_judged_inside_and_outside_the_hole(comparison: Comparison) -> None:
    report = comparison.report
    assert report.inpainting is not None
    assert report.num_real_images == 20, "the pictures that have the holes"
    rows = report.inpainting.results
    assert [(row.method, row.num_inference_steps) for row in rows] == [
        (row.method, row.num_inference_steps) for row in report.results
    ]
    assert rows[0].hole_mse == 0, "the reference, to itself"
    for row in rows[1:]:
        assert row.hole_mse is not None
        assert row.hole_mse_ci is not None
        assert 0 < row.hole_mse_ci[0] <= row.hole_mse <= row.hole_mse_ci[1]
    for row in rows:
        assert row.known_mse is not None
        assert row.known_mse > 0
    assert report.inpainting.vae_known_mse is not None
    assert 0 < report.inpainting.hole_share < 1


def test_the_page_and_the_grid_show_the_holes(comparison: Comparison, tmp_path: Path) -> None:
    files = write_report(comparison, tmp_path)
    assert read_report(files.json).inpainting == comparison.report.inpainting
    page = files.html.read_text(encoding="utf-8")
    assert "Inside and around the holes" in page
    # The prompt of one's own gets the first picture, as the first held-out prompt does.
    given = Holes(torch.stack([s["pixels"] for s in pictures_with_holes(2)]), _masks(2)).shown()
    assert comparison.given is not None
    assert torch.equal(comparison.given, given[[0, 0, 1]])
    evaluations = dict.fromkeys(comparison.grid, 1)
    with_given = draw_grid(comparison.grid, comparison.prompts, evaluations=evaluations, given=comparison.given)
    without = draw_grid(comparison.grid, comparison.prompts, evaluations=evaluations)
    assert with_given.height > without.height
    assert with_given.crop((0, with_given.height - 300, with_given.width, with_given.height)).tobytes() == (
        without.crop((0, without.height - 300, without.width, without.height)).tobytes()
    ), "the other rows stay as they are"


def test_a_report_of_before_still_reads(comparison: Comparison, tmp_path: Path) -> None:
    files = write_report(comparison, tmp_path)
    content = json.loads(files.json.read_text())
    del content["inpainting"]
    files.json.write_text(json.dumps(content))
    assert read_report(files.json).inpainting is None


def test_with_a_hole_everywhere_pictures_do_not_matter_and_else_they_do(inpainting: InpaintingParts) -> None:
    masks = torch.ones(2, 1, 16, 16, dtype=torch.bool)
    pixels = torch.stack([sample["pixels"] for sample in pictures_with_holes(2)])
    student = inpainting.denoiser().with_network(w_student(inpainting.network))
    sampler = make_sampler(inpainting, {1: student}, SETTINGS)

    def draw(pictures: Tensor, masks: Tensor) -> Tensor:
        holes = Holes(pictures, masks)
        conditions = make_conditions(inpainting, ["a", "b"], [0, 1], batch_size=2, holes=holes)
        return sampler(RowSpec("student", 1), conditions, batch_size=2).latents

    assert torch.equal(draw(pixels, masks), draw(pixels.flip(0), masks))
    masks[:, :, :, :8] = False
    assert not torch.equal(draw(pixels, masks), draw(pixels.flip(0), masks))


def test_masks_that_do_not_fit_the_model_or_the_pictures(
    inpainting: InpaintingParts, teacher: TextToImageParts, lite0: Lite0Features
) -> None:
    with pytest.raises(DataError, match="judged on pictures with holes, and no masks came"):
        _compare(inpainting, lite0)
    with pytest.raises(DataError, match="masks came for a model that takes none"):
        _compare(teacher, lite0, masks=_masks(40))
    with pytest.raises(DataError, match="num_prompts=20, but 40 real pictures with 12 masks came"):
        _compare(inpainting, lite0, masks=_masks(12))
    with pytest.raises(DataError, match=r"need torch\.bool \(20, 1, 16, 16\)"):
        _compare(inpainting, lite0, masks=_masks(40).float())


def test_the_masked_distance_counts_the_masked_pixels_alone() -> None:
    images, others = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    masks = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    masks[0, :, :2] = True
    masks[1, :, 0, 0] = True
    others[0, :, 0] = 255  # half of the hole of the first
    others[1, :, 1:] = 255  # outside the hole of the second
    assert masked_mse(images, others, masks).tolist() == [0.5, 0.0]
    assert masked_mse(images, others, ~masks).tolist() == [0.0, pytest.approx(12 / 15)]


def test_students_keep_their_own_prediction_type(tmp_path: Path) -> None:
    """A rung may output something else than its teacher: it is sampled by what its own folder says."""
    teacher = tiny_sdxl()
    network = w_student(teacher.unet)
    info = StudentInfo("progressive", 1, 0.0, 6.0, 4.0, "tiny", "test")
    save_student(tmp_path, teacher, network, info, prediction_type="sample")
    student = load_model(tmp_path).denoiser()
    sampler = make_sampler(teacher, {1: student, 2: teacher.denoiser().with_network(network)}, SETTINGS)
    conditions = make_conditions(teacher, ["a", "b"], [0, 1], batch_size=2)
    # On a schedule that ends in pure noise, one step gives x̂ itself, which is the output, or for v minus the output.
    one = sampler(RowSpec("student", 1), conditions, batch_size=2).latents
    as_velocity = make_sampler(teacher, {1: sampler.students[2]}, SETTINGS)
    torch.testing.assert_close(one, -as_velocity(RowSpec("student", 1), conditions, batch_size=2).latents)
