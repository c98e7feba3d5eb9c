"""From a webdataset sample to pixels, with a caption or a class."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from fewstep.data.buckets import Size, bucket_of
from fewstep.data.sample import BadSampleError, Bytes, Sample
from fewstep.errors import DataError

Crop = Literal["center", "random"]
#: Members that hold a picture.
EXTENSIONS = ("png", "jpg", "jpeg", "webp")
_HEAD_BYTES = 1 << 16  # where a JPEG has its metadata
_MAY_BE_TURNED = (b"Exif\0\0", b"http://ns.adobe.com/xap/")  # metadata that may have an orientation
_MODES = {1: "L", 3: "RGB"}


def decode_picture(
    sample: Sample,
    *,
    resolution: int,
    crop: Crop = "center",
    seed: int = 0,
    sizes: bool = False,
    buckets: Sequence[Size] | None = None,
) -> dict[str, Any]:
    """Return key, caption and pixels (uint8, (3, resolution, resolution)) of a sample in img2dataset's layout.

    The picture is turned as its EXIF says, put on white where it is transparent, reduced so that its shorter side is
    `resolution`, and cropped along the longer one. With buckets it is reduced so that it just covers the size of its
    own, and cropped to that.

    Args:
        sample: the sample.
        resolution: side in pixels.
        crop: what is kept of the side that is too long: the middle, or a part drawn by the seed and the sample's key.
        seed: of that.
        sizes: also return time_ids, (6,) int64: height and width of the picture as it came, top and left of the crop
            in the reduced picture, height and width of the crop. They are what Stable Diffusion XL is told
            (`StableDiffusionXLPipeline`, original_size + crops_coords_top_left + target_size).
        buckets: as `bucket_sizes` gives them; None: the square alone. With them time_ids are always there; without
            `sizes` those of an uncropped picture of the bucket's size.

    Raises:
        BadSampleError: there is no picture or it is broken, or the caption is missing or empty.
    """
    caption = sample.get("txt", b"").decode("utf-8", errors="replace").strip()
    if not caption:
        raise BadSampleError("no caption", "the member .txt is missing or empty")
    place = 0.5 if crop == "center" else _drawn_place(sample["__key__"], seed)
    cut = _cut(sample, buckets or [(resolution, resolution)], channels=3, place=place)
    decoded = {"key": sample["__key__"], "caption": caption, "pixels": cut.pixels}
    size = cut.pixels.shape[1:]
    if sizes:
        decoded["time_ids"] = torch.tensor([*cut.original_size, *cut.corner, *size], dtype=torch.int64)
    elif buckets is not None:
        decoded["time_ids"] = torch.tensor([*size, 0, 0, *size], dtype=torch.int64)
    return decoded


def decode_class_picture(sample: Sample, *, resolution: int, channels: int, num_classes: int) -> dict[str, Any]:
    """Return key, label (int64 scalar) and pixels (uint8, (channels, resolution, resolution)) of a sample with a class.

    The layout is that of the webdatasets of ImageNet and CIFAR-10: a picture, and its class as a number in .cls. The
    picture is treated as `decode_picture` does; with one channel it becomes grey.

    Args:
        sample: the sample.
        resolution: side in pixels.
        channels: 1 or 3.
        num_classes: labels are from 0 to num_classes − 1.

    Raises:
        BadSampleError: there is no picture or it is broken, or the class is missing, no number or out of range.
        DataError: channels is neither 1 nor 3.
    """
    if channels not in _MODES:
        raise DataError(f"channels={channels}: pictures with a class are read with 1 (grey) or 3 (RGB)")
    label = torch.tensor(_label(sample, num_classes), dtype=torch.int64)
    cut = _cut(sample, [(resolution, resolution)], channels=channels)
    return {"key": sample["__key__"], "label": label, "pixels": cut.pixels}


def _label(sample: Sample, num_classes: int) -> int:
    if "cls" not in sample:
        raise BadSampleError("no class", "the member .cls is missing")
    text = bytes(sample["cls"]).strip()
    # int() alone would take 1_0 for 10, and the digits of other scripts.
    if not re.fullmatch(rb"-?[0-9]{1,18}", text):
        raise BadSampleError("broken class", f"the member .cls is {text[:20]!r} and no whole number in ASCII")
    label = int(text)
    if not 0 <= label < num_classes:
        raise BadSampleError("class out of range", f"{label} is not from 0 to {num_classes - 1}")
    return label


@dataclass(frozen=True)
class _Cut:
    """A picture cut to a size: pixels (C, height, width), its size as it came, and top and left of the cut."""

    pixels: torch.Tensor
    original_size: tuple[int, int]  # height and width
    corner: tuple[int, int]


def _drawn_place(key: str, seed: int) -> float:
    digest = hashlib.blake2b(f"{seed}/{key}/crop".encode("utf-8", errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def _cut(sample: Sample, sizes: Sequence[Size], *, channels: int, place: float = 0.5) -> _Cut:
    data = next((sample[extension] for extension in EXTENSIONS if extension in sample), None)
    if data is None:
        raise BadSampleError("no picture", f"none of the members .{', .'.join(EXTENSIONS)} is there")
    plain = _plain_jpeg(data, sizes)
    if plain is None:
        picture = _picture(data)
        original = (picture.height, picture.width)
    else:
        pixels, original = plain
        picture = Image.fromarray(pixels)
    size = bucket_of(original[1], original[0], sizes)
    target = (size[1], size[0])
    scale = max(wanted / side for wanted, side in zip(target, original, strict=True))
    reduced = tuple(max(wanted, round(side * scale)) for wanted, side in zip(target, original, strict=True))
    top, left = (int((side - wanted) * place) for wanted, side in zip(target, reduced, strict=True))
    if plain is not None and channels == 3 and pixels.shape[:2] == reduced:
        cut = pixels[top : top + target[0], left : left + target[1]]
        return _Cut(_channels_first(cut), original, (top, left))
    picture = picture.convert(_MODES[channels])
    if picture.size != size:
        picture = ImageOps.fit(picture, size, Image.Resampling.LANCZOS, centering=(place, place))
    cropped = np.array(picture)
    return _Cut(torch.from_numpy(cropped)[None] if channels == 1 else _channels_first(cropped), original, (top, left))


def _channels_first(pixels: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def _plain_jpeg(data: Bytes, sizes: Sequence[Size]) -> tuple[NDArray[np.uint8], tuple[int, int]] | None:
    """Return the pixels (H, W, 3) of a JPEG that needs no turning and no conversion, and its height and width as it
    came; None for everything else.

    They are bit for bit those that Pillow gives, in about half its time; but from a picture of at least four times the
    size, at half, a quarter or an eighth of its size, which the decoder has for less than the whole.
    """
    head = bytes(data[:_HEAD_BYTES])
    if not head.startswith(b"\xff\xd8") or any(mark in head for mark in _MAY_BE_TURNED):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours not in ("YCbCr", "Gray") or height * width > (Image.MAX_IMAGE_PIXELS or height * width):
            return None
        wide, high = bucket_of(width, height, sizes)
        side = {"min_height": 2 * high, "min_width": 2 * wide} if height >= 4 * high and width >= 4 * wide else {}
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGB", min_factor=2 if side else 1, **side)
    except ValueError:  # what is wrong with it, if anything is, Pillow shall say
        return None
    return pixels, (height, width)


def _picture(data: Bytes) -> Image.Image:
    try:
        with Image.open(io.BytesIO(data)) as opened:
            opened.load()
            return _flatten(ImageOps.exif_transpose(opened) or opened)
    except Exception as error:  # Pillow has many for broken files, of EXIF too: struct.error, TypeError, …
        raise BadSampleError("broken picture", str(error)) from error


def _flatten(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):
        # Grey of 16 bits: Pillow's own conversion cuts at 255 where it should scale, and leaves white.
        picture = Image.fromarray((np.asarray(picture) // 257).clip(0, 255).astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        drawn = picture.convert("RGBA")
        white = Image.new("RGBA", drawn.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(white, drawn)
    return picture.convert("RGB")
