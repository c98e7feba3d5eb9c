"""A labelled sheet of pictures: rows in groups, one column for each prompt or class."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_GROUP_GAP_PX = 18
_INK, _SOFT_INK, _PAPER, _LINE = "#1c2330", "#667085", "#ffffff", "#e4e7ec"


@dataclass(frozen=True)
class SheetRow:
    """A row of a sheet.

    Attributes:
        label: its name.
        note: in small under it.
        pictures: one a column, uint8 (K, C, H, W) with C = 1 or 3.
    """

    label: str
    note: str
    pictures: Tensor


@dataclass(frozen=True)
class SheetStyle:
    """Sizes of a sheet, in pixels."""

    cell: int = 128
    gap: int = 8
    label_width: int = 190
    font: int = 15


def to_pil(image: Tensor, *, size_px: int = SheetStyle.cell) -> Image.Image:
    """Return a picture, uint8 (C, H, W) with C = 1 or 3, as RGB, enlarged by a whole factor (hard pixels) to about
    `size_px`."""
    height, width = image.shape[1:]
    picture = Image.fromarray(image.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())
    factor = max(1, round(size_px / max(height, width)))
    return picture.resize((width * factor, height * factor), Image.Resampling.NEAREST)


def draw_sheet(
    columns: Sequence[str], groups: Sequence[Sequence[SheetRow]], *, style: SheetStyle | None = None
) -> Image.Image:
    """Return the sheet.

    Args:
        columns: K headings, wrapped to the width of a picture.
        groups: rows, with a gap after each group; at least one row.
        style: sizes.
    """
    style = style or SheetStyle()
    font, small = ImageFont.load_default(style.font), ImageFont.load_default(style.font - 3)
    cells = [[[to_pil(image, size_px=style.cell) for image in row.pictures] for row in group] for group in groups]
    cell_width, cell_height = cells[0][0][0].size
    wrapped = ["\n".join(textwrap.wrap(text, max(10, cell_width // 7))) for text in columns]
    header_px = (1 + max(text.count("\n") for text in wrapped)) * (style.font + 1) + 2 * style.gap
    height = header_px + sum(len(group) * (cell_height + style.gap) + _GROUP_GAP_PX for group in groups)
    width = style.label_width + len(columns) * (cell_width + style.gap) + style.gap
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, text in enumerate(wrapped):
        left = style.label_width + column * (cell_width + style.gap)
        draw.multiline_text((left, style.gap), text, fill=_INK, font=small, spacing=2)
    top = header_px
    for group, of_group in zip(groups, cells, strict=True):
        for row, pictures in zip(group, of_group, strict=True):
            middle = top + cell_height // 2
            draw.text((style.gap, middle - 3), row.label, fill=_INK, font=font, anchor="ls")
            draw.text((style.gap, middle + 3), row.note, fill=_SOFT_INK, font=small, anchor="lt")
            for column, picture in enumerate(pictures):
                left = style.label_width + column * (cell_width + style.gap)
                # Most pictures are on white: without a line they run into one another.
                draw.rectangle((left - 1, top - 1, left + cell_width, top + cell_height), outline=_LINE)
                sheet.paste(picture, (left, top))
            top += cell_height + style.gap
        top += _GROUP_GAP_PX
    return sheet


def evaluations_note(count: int) -> str:
    """Return how many evaluations of the network a picture of a row took, in words."""
    return f"{count} network evaluation{'' if count == 1 else 's'}"
