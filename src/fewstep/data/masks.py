"""Random holes for inpainting: the large masks that LaMa was trained with.

Source: Suvorov et al., "Resolution-robust Large Mask Inpainting with Fourier Convolutions", WACV 2022, on generating
masks during training, with the settings of the authors' data configuration `abl-04-256-mh-dist`, which LaMa-Fourier and
Big-LaMa share: with equal chance a few wide polygonal chains or a few boxes.

Share of the picture that 1,000 masks of the default settings cover, measured with the seeds 0 to 999:

| side in px | mean | least | 5 % | 25 % | 50 % | 75 % | 95 % | most |
|---|---|---|---|---|---|---|---|---|
| 256 | 0.359 | 0.018 | 0.069 | 0.208 | 0.328 | 0.490 | 0.735 | 0.915 |
| 32 | 0.361 | 0.013 | 0.067 | 0.208 | 0.333 | 0.498 | 0.737 | 0.924 |
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageDraw
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from fewstep.errors import DataError

#: Sizes in the settings are for pictures of this side, and grow with the shorter side of others.
REFERENCE_PX = 256

_MIN_PX = 8
_MAX_TRIES = 100


class MaskSettings(BaseModel):
    """How holes are drawn. Lengths are in pixels of a picture whose shorter side has 256.

    The defaults are what LaMa draws. Two published keys read otherwise in its code, and stand here as they act: lengths
    and widths are added to 10 and 5 (max_len 200 gives up to 209, max_width 100 up to 104), and max_times 5 of the
    strokes gives up to 6.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    box_probability: float = Field(0.5, ge=0, le=1, description="chance that a mask is of boxes; else it is of strokes")
    min_strokes: int = Field(1, ge=1, description="fewest strokes in a mask of strokes")
    max_strokes: int = Field(6, ge=1, description="most strokes")
    max_segments: int = Field(5, ge=1, description="most straight segments in a stroke; at least 1")
    max_angle: int = Field(4, ge=1, description="directions of a segment: whole numbers of radians below this")
    min_length: int = Field(10, ge=1, description="shortest segment, in px of 256")
    max_length: int = Field(209, ge=1, description="longest segment, in px of 256")
    min_width: int = Field(5, ge=1, description="thinnest segment, in px of 256")
    max_width: int = Field(104, ge=1, description="thickest segment, in px of 256")
    min_boxes: int = Field(1, ge=1, description="fewest boxes in a mask of boxes")
    max_boxes: int = Field(4, ge=1, description="most boxes")
    min_box_size: int = Field(30, ge=1, description="shortest side of a box, in px of 256")
    max_box_size: int = Field(150, ge=1, description="longest side of a box, in px of 256")
    box_margin: int = Field(10, ge=0, description="border that boxes leave free, in px of 256")

    @model_validator(mode="after")
    def _check(self) -> MaskSettings:
        for name in ("strokes", "length", "width", "boxes", "box_size"):
            low, high = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if low > high:
                raise ValueError(f"min_{name}={low} is more than max_{name}={high}: lower the one or raise the other")
        if self.max_box_size + 2 * self.box_margin > REFERENCE_PX:
            raise ValueError(
                f"max_box_size={self.max_box_size} with box_margin={self.box_margin} on both sides does not fit into "
                f"{REFERENCE_PX} px: lower one of them"
            )
        return self


