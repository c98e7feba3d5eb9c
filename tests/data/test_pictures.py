"""Pictures of every kind become the same tensor, and what cannot is refused with its reason."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from fewstep.data.pictures import decode_class_picture, decode_picture
from fewstep.data.sample import BadSampleError
from fewstep.errors import DataError


def _sample(picture: Image.Image, *, kind: str = "png", caption: bytes = b"a cat", **save: Any) -> dict[str, Any]:
    data = io.BytesIO()
    picture.save(data, format={"jpg": "JPEG", "jpeg": "JPEG"}.get(kind, kind.upper()), **save)
    return {"__key__": "7", kind: data.getvalue(), "txt": caption}


def _halves(mode: str = "RGB", size: tuple[int, int] = (8, 8)) -> Image.Image:
    """Red on the left, blue on the right."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[:, : size[0] // 2, 0] = 255
    pixels[:, size[0] // 2 :, 2] = 255
    return Image.fromarray(pixels).convert(mode)


def test_pixels_come_through_unchanged_at_their_own_size() -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    decoded = decode_picture(_sample(picture), resolution=8)
    assert decoded["key"] == "7"
    assert decoded["caption"] == "a cat"
    assert decoded["pixels"].dtype == torch.uint8
    assert torch.equal(decoded["pixels"], torch.from_numpy(np.array(picture)).permute(2, 0, 1))


@pytest.mark.parametrize("kind", ["png", "jpg", "jpeg", "webp"])
def test_every_member_of_img2dataset_is_read(kind: str) -> None:
    pixels = decode_picture(_sample(_halves(size=(32, 32)), kind=kind), resolution=16)["pixels"].int()
    assert pixels.shape == (3, 16, 16)
    assert (pixels[:, 8, 2] - torch.tensor([255, 0, 0])).abs().max() < 12
    assert (pixels[:, 8, 13] - torch.tensor([0, 0, 255])).abs().max() < 12


def _photograph(size: tuple[int, int]) -> Image.Image:
    """Smooth colours with edges and grain, as a camera gives them."""
    noise = np.random.default_rng(0)
    rough = Image.fromarray(noise.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    pixels = np.asarray(rough).astype(int) + noise.normal(0, 6, (size[1], size[0], 3)).astype(int)
    pixels[size[1] // 3 :, size[0] // 2 :] //= 2
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("save", [{}, {"progressive": True}, {"subsampling": 0, "quality": 95}, {"subsampling": 1}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpegs_are_decoded_to_the_bits_that_pillow_gives(mode: str, save: dict[str, Any]) -> None:
    sample = _sample(_photograph((64, 64)).convert(mode), kind="jpg", **save)
    wanted = np.array(Image.open(io.BytesIO(sample["jpg"])).convert("RGB"))
    assert np.array_equal(decode_picture(sample, resolution=64)["pixels"].permute(1, 2, 0), wanted)


def test_a_picture_of_the_right_height_is_cropped_and_not_resampled() -> None:
    picture = _photograph((97, 64))
    pixels = decode_picture(_sample(picture, kind="jpg", quality=95), resolution=64)["pixels"]
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=95)
    assert np.array_equal(pixels.permute(1, 2, 0), np.asarray(Image.open(file))[:, 16:80])


@pytest.mark.parametrize("size", [(640, 512), (301, 257), (256, 1400)])
def test_a_large_jpeg_is_reduced_as_from_its_whole(size: tuple[int, int]) -> None:
    sample = _sample(_photograph(size), kind="jpg", quality=95)
    pixels = decode_picture(sample, resolution=64)["pixels"].permute(1, 2, 0).int().numpy()
    whole = ImageOps.fit(Image.open(io.BytesIO(sample["jpg"])), (64, 64), Image.Resampling.LANCZOS)
    difference = np.abs(pixels - np.asarray(whole).astype(int))
    assert difference.mean() < 2.5  # an odd side at half its size is a quarter of a pixel off
    assert difference.max() < 40  # at an edge


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pictures_are_put_on_white(mode: str) -> None:
    picture = Image.new(mode, (8, 8), 0)
    assert torch.equal(
        decode_picture(_sample(picture), resolution=8)["pixels"], torch.full((3, 8, 8), 255, dtype=torch.uint8)
    )
    picture.putalpha(255)
    assert not decode_picture(_sample(picture), resolution=8)["pixels"].any()


def test_a_palette_with_a_transparent_colour_is_put_on_white() -> None:
    picture = _halves("P")
    transparent = picture.getpixel((0, 0))
    pixels = decode_picture(_sample(picture, transparency=transparent), resolution=8)["pixels"]
    assert pixels[:, 0, 0].tolist() == [255, 255, 255]
    assert pixels[:, 0, 7].tolist() == [0, 0, 255]
    opaque = decode_picture(_sample(picture), resolution=8)["pixels"]
    assert opaque[:, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(("mode", "value", "expected"), [("L", 100, 100), ("1", 1, 255), ("LA", (100, 255), 100)])
def test_grey_pictures_become_three_equal_channels(mode: str, value: Any, expected: int) -> None:
    pixels = decode_picture(_sample(Image.new(mode, (8, 8), value)), resolution=8)["pixels"]
    assert torch.equal(pixels, torch.full((3, 8, 8), expected, dtype=torch.uint8))


def test_sixteen_bit_grey_keeps_its_brightness() -> None:
    picture = Image.fromarray(np.full((8, 8), 100 * 257, np.uint16))
    pixels = decode_picture(_sample(picture), resolution=8)["pixels"]
    assert torch.equal(pixels, torch.full((3, 8, 8), 100, dtype=torch.uint8))


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_of_an_animated_picture_the_first_one_counts(form: str) -> None:
    first, second = (Image.new("RGB", (16, 16), (level, level, level)) for level in (200, 20))
    file = io.BytesIO()
    first.save(
        file,
        form,
        save_all=True,
        append_images=[second],
        duration=100,
        **({"lossless": True} if form == "WEBP" else {}),
    )
    assert Image.open(io.BytesIO(file.getvalue())).n_frames == 2  # type: ignore[attr-defined]
    decoded = decode_picture({"__key__": "a", form.lower(): file.getvalue(), "txt": b"a"}, resolution=16)
    assert decoded["pixels"].unique().tolist() == [200]


def test_cmyk_is_converted() -> None:
    pixels = decode_picture(_sample(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), kind="jpg"), resolution=8)["pixels"]
    assert int(pixels.min()) > 250


def test_exif_turns_the_picture() -> None:
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180°
    pixels = decode_picture(_sample(_halves(), exif=exif), resolution=8)["pixels"]
    assert pixels[:, 0, 0].tolist() == [0, 0, 255]
    assert pixels[:, 0, 7].tolist() == [255, 0, 0]


@pytest.mark.parametrize("size", [(40, 8), (8, 40)])
def test_the_middle_of_a_long_picture_is_kept(size: tuple[int, int]) -> None:
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    middle = [slice(None) if side == 8 else slice(16, 24) for side in (size[1], size[0])]
    pixels[middle[0], middle[1]] = 255
    got = decode_picture(_sample(Image.fromarray(pixels)), resolution=8)["pixels"]
    assert got.shape == (3, 8, 8)
    assert int(got.min()) == 255


def test_a_small_picture_is_enlarged() -> None:
    assert decode_picture(_sample(Image.new("RGB", (3, 5), "red")), resolution=16)["pixels"].shape == (3, 16, 16)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"txt": None}, "no caption"),
        ({"txt": b""}, "no caption"),
        ({"txt": b" \n\t"}, "no caption"),
        ({"png": None}, "no picture"),
        ({"png": b""}, "broken picture"),
        ({"png": b"<html>not found</html>"}, "broken picture"),
    ],
)
def test_what_cannot_be_used_has_a_reason(change: dict[str, bytes | None], reason: str) -> None:
    sample = {key: value for key, value in {**_sample(_halves()), **change}.items() if value is not None}
    with pytest.raises(BadSampleError) as caught:
        decode_picture(sample, resolution=8)
    assert caught.value.reason == reason


