"""Aspect-ratio buckets: the few sizes that training pictures are cropped to, so that little of any is cut off.

As in NovelAI's training ("NovelAI Improvements on Stable Diffusion", 2022) and Stable Diffusion XL's (Podell et al.
2023, appendix I): sides are multiples of a number of pixels, no size has more pixels than the square, and a picture
goes to the size whose aspect ratio is nearest to its own.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

from pydantic import BaseModel, ConfigDict, Field

from fewstep.errors import DataError

#: Width and height in pixels.
Size = tuple[int, int]


class BucketSettings(BaseModel):
    """Which sizes there are."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_aspect_ratio: float = Field(
        2.0, gt=1, le=16, allow_inf_nan=False, description="longer side by shorter side, at most"
    )
    multiple_of: int = Field(
        64,
        ge=1,
        description="sides are multiples of so many pixels, itself a multiple of the factor by which VAE and U-Net "
        "divide them (64 in Stable Diffusion 1.5, 32 in XL)",
    )


def bucket_sizes(resolution: int, settings: BucketSettings) -> tuple[Size, ...]:
    """Return the sizes from the narrowest to the widest: for each width the largest height with which it has no more
    than resolution² pixels, and the same turned, as far as the aspect ratio is allowed.

    Args:
        resolution: side of the square, which is one of them.
        settings: see there.

    Raises:
        DataError: the square is no such size, or the only one.
    """
    unit = settings.multiple_of
    if resolution % unit:
        raise DataError(
            f"encode.buckets.multiple_of={unit} does not divide the model's resolution of {resolution} pixels: take a "
            "number that does"
        )
    side = resolution // unit
    upright = {(width, side * side // width) for width in range(1, side + 1)}
    limit = Fraction(str(settings.max_aspect_ratio))
    allowed = {(width, height) for width, height in upright if height <= limit * width}
    sizes = allowed | {(height, width) for width, height in allowed}
    if len(sizes) == 1:
        raise DataError(
            f"encode.buckets have no size beside the square of {resolution} pixels: raise max_aspect_ratio "
            f"({settings.max_aspect_ratio:g}), or lower multiple_of ({unit})"
        )
    return tuple((unit * width, unit * height) for width, height in sorted(sizes, key=lambda size: Fraction(*size)))


def bucket_of(width: int, height: int, sizes: Sequence[Size]) -> Size:
    """Return the size for a picture: that of the nearest log aspect ratio, the narrower one of two equally near.

    Args:
        width, height: of the picture, turned as it is looked at.
        sizes: from the narrowest to the widest.
    """
    # Between neighbours of aspect a < b the border is √(a·b); squared and in whole numbers, no rounding decides.
    borders = [Fraction(a[0] * b[0], a[1] * b[1]) for a, b in pairwise(sizes)]
    return sizes[bisect_left(borders, Fraction(width * width, height * height))]
