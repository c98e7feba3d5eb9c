"""The picture grid of one weight: rows are methods and steps, columns are classes, one noise a column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fewstep.errors import DataError
from fewstep.evaluate.classes.schema import METHOD_NAMES, ClassRowSpec
from fewstep.evaluate.grid import to_pil

_CELL_PX = 64
_GAP_PX, _GROUP_GAP_PX = 4, 14
_LABEL_WIDTH_PX = 218
_FONT_PX = 13
_INK, _SOFT_INK, _PAPER, _LINE = "#1c2330", "#667085", "#ffffff", "#e4e7ec"


def draw_class_grid(
    grid: Mapping[ClassRowSpec, Tensor], names: Sequence[str], *, evaluations: Mapping[ClassRowSpec, int]
) -> Image.Image:
    """Return the labelled grid; the many-step teacher on top, then the steps from many to few.

    Args:
        grid: pictures of each row, uint8 (K, C, H, W) with C = 1 or 3; all rows of one w.
        names: of the K classes.
        evaluations: network evaluations a picture of each row.

    Raises:
        DataError: no rows, or pictures that are neither grey nor RGB.
    """
    if not grid or any(images.shape[1] not in (1, 3) for images in grid.values()):
        shapes = sorted({tuple(images.shape) for images in grid.values()})
        raise DataError(f"a picture grid shows rows of grey or RGB pictures (K, 1 or 3, H, W), but {shapes} came")
    font, small = ImageFont.load_default(_FONT_PX), ImageFont.load_default(_FONT_PX - 2)
    cells = {spec: [to_pil(_rgb(image), size_px=_CELL_PX) for image in images] for spec, images in grid.items()}
    cell_width, cell_height = next(iter(cells.values()))[0].size
    groups = _groups(list(grid))
    top = _FONT_PX + 3 * _GAP_PX
    height = top + sum(len(group) * (cell_height + _GAP_PX) + _GROUP_GAP_PX for group in groups)
    sheet = Image.new("RGB", (_LABEL_WIDTH_PX + len(names) * (cell_width + _GAP_PX) + _GAP_PX, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, name in enumerate(names):
        left = _LABEL_WIDTH_PX + column * (cell_width + _GAP_PX)
        draw.text((left, _GAP_PX), _shortened(name, cell_width, small), fill=_INK, font=small)
    for group in groups:
        for spec in group:
            middle, count = top + cell_height // 2, evaluations[spec]
            draw.text((_GAP_PX, middle - 2), METHOD_NAMES[spec.method], fill=_INK, font=font, anchor="ls")
            steps = f"{spec.num_inference_steps} step{'' if spec.num_inference_steps == 1 else 's'}"
            note = f"{steps}, {count} evaluation{'' if count == 1 else 's'}"
            draw.text((_GAP_PX, middle + 3), note, fill=_SOFT_INK, font=small, anchor="lt")
            for column, cell in enumerate(cells[spec]):
                left = _LABEL_WIDTH_PX + column * (cell_width + _GAP_PX)
                draw.rectangle((left - 1, top - 1, left + cell_width, top + cell_height), outline=_LINE)
                sheet.paste(cell, (left, top))
            top += cell_height + _GAP_PX
        top += _GROUP_GAP_PX
    return sheet


def _groups(specs: Sequence[ClassRowSpec]) -> list[list[ClassRowSpec]]:
    order = list(METHOD_NAMES)
    groups = [[spec for spec in specs if spec.method == "teacher"]]
    for steps in sorted({spec.num_inference_steps for spec in specs}, reverse=True):
        group = [spec for spec in specs if spec.method != "teacher" and spec.num_inference_steps == steps]
        groups.append(sorted(group, key=lambda spec: order.index(spec.method)))
    return [group for group in groups if group]


def _rgb(image: Tensor) -> Tensor:
    return image.expand(3, -1, -1)


def _shortened(text: str, width_px: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    if font.getlength(text) <= width_px:
        return text
    while len(text) > 1 and font.getlength(text + "…") > width_px:
        text = text[:-1]
    return text + "…"