@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
def test_a_picture_that_is_cut_short_is_broken(kind: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    sample = _sample(noise, kind=kind)
    sample[kind] = sample[kind][: len(sample[kind]) // 2]
    with pytest.raises(BadSampleError) as caught:
        decode_picture(sample, resolution=8)
    assert caught.value.reason == "broken picture"


def test_a_flipped_byte_in_a_png_is_a_bad_sample_and_no_other_error() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    whole = _sample(noise)
    for position in range(8, 200, 7):
        data = bytearray(whole["png"])
        data[position] ^= 0xFF
        # Some bytes do not matter; those that do must not let another error through.
        with contextlib.suppress(BadSampleError):
            decode_picture({**whole, "png": bytes(data)}, resolution=8)


def test_a_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BadSampleError) as caught:
        decode_picture(_sample(Image.new("RGB", (64, 64))), resolution=8)
    assert caught.value.reason == "broken picture"


def test_captions_with_broken_bytes_are_kept() -> None:
    decoded = decode_picture(_sample(_halves(), caption=b" caf\xe9 \xe2\x98\x95 "), resolution=8)
    assert decoded["caption"] == "caf\ufffd ☕"


def _class_sample(cls: bytes | None = b"3", picture: Image.Image | None = None, **save: Any) -> dict[str, Any]:
    """As in the webdatasets of ImageNet and CIFAR-10: a picture and its class, no caption."""
    sample = _sample(picture or _halves(), **save)
    del sample["txt"]
    return sample if cls is None else {**sample, "cls": cls}


@pytest.mark.parametrize("kind", ["png", "jpg", "jpeg", "webp"])
def test_a_picture_with_a_class_needs_no_caption(kind: str) -> None:
    sample = _class_sample(picture=_halves(size=(32, 32)), kind=kind)
    decoded = decode_class_picture(sample, resolution=16, channels=3, num_classes=10)
    assert set(decoded) == {"key", "label", "pixels"}
    assert decoded["key"] == "7"
    assert (decoded["label"].dtype, decoded["label"].shape, int(decoded["label"])) == (torch.int64, (), 3)
    assert (decoded["pixels"].dtype, decoded["pixels"].shape) == (torch.uint8, (3, 16, 16))
    assert torch.equal(decoded["pixels"], decode_picture({**sample, "txt": b"halves"}, resolution=16)["pixels"]), (
        "a picture with a class is treated otherwise than one with a caption"
    )


def test_one_channel_is_grey() -> None:
    grey = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8))
    pixels = decode_class_picture(_class_sample(picture=grey), resolution=8, channels=1, num_classes=10)["pixels"]
    assert torch.equal(pixels, torch.from_numpy(np.array(grey))[None])
    pixels = decode_class_picture(_class_sample(), resolution=8, channels=1, num_classes=10)["pixels"]
    assert (pixels[0, 0, 0], pixels[0, 0, 7]) == (76, 29)  # the luma of red and of blue


