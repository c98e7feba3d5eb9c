"""The picture grid of one weight: rows are methods and steps, columns are classes, one noise a column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image
from torch import Tensor

from fewstep.errors import DataError
from fewstep.evaluate.classes.schema import METHOD_NAMES, ClassRowSpec
from fewstep.evaluate.sheet import SheetRow, SheetStyle, draw_sheet

_STYLE = SheetStyle(cell=64, gap=4, label_width=218, font=13)


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
    groups = [
        [SheetRow(METHOD_NAMES[spec.method], _note(spec, evaluations[spec]), grid[spec]) for spec in group]
        for group in _groups(list(grid))
    ]
    return draw_sheet(names, groups, style=_STYLE)


def _note(spec: ClassRowSpec, count: int) -> str:
    steps = f"{spec.num_inference_steps} step{'' if spec.num_inference_steps == 1 else 's'}"
    return f"{steps}, {count} evaluation{'' if count == 1 else 's'}"


def _groups(specs: Sequence[ClassRowSpec]) -> list[list[ClassRowSpec]]:
    order = list(METHOD_NAMES)
    groups = [[spec for spec in specs if spec.method == "teacher"]]
    for steps in sorted({spec.num_inference_steps for spec in specs}, reverse=True):
        group = [spec for spec in specs if spec.method != "teacher" and spec.num_inference_steps == steps]
        groups.append(sorted(group, key=lambda spec: order.index(spec.method)))
    return [group for group in groups if group]