def random_mask(
    height: int, width: int, *, settings: MaskSettings, generator: np.random.Generator | torch.Generator
) -> Tensor:
    """Return a mask (1, height, width) of bool, True where the hole is: at least one pixel, and never all.

    The same state of the generator gives the same hole at every resolution, to the rounding of its edges.

    Args:
        height, width: size in pixels, at least 8.
        settings: how holes are drawn.
        generator: of NumPy, or of torch on the CPU, from which one number is drawn.

    Raises:
        DataError: the size is too small, or these settings fill the whole picture again and again.
        ValueError: the generator is on a GPU.
    """
    if min(height, width) < _MIN_PX:
        raise DataError(f"a mask of {width} × {height} is too small to draw in: each side must have {_MIN_PX} px")
    if isinstance(generator, torch.Generator):
        if generator.device.type != "cpu":
            raise ValueError(f"the generator is on {generator.device}: masks are drawn on the CPU, give one of there")
        generator = np.random.default_rng(int(torch.randint(2**63 - 1, (), generator=generator)))
    for _ in range(_MAX_TRIES):
        # The kind is drawn even where it is certain, so that both kinds on their own show what they are when mixed.
        draw: Callable[..., None] = _draw_boxes if generator.random() < settings.box_probability else _draw_strokes
        picture = Image.new("L", (width, height))
        draw(ImageDraw.Draw(picture), height, width, settings=settings, rng=generator)
        mask = np.array(picture, dtype=bool)
        if not mask.all():
            return torch.from_numpy(mask)[None]
    raise DataError(
        f"{_MAX_TRIES} masks in turn left nothing of the picture of {width} × {height} to see: "
        "lower max_strokes, max_width or min_width in the mask settings"
    )


def _draw_strokes(
    draw: ImageDraw.ImageDraw, height: int, width: int, *, settings: MaskSettings, rng: np.random.Generator
) -> None:
    """Draw chains of straight segments with round ends, each segment of its own width."""
    scale = min(height, width) / REFERENCE_PX
    for stroke in range(rng.integers(settings.min_strokes, settings.max_strokes, endpoint=True)):
        x, y = rng.random() * width, rng.random() * height
        for _ in range(rng.integers(1, settings.max_segments, endpoint=True)):
            angle = float(rng.integers(settings.max_angle)) + 0.01
            length = scale * rng.integers(settings.min_length, settings.max_length, endpoint=True)
            thickness = max(1, round(scale * rng.integers(settings.min_width, settings.max_width, endpoint=True)))
            # Every other stroke turns the other way round.
            across = length * math.sin(angle) * (1 if stroke % 2 else -1)
            end = (min(max(x + across, 0), width - 1), min(max(y + length * math.cos(angle), 0), height - 1))
            _draw_segment(draw, (int(x), int(y)), (int(end[0]), int(end[1])), thickness)
            x, y = end


def _draw_segment(draw: ImageDraw.ImageDraw, start: tuple[int, int], end: tuple[int, int], thickness: int) -> None:
    draw.line([start, end], fill=1, width=thickness)
    radius = (thickness - 1) / 2
    for x, y in (start, end):
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=1)


def _draw_boxes(
    draw: ImageDraw.ImageDraw, height: int, width: int, *, settings: MaskSettings, rng: np.random.Generator
) -> None:
    """Draw filled boxes, which may overlap, inside the margin."""
    scale = min(height, width) / REFERENCE_PX
    margin = scale * settings.box_margin
    for _ in range(rng.integers(settings.min_boxes, settings.max_boxes, endpoint=True)):
        across, down = scale * rng.integers(settings.min_box_size, settings.max_box_size, size=2, endpoint=True)
        left = margin + rng.random() * (width - 2 * margin - across)
        top = margin + rng.random() * (height - 2 * margin - down)
        right, bottom = round(left + across) - 1, round(top + down) - 1  # Pillow's boxes have their last pixel too
        left, top = min(round(left), right), min(round(top), bottom)
        draw.rectangle([left, top, right, bottom], fill=1)


def mask_of(key: str, resolution: int, *, settings: MaskSettings, seed: int) -> Tensor:
    """Return the mask of a sample, (1, resolution, resolution) of bool, True where the hole is.

    It belongs to its sample: encoding the shard again, or another one before it, draws the same.

    Args:
        key: of the sample.
        resolution: side of the pictures in pixels.
        settings: how holes are drawn.
        seed: of all masks.
    """
    digest = hashlib.blake2b(f"{seed}/{key}".encode("utf-8", "surrogateescape"), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return random_mask(resolution, resolution, settings=settings, generator=generator)
