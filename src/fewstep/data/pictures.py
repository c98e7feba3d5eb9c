"""From a webdataset sample to pixels, with a caption or a class."""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from fewstep.data.source import BadSampleError, Sample
from fewstep.errors import DataError

#: Members that hold a picture.
EXTENSIONS = ("png", "jpg", "jpeg", "webp")
_HEAD_BYTES = 1 << 16  # where a JPEG has its metadata
_MODES = {1: "L", 3: "RGB"}


def decode_picture(sample: Sample, *, resolution: int) -> dict[str, Any]:
    """Return key, caption and pixels (uint8, (3, resolution, resolution)) of a sample in img2dataset's layout.

    The picture is turned as its EXIF says, put on white where it is transparent, reduced so that its shorter side is
    `resolution`, and cropped to the middle.

    Raises:
        BadSampleError: there is no picture or it is broken, or the caption is missing or empty.
    """
    caption = sample.get("txt", b"").decode("utf-8", errors="replace").strip()
    if not caption:
        raise BadSampleError("no caption", "the member .txt is missing or empty")
    return {"key": sample["__key__"], "caption": caption, "pixels": _pixels(sample, resolution, channels=3)}


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
    return {"key": sample["__key__"], "label": label, "pixels": _pixels(sample, resolution, channels=channels)}


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


def _pixels(sample: Sample, resolution: int, *, channels: int) -> torch.Tensor:
    data = next((sample[extension] for extension in EXTENSIONS if extension in sample), None)
    if data is None:
        raise BadSampleError("no picture", f"none of the members .{', .'.join(EXTENSIONS)} is there")
    pixels = _plain_jpeg(data, resolution)
    if pixels is not None and channels == 3 and min(pixels.shape[:2]) == resolution:
        top, left = ((side - resolution) // 2 for side in pixels.shape[:2])
        return _channels_first(pixels[top : top + resolution, left : left + resolution])
    picture = _picture(data) if pixels is None else Image.fromarray(pixels)
    picture = picture.convert(_MODES[channels])
    if picture.size != (resolution, resolution):
        picture = ImageOps.fit(picture, (resolution, resolution), Image.Resampling.LANCZOS)
    cropped = np.array(picture)
    return torch.from_numpy(cropped)[None] if channels == 1 else _channels_first(cropped)


def _channels_first(pixels: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def _plain_jpeg(data: bytes | bytearray, resolution: int) -> NDArray[np.uint8] | None:
    """Return the pixels (H, W, 3) of a JPEG that needs no turning and no conversion; None for everything else.

    They are bit for bit those that Pillow gives, in about half its time; but from a picture of at least four times the
    resolution, at half, a quarter or an eighth of its size, which the decoder has for less than the whole.
    """
    if data[:2] != b"\xff\xd8" or data.find(b"Exif\0\0", 0, _HEAD_BYTES) >= 0:
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours not in ("YCbCr", "Gray") or height * width > (Image.MAX_IMAGE_PIXELS or height * width):
            return None
        shorter = min(height, width)
        side = {"min_height": 2 * resolution, "min_width": 2 * resolution} if shorter >= 4 * resolution else {}
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGB", min_factor=2 if side else 1, **side)
    except ValueError:  # what is wrong with it, if anything is, Pillow shall say
        return None
    return pixels


def _picture(data: bytes | bytearray) -> Image.Image:
    try:
        with Image.open(io.BytesIO(data)) as opened:
            opened.load()
            return _flatten(ImageOps.exif_transpose(opened) or opened)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
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
