"""The picture grid: rows are methods and steps, columns are prompts."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fewstep.evaluate.baselines import METHOD_NAMES, RowSpec

_CELL_PX = 128
_GAP_PX = 8
_GROUP_GAP_PX = 18
_LABEL_WIDTH_PX = 190
_FONT_PX = 15
_INK, _SOFT_INK, _PAPER, _LINE = "#1c2330", "#667085", "#ffffff", "#e4e7ec"


def to_pil(image: Tensor, *, size_px: int = _CELL_PX) -> Image.Image:
    """Return a picture, uint8 (3, H, W), enlarged by a whole factor (hard pixels) to about `size_px`."""
    height, width = image.shape[1:]
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    factor = max(1, round(size_px / max(height, width)))
    return picture.resize((width * factor, height * factor), Image.Resampling.NEAREST)


def row_label(spec: RowSpec) -> str:
    """Return a row's name for people, for example "student, 4 steps"."""
    steps = "1 step" if spec.num_inference_steps == 1 else f"{spec.num_inference_steps} steps"
    return f"{METHOD_NAMES[spec.method]}, {steps}"


def grid_order(specs: Sequence[RowSpec]) -> list[list[RowSpec]]:
    """Return the rows in groups: the reference alone, then one group for each number of steps, the student first."""
    order = {"student": 0, "dpmpp": 1, "ddim": 2}
    rest = [spec for spec in specs if spec.method != "teacher"]
    steps = sorted({spec.num_inference_steps for spec in rest}, reverse=True)
    groups = [[spec for spec in specs if spec.method == "teacher"]]
    groups += [
        sorted((spec for spec in rest if spec.num_inference_steps == n), key=lambda spec: order[spec.method])
        for n in steps
    ]
    return [group for group in groups if group]


def draw_grid(
    grid: Mapping[RowSpec, Tensor],
    prompts: Sequence[str],
    *,
    evaluations: Mapping[RowSpec, int],
    given: Tensor | None = None,
) -> Image.Image:
    """Return the labelled grid.

    Args:
        grid: pictures of each row, uint8 (K, 3, H, W).
        prompts: K of them.
        evaluations: network evaluations a picture of each row, for its label.
        given: of inpainting, the pictures with grey holes, uint8 (K, 3, H, W).
    """
    font, small = ImageFont.load_default(_FONT_PX), ImageFont.load_default(_FONT_PX - 3)
    # Groups of rows: label, note and pictures of each.
    groups = [[_labelled(spec, grid[spec], evaluations[spec]) for spec in group] for group in grid_order(list(grid))]
    if given is not None:
        groups.insert(0, [("given", "the grey part is filled", [to_pil(image) for image in given])])
    cell_width, cell_height = groups[0][0][2][0].size
    wrapped = ["\n".join(textwrap.wrap(prompt, max(10, cell_width // 7))) for prompt in prompts]
    header_px = (1 + max(text.count("\n") for text in wrapped)) * (_FONT_PX + 1) + 2 * _GAP_PX
    height = header_px + sum(len(group) * (cell_height + _GAP_PX) + _GROUP_GAP_PX for group in groups)
    width = _LABEL_WIDTH_PX + len(prompts) * (cell_width + _GAP_PX) + _GAP_PX
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, text in enumerate(wrapped):
        left = _LABEL_WIDTH_PX + column * (cell_width + _GAP_PX)
        draw.multiline_text((left, _GAP_PX), text, fill=_INK, font=small, spacing=2)
    top = header_px
    for group in groups:
        for label, note, cells in group:
            middle = top + cell_height // 2
            draw.text((_GAP_PX, middle - 3), label, fill=_INK, font=font, anchor="ls")
            draw.text((_GAP_PX, middle + 3), note, fill=_SOFT_INK, font=small, anchor="lt")
            for column, cell in enumerate(cells):
                left = _LABEL_WIDTH_PX + column * (cell_width + _GAP_PX)
                # Most pictures are on white: without a line they run into one another.
                draw.rectangle((left - 1, top - 1, left + cell_width, top + cell_height), outline=_LINE)
                sheet.paste(cell, (left, top))
            top += cell_height + _GAP_PX
        top += _GROUP_GAP_PX
    return sheet


def _labelled(spec: RowSpec, images: Tensor, count: int) -> tuple[str, str, list[Image.Image]]:
    note = f"{count} network evaluation{'' if count == 1 else 's'}"
    return row_label(spec), note, [to_pil(image) for image in images]
