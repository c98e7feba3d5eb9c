"""Holes for inpainting: of both kinds, as large as LaMa's, the same at every resolution, and never all or nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from fewstep.data.masks import MaskSettings, random_mask
from fewstep.errors import DataError

SETTINGS = MaskSettings()
STROKES = MaskSettings(box_probability=0)
BOXES = MaskSettings(box_probability=1)


def _mask(seed: int, *, height: int = 256, width: int = 256, settings: MaskSettings = SETTINGS) -> torch.Tensor:
    return random_mask(height, width, settings=settings, generator=np.random.default_rng(seed))


@pytest.fixture(scope="module")
def thousand() -> torch.Tensor:
    return torch.stack([_mask(seed) for seed in range(1000)])


def test_a_mask_is_one_channel_of_bool() -> None:
    mask = _mask(0, height=40, width=64)
    assert (mask.shape, mask.dtype) == ((1, 40, 64), torch.bool)


def test_a_seed_gives_the_same_masks_with_either_kind_of_generator() -> None:
    generators = [np.random.default_rng(3), np.random.default_rng(3)]
    first, second = ([random_mask(64, 64, settings=SETTINGS, generator=g) for _ in range(5)] for g in generators)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert len({mask.numpy().tobytes() for mask in first}) == 5
    torches = [torch.Generator().manual_seed(3) for _ in range(2)]
    first, second = ([random_mask(64, 64, settings=SETTINGS, generator=g) for _ in range(5)] for g in torches)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert len({mask.numpy().tobytes() for mask in first}) == 5


def test_the_covered_share_is_that_of_large_masks(thousand: torch.Tensor) -> None:
    """Measured over these seeds: mean 0.359, quantiles 0.069 (5 %), 0.208, 0.328, 0.490, 0.735 (95 %)."""
    shares = thousand.float().mean(dim=(1, 2, 3))
    assert 0.33 < float(shares.mean()) < 0.39
    expected = torch.tensor([0.07, 0.21, 0.33, 0.49, 0.735])
    measured = torch.quantile(shares, torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95]))
    assert (measured - expected).abs().max() < 0.03
    assert float(shares.min()) > 0.005
    assert float(shares.max()) < 0.97


def test_both_kinds_come_equally_often(thousand: torch.Tensor) -> None:
    kinds = []
    for seed in range(300):
        alone = [torch.equal(thousand[seed], _mask(seed, settings=settings)) for settings in (STROKES, BOXES)]
        assert sum(alone) == 1
        kinds.append(alone.index(True))
    assert 0.4 < sum(kinds) / 300 < 0.6


@pytest.mark.parametrize(("settings", "low", "high"), [(STROKES, 0.42, 0.50), (BOXES, 0.22, 0.28)])
def test_strokes_cover_more_than_boxes(settings: MaskSettings, low: float, high: float) -> None:
    shares = [float(_mask(seed, settings=settings).float().mean()) for seed in range(500)]
    assert low < sum(shares) / 500 < high


def test_boxes_keep_their_margin_and_sizes() -> None:
    settings = BOXES.model_copy(update={"max_boxes": 1})
    sides = []
    for seed in range(300):
        rows, columns = torch.nonzero(_mask(seed, settings=settings)[0], as_tuple=True)
        top, bottom, left, right = (int(v) for v in (rows.min(), rows.max(), columns.min(), columns.max()))
        assert min(top, left) >= 10
        assert max(bottom, right) < 246
        assert len(rows) == (bottom - top + 1) * (right - left + 1), "it is not one filled box"
        sides += [bottom - top + 1, right - left + 1]
    assert 29 <= min(sides) <= 33
    assert 147 <= max(sides) <= 151


def test_a_stroke_is_as_wide_and_long_as_asked() -> None:
    settings = STROKES.model_copy(
        update={"max_strokes": 1, "max_segments": 1, "max_angle": 1, "min_width": 31, "max_width": 31}
    )
    lengths = []
    for seed in range(200):
        # Of the angle 0.01 rad alone: straight down, to a pixel or two.
        rows, columns = torch.nonzero(_mask(seed, settings=settings)[0], as_tuple=True)
        if int(columns.min()) > 2 and int(columns.max()) < 253:
            assert 30 <= int(columns.max() - columns.min()) + 1 <= 35
        if int(rows.min()) > 0 and int(rows.max()) < 255:
            lengths.append(int(rows.max() - rows.min()) + 1 - 31)
    assert len(lengths) > 20
    assert min(lengths) >= 9
    assert 150 < max(lengths) <= 211


@pytest.mark.parametrize("settings", [STROKES, BOXES])
def test_sizes_grow_with_the_resolution(settings: MaskSettings) -> None:
    for seed in range(40):
        large, small = _mask(seed, height=512, width=512, settings=settings), _mask(seed, settings=settings)
        halved = large.float().unflatten(2, (256, 2)).unflatten(1, (256, 2)).mean(dim=(2, 4)) >= 0.5
        assert float((halved & small).sum() / (halved | small).sum()) > 0.93


def test_the_shorter_side_sets_the_scale() -> None:
    square, tall, wide = (
        sum(float(_mask(seed, height=h, width=w).sum()) for seed in range(200)) / 200
        for h, w in ((64, 64), (192, 64), (64, 192))
    )
    # Holes of the same size, of which fewer overlap or leave the picture.
    for area in (tall, wide):
        assert 1.0 < area / square < 1.8


@pytest.mark.parametrize("side", [8, 9, 32])
def test_no_mask_is_empty_or_everything(side: int) -> None:
    for seed in range(500):
        mask = _mask(seed, height=side, width=side)
        assert mask.any()
        assert not mask.all()


def test_a_mask_that_fills_everything_is_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = STROKES.model_copy(update={"max_width": 300})
    for seed in range(50):
        assert not _mask(seed, height=16, width=16, settings=settings).all()
    monkeypatch.setattr("fewstep.data.masks._MAX_TRIES", 1)
    with pytest.raises(DataError, match="1 masks in turn"):
        [_mask(seed, height=16, width=16, settings=settings) for seed in range(50)]


def test_settings_that_only_fill_everything_are_told() -> None:
    settings = STROKES.model_copy(update={"min_width": 5000, "max_width": 5000})
    with pytest.raises(DataError, match=r"left nothing of the picture of 16 × 16 to see: lower max_strokes"):
        _mask(0, height=16, width=16, settings=settings)


@pytest.mark.parametrize("size", [(7, 64), (64, 7), (0, 0)])
def test_a_picture_too_small_is_told(size: tuple[int, int]) -> None:
    with pytest.raises(DataError, match=r"too small to draw in: each side must have 8 px"):
        _mask(0, height=size[0], width=size[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"box_probability": 1.5}, "less than or equal to 1"),
        ({"min_strokes": 7}, "min_strokes=7 is more than max_strokes=6"),
        ({"max_length": 5}, "min_length=10 is more than max_length=5"),
        ({"min_width": 200}, "min_width=200 is more than max_width=104"),
        ({"min_boxes": 5}, "min_boxes=5 is more than max_boxes=4"),
        ({"max_box_size": 20}, "min_box_size=30 is more than max_box_size=20"),
        ({"box_margin": 60}, "max_box_size=150 with box_margin=60 on both sides does not fit into 256 px"),
        ({"max_angel": 4}, "Extra inputs are not permitted"),
    ],
)
def test_settings_that_cannot_be_are_told(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MaskSettings(**change)
    assert all(field.description for field in MaskSettings.model_fields.values())
