"""From a webdataset sample to pixels and a caption."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from fewstep.data.source import BadSampleError, Sample

_EXTENSIONS = ("png", "jpg", "jpeg", "webp")


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
    data = next((sample[extension] for extension in _EXTENSIONS if extension in sample), None)
    if data is None:
        raise BadSampleError("no picture", f"none of the members .{', .'.join(_EXTENSIONS)} is there")
    try:
        with Image.open(io.BytesIO(data)) as opened:
            opened.load()
            picture = _flatten(ImageOps.exif_transpose(opened) or opened)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadSampleError("broken picture", str(error)) from error
    if picture.size != (resolution, resolution):
        picture = ImageOps.fit(picture, (resolution, resolution), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
    return {"key": sample["__key__"], "caption": caption, "pixels": pixels}


def _flatten(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):
        # Grey of 16 bits: Pillow's own conversion cuts at 255 where it should scale, and leaves white.
        picture = Image.fromarray((np.asarray(picture) // 257).clip(0, 255).astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        drawn = picture.convert("RGBA")
        white = Image.new("RGBA", drawn.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(white, drawn)
    return picture.convert("RGB")
