"""Which sizes there are, which of them a picture gets, and what is cut to it."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from fewstep.data.buckets import BucketSettings, bucket_of, bucket_sizes
from fewstep.data.pictures import decode_picture
from fewstep.errors import DataError

SIZES_512 = ((384, 640), (448, 576), (512, 512), (576, 448), (640, 384))


def test_the_sizes_of_stable_diffusion_by_hand() -> None:
    """64 units of 64 × 64 pixels: 6 × 10, 7 × 9, 8 × 8 and turned; 5 × 12 has an aspect of 2.4."""
    assert bucket_sizes(512, BucketSettings()) == SIZES_512
    wider = bucket_sizes(512, BucketSettings(max_aspect_ratio=2.4))
    assert wider == ((320, 768), *SIZES_512, (768, 320))


@pytest.mark.parametrize(("resolution", "unit", "limit"), [(1024, 64, 4.0), (640, 64, 2.0), (768, 32, 3.0)])
def test_sizes_have_at_most_the_pixels_of_the_square_and_come_turned_too(
    resolution: int, unit: int, limit: float
) -> None:
    sizes = bucket_sizes(resolution, BucketSettings(max_aspect_ratio=limit, multiple_of=unit))
    assert (resolution, resolution) in sizes
    assert list(sizes) == sorted(set(sizes), key=lambda size: size[0] / size[1])
    assert {(height, width) for width, height in sizes} == set(sizes)
    for width, height in sizes:
        assert width % unit == height % unit == 0
        assert width * height <= resolution**2 < (width + unit) * (height + unit)
        assert max(width / height, height / width) <= limit


def test_a_picture_goes_to_the_nearest_log_aspect_ratio() -> None:
    draw = np.random.default_rng(0)
    for width, height in draw.integers(1, 4000, (500, 2)).tolist():
        distance = {size: abs(math.log(width / height) - math.log(size[0] / size[1])) for size in SIZES_512}
        assert distance[bucket_of(width, height, SIZES_512)] <= min(distance.values()) + 1e-12
    assert bucket_of(1, 4000, SIZES_512) == (384, 640)
    assert bucket_of(4000, 1, SIZES_512) == (640, 384)
    # 8 : 2 and 2 : 8 are as far from 1 : 1 as from 16 : 1 and 1 : 16: the narrower one.
    sizes = ((1, 16), (4, 4), (16, 1))
    assert bucket_of(8, 2, sizes) == (4, 4)
    assert bucket_of(2, 8, sizes) == (1, 16)


@pytest.mark.parametrize(
    ("resolution", "settings", "message"),
    [
        (500, {}, r"multiple_of=64 does not divide the model's resolution of 500 pixels"),
        (512, {"max_aspect_ratio": 1.2}, r"no size beside the square of 512 pixels: raise max_aspect_ratio \(1\.2\)"),
    ],
)
def test_what_leaves_no_sizes_is_said(resolution: int, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        bucket_sizes(resolution, BucketSettings(**settings))


def test_settings_are_checked() -> None:
    for wrong in ({"max_aspect_ratio": 1.0}, {"multiple_of": 0}, {"sides": 3}):
        with pytest.raises(ValidationError):
            BucketSettings.model_validate(wrong)


SIZES = bucket_sizes(16, BucketSettings(max_aspect_ratio=4.0, multiple_of=8))


def _sample(size: tuple[int, int], *, kind: str = "PNG", turned: bool = False) -> tuple[dict[str, Any], Image.Image]:
    pixels = np.random.default_rng(3).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    data = io.BytesIO()
    options: dict[str, Any] = {"quality": 95} if kind == "JPEG" else {}
    if turned:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = 6  # to be turned clockwise by a quarter
    picture.save(data, format=kind, **options)
    member = {"PNG": "png", "JPEG": "jpg"}[kind]
    sample = {"__key__": "7", member: data.getvalue(), "txt": b"a cat"}
    return sample, Image.open(io.BytesIO(data.getvalue())).convert("RGB")


def test_sizes_of_the_small_square() -> None:
    assert SIZES == ((8, 32), (16, 16), (32, 8))


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize(("size", "shape"), [((8, 32), (32, 8)), ((32, 8), (8, 32)), ((16, 16), (16, 16))])
def test_a_picture_of_its_buckets_size_stays_as_it_is(kind: str, size: tuple[int, int], shape: tuple[int, int]) -> None:
    sample, picture = _sample(size, kind=kind)
    decoded = decode_picture(sample, resolution=16, buckets=SIZES)
    assert torch.equal(decoded["pixels"], torch.from_numpy(np.array(picture)).permute(2, 0, 1))
    assert decoded["time_ids"].tolist() == [*shape, 0, 0, *shape]


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_the_picture_covers_its_size_and_the_middle_is_kept(kind: str) -> None:
    sample, picture = _sample((36, 8), kind=kind)  # 4 columns too many for 32 × 8
    decoded = decode_picture(sample, resolution=16, buckets=SIZES, sizes=True)
    assert torch.equal(decoded["pixels"], torch.from_numpy(np.array(picture)[:, 2:34].copy()).permute(2, 0, 1))
    assert decoded["time_ids"].tolist() == [8, 36, 0, 2, 8, 32]
    tall, picture = _sample((8, 40), kind=kind)
    decoded = decode_picture(tall, resolution=16, buckets=SIZES, sizes=True, crop="random", seed=5)
    top = decoded["time_ids"].tolist()[2]
    assert 0 < top < 8
    assert top != 4
    assert decoded["pixels"].shape == (3, 32, 8)
    if kind == "JPEG":  # of others a part that begins between two rows is resampled
        cut = np.array(picture)[top : top + 32].copy()
        assert torch.equal(decoded["pixels"], torch.from_numpy(cut).permute(2, 0, 1))


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_the_aspect_is_that_of_the_turned_picture(kind: str) -> None:
    sample, picture = _sample((32, 8), kind=kind, turned=True)
    pixels = decode_picture(sample, resolution=16, buckets=SIZES)["pixels"]
    turned = np.array(picture.transpose(Image.Transpose.ROTATE_270))
    assert torch.equal(pixels, torch.from_numpy(turned).permute(2, 0, 1))


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_large_and_small_pictures_are_resized(kind: str) -> None:
    for size in ((1600, 420), (20, 5), (400, 100)):
        decoded = decode_picture(_sample(size, kind=kind)[0], resolution=16, buckets=SIZES, sizes=True)
        assert decoded["pixels"].shape == (3, 8, 32)
        assert decoded["time_ids"].tolist()[:2] == [size[1], size[0]]
