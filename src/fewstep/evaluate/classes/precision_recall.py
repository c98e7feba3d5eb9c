"""Improved precision and recall (Kynkäänniemi et al. 2019, "Improved Precision and Recall Metric", eqs. 1 and 2).

The manifold of a set of features is the union of balls around them, each reaching to its k-th nearest neighbour in the
set (k = 3). **Precision** = share of generated pictures inside the manifold of the real ones; **recall** = share of
real pictures inside the manifold of the generated ones. Both depend on how many pictures there are, so both sets have
one size, and rows of different counts must not be compared.

Leaving a group out removes its pictures from the queries, from the balls, and from the neighbours that set the radii.
The k nearest are kept for each group of neighbours, so that all ten sets of radii come from one pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.errors import DataError
from fewstep.evaluate.classes.jackknife import NUM_GROUPS, Measured, measured_share

#: Neighbours that set the radius, as in the paper.
NEIGHBOURS = 3
_CHUNK_ROWS = 500


@dataclass(frozen=True)
class Manifold:
    """The balls around a set of features.

    Attributes:
        centres: (N, d) float64.
        groups: of the centres, (N,).
        square_radii: (1 + 10, N) float64; row 0 of all pictures, row 1 + k without group k. A ball whose centre is
            itself in group k has −1 there, so that nothing is inside.
    """

    centres: Tensor
    groups: Tensor
    square_radii: Tensor


def make_manifold(features: Tensor, groups: Tensor, *, neighbours: int = NEIGHBOURS) -> Manifold:
    """Return the manifold of a set of features.

    Args:
        features: (N, d).
        groups: of the features, (N,), from `make_groups`.
        neighbours: k, which sets the radii.

    Raises:
        DataError: another shape, or too few pictures to have k neighbours when a group is left out.
    """
    if features.ndim != 2 or groups.shape != features.shape[:1]:
        raise DataError(
            f"features must be (N, d) with one group each, but {tuple(features.shape)} and {tuple(groups.shape)} came"
        )
    counts = torch.bincount(groups, minlength=NUM_GROUPS)
    remaining = int(features.shape[0] - counts.max())
    if neighbours < 1 or remaining <= neighbours:
        raise DataError(
            f"neighbours={neighbours}, but only {remaining} of {features.shape[0]} pictures are left when a group is "
            "left out: give more pictures, or ask for fewer neighbours (at least 1)"
        )
    centres = features.double()
    slack, nearest = _slack(centres), []
    for start in range(0, len(centres), _CHUNK_ROWS):
        squares = _square_distances(centres[start : start + _CHUNK_ROWS], centres)
        rows = torch.arange(squares.shape[0])
        squares[rows, start + rows] = torch.inf
        nearest.append(torch.stack([_smallest(squares[:, groups == group], neighbours) for group in range(NUM_GROUPS)]))
    by_group = torch.cat(nearest, dim=1)
    every = torch.arange(NUM_GROUPS)
    without = [_kth(by_group[every != left_out], neighbours) for left_out in range(NUM_GROUPS)]
    radii = torch.stack([_kth(by_group, neighbours), *without]) + slack
    # A centre that is left out holds nothing.
    radii[1:][every[:, None] == groups] = -1
    return Manifold(centres, groups, radii)


def precision_and_recall(generated: Manifold, real: Manifold) -> tuple[Measured, Measured]:
    """Return precision and recall with their intervals.

    Args:
        generated: of the generated pictures.
        real: of as many real ones, with the same number of neighbours.

    Raises:
        DataError: sets of different sizes or widths.
    """
    if generated.centres.shape != real.centres.shape:
        raise DataError(
            f"precision and recall depend on the number of pictures: both sets must be (N, d) of one N and d, but "
            f"{tuple(generated.centres.shape)} and {tuple(real.centres.shape)} came"
        )
    return _share_inside(generated, real), _share_inside(real, generated)


def _share_inside(queries: Manifold, manifold: Manifold) -> Measured:
    """Return the share of one set's centres that lie in the other's manifold."""
    inside = torch.cat([_inside(rows, manifold) for rows in queries.centres.split(_CHUNK_ROWS)], dim=1).double()
    left_out = [float(inside[1 + group][queries.groups != group].mean()) for group in range(NUM_GROUPS)]
    return measured_share(float(inside[0].mean()), left_out, count=inside.shape[1])


def _inside(rows: Tensor, manifold: Manifold) -> Tensor:
    """Return whether each of B points is in a ball, (1 + 10, B) bool, for each set of radii."""
    squares = _square_distances(rows, manifold.centres)
    return torch.stack([(squares <= radii).any(dim=1) for radii in manifold.square_radii])


def _square_distances(x: Tensor, y: Tensor) -> Tensor:
    # By a matrix product: 128 differences for each pair would take ten times as long.
    return (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T).clamp_min(0)


def _slack(centres: Tensor) -> float:
    """Return what the product above can be wrong by: without it, copies of one picture would miss one another."""
    return 1e-12 * float(centres.square().sum(1).max())


def _smallest(squares: Tensor, count: int) -> Tensor:
    """Return the `count` smallest of each row, (B, count); infinity where there are fewer."""
    found = squares.topk(min(count, squares.shape[1]), dim=1, largest=False).values
    return torch.nn.functional.pad(found, (0, count - found.shape[1]), value=torch.inf)


def _kth(by_group: Tensor, neighbours: int) -> Tensor:
    """Return the k-th smallest over the groups, (N,), of (groups, N, k)."""
    together = by_group.permute(1, 0, 2).flatten(1)
    return together.kthvalue(neighbours, dim=1).values