def test_the_middle_of_a_long_picture_with_a_class_is_kept() -> None:
    pixels = np.zeros((8, 40), np.uint8)
    pixels[:, 16:24] = 255
    sample = _class_sample(picture=Image.fromarray(pixels))
    assert int(decode_class_picture(sample, resolution=8, channels=1, num_classes=10)["pixels"].min()) == 255


@pytest.mark.parametrize(("cls", "label"), [(b"0", 0), (b"9", 9), (b" 7\n", 7), (b"007", 7)])
def test_classes_are_read_as_people_write_them(cls: bytes, label: int) -> None:
    assert int(decode_class_picture(_class_sample(cls), resolution=8, channels=3, num_classes=10)["label"]) == label


@pytest.mark.parametrize(
    ("cls", "reason", "detail"),
    [
        (None, "no class", "the member .cls is missing"),
        (b"", "broken class", "is b'' and no whole number"),
        (b"cat", "broken class", "is b'cat' and no whole number"),
        (b"1.0", "broken class", "no whole number"),
        (b"1_0", "broken class", "no whole number"),
        (b"\xff\xfe3\x00", "broken class", "no whole number"),
        ("\u0663".encode(), "broken class", "no whole number"),
        (b"9" * 5000, "broken class", "no whole number"),
        (b"10", "class out of range", "10 is not from 0 to 9"),
        (b"-1", "class out of range", "-1 is not from 0 to 9"),
    ],
)
def test_a_class_that_cannot_be_used_has_a_reason(cls: bytes | None, reason: str, detail: str) -> None:
    with pytest.raises(BadSampleError, match=detail) as caught:
        decode_class_picture(_class_sample(cls), resolution=8, channels=3, num_classes=10)
    assert caught.value.reason == reason


