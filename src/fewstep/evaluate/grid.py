"""The picture grid: rows are methods and steps, columns are prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image
from torch import Tensor

from fewstep.evaluate.baselines import METHOD_NAMES, RowSpec
from fewstep.evaluate.sheet import SheetRow, draw_sheet, evaluations_note


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
    groups = [
        [SheetRow(row_label(spec), evaluations_note(evaluations[spec]), grid[spec]) for spec in group]
        for group in grid_order(list(grid))
    ]
    if given is not None:
        groups.insert(0, [SheetRow("given", "the grey part is filled", given)])
    return draw_sheet(prompts, groups)
