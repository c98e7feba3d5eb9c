"""Shards to measure with: pictures that are as hard to decode as photographs, and latents."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance

from fewstep.data.latents import latent_sample

_CAPTION = "a photograph of a temple by the water, or of a red flower, in afternoon light"
#: Width over height; img2dataset keeps it and makes the shorter side the resolution.
_ASPECTS = (1.0, 1.0, 1.0, 4 / 3, 3 / 4, 3 / 2, 2 / 3)


def picture_samples(count: int, *, resolution: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Yield samples as img2dataset writes them: JPEG of quality 90, caption, metadata.

    The pictures are parts of scikit-learn's two photographs, at random places and sizes, with other colours and grain.

    Args:
        count: of samples.
        resolution: shorter side in pixels.
        seed: of everything.
    """
    for number in range(count):
        key = f"{number:09d}"
        data, (width, height) = _picture(number, resolution, seed)
        record = {
            "caption": _CAPTION, "url": f"https://example.org/{key}.jpg", "key": key, "status": "success",
            "error_message": None, "width": width, "height": height, "original_width": 2 * width,
            "original_height": 2 * height, "exif": "{}", "sha256": f"{number:064x}",
        }  # fmt: skip
        yield {"__key__": key, "jpg": data, "txt": _CAPTION.encode(), "json": json.dumps(record).encode()}


def latent_samples(count: int, *, side: int = 64, tokens: int = 77, width: int = 768) -> Iterator[dict[str, Any]]:
    """Yield samples of cached latents (4, side, side) with text embeddings (tokens, width): random numbers."""
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        mean, std = torch.randn(2, 4, side, side, generator=generator)
        text = torch.randn(tokens, width, generator=generator)
        yield latent_sample(f"{number:09d}", _CAPTION, mean, std, {"text": text})


@cache
def _photographs() -> list[Image.Image]:
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(pixels) for pixels in load_sample_images().images]


def _picture(number: int, resolution: int, seed: int) -> tuple[bytes, tuple[int, int]]:
    draw = random.Random(f"{seed}/{number}")
    photograph = draw.choice(_photographs())
    if draw.random() < 0.5:
        photograph = photograph.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    aspect = draw.choice(_ASPECTS)
    height = photograph.height * draw.uniform(0.45, 1.0)
    width = height * aspect
    if width > photograph.width:
        width, height = photograph.width, photograph.width / aspect
    left, top = draw.uniform(0, photograph.width - width), draw.uniform(0, photograph.height - height)
    size = (resolution, round(resolution / aspect)) if aspect <= 1 else (round(resolution * aspect), resolution)
    part = photograph.resize(size, Image.Resampling.LANCZOS, box=(left, top, left + width, top + height))
    part = ImageEnhance.Color(part).enhance(draw.uniform(0.5, 1.5))
    part = ImageEnhance.Brightness(part).enhance(draw.uniform(0.7, 1.2))
    grain = np.random.default_rng([seed, number]).normal(0, 4, (size[1], size[0], 1))
    pixels = (np.asarray(part) + grain).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue(), size