@pytest.mark.parametrize(("data", "reason"), [(None, "no picture"), (b"<html>", "broken picture")])
def test_a_class_without_a_picture_has_a_reason(data: bytes | None, reason: str) -> None:
    sample = {key: value for key, value in {**_class_sample(), "png": data}.items() if value is not None}
    with pytest.raises(BadSampleError) as caught:
        decode_class_picture(sample, resolution=8, channels=3, num_classes=10)
    assert caught.value.reason == reason


def test_other_numbers_of_channels_are_refused() -> None:
    with pytest.raises(DataError, match="channels=4: pictures with a class are read with 1") as caught:
        decode_class_picture(_class_sample(), resolution=8, channels=4, num_classes=10)
    assert not isinstance(caught.value, BadSampleError), "it would be counted and skipped, sample by sample"


@pytest.mark.parametrize(
    ("size", "kind", "expected"),
    [
        ((96, 64), "png", (64, 96, 0, 16, 64, 64)),
        ((64, 100), "jpg", (100, 64, 18, 0, 64, 64)),
        ((64, 64), "jpg", (64, 64, 0, 0, 64, 64)),
        ((1200, 900), "jpg", (900, 1200, 0, 10, 64, 64)),  # reduced to 85 x 64
        ((32, 48), "png", (48, 32, 16, 0, 64, 64)),  # enlarged to 64 x 96
    ],
)
def test_sizes_are_those_that_sdxl_is_told(size: tuple[int, int], kind: str, expected: tuple[int, ...]) -> None:
    sample = _sample(_photograph(size), kind=kind)
    decoded = decode_picture(sample, resolution=64, sizes=True)
    assert tuple(decoded["time_ids"].tolist()) == expected
    assert decoded["time_ids"].dtype == torch.int64
    assert "time_ids" not in decode_picture(sample, resolution=64)


def test_exif_turns_the_size_too() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    decoded = decode_picture(_sample(_photograph((96, 64)), kind="jpg", exif=exif), resolution=64, sizes=True)
    assert tuple(decoded["time_ids"].tolist()) == (96, 64, 16, 0, 64, 64)


@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_random_crops_belong_to_their_sample(kind: str) -> None:
    picture = _photograph((256, 64))
    corners, cuts = [], []
    for number in range(40):
        sample = {**_sample(picture, kind=kind), "__key__": f"{number}"}
        decoded = decode_picture(sample, resolution=64, crop="random", seed=1, sizes=True)
        again = decode_picture(sample, resolution=64, crop="random", seed=1)
        assert torch.equal(decoded["pixels"], again["pixels"])
        corners.append(int(decoded["time_ids"][3]))
        cuts.append(decoded["pixels"])
    assert min(corners) < 30
    assert max(corners) > 162
    assert max(corners) <= 192
    file = io.BytesIO(_sample(picture, kind=kind)[kind])
    whole = np.asarray(Image.open(file)).astype(int)
    for corner, pixels in zip(corners, cuts, strict=True):
        wanted = whole[:, corner : corner + 64]
        assert np.abs(pixels.permute(1, 2, 0).numpy() - wanted).mean() < (0.01 if kind == "jpg" else 12)
    other = decode_picture({**_sample(picture), "__key__": "0"}, resolution=64, crop="random", seed=2, sizes=True)
    assert int(other["time_ids"][3]) != corners[0]
