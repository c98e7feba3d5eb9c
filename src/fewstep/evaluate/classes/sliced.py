"""Sliced Wasserstein distance: for clouds of few dimensions, where a Gaussian (Fréchet) sees too little."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fewstep.errors import DataError


def sliced_wasserstein(x: Tensor, y: Tensor, *, num_directions: int = 128, seed: int = 0) -> float:
    """Return the sliced 2-Wasserstein distance of two clouds, ≥ 0 (Bonneel et al. 2015, eq. 7).

    The root of the mean over directions of the squared 1-D distance, which is exact: between the two quantile
    functions, also of clouds of different sizes. A shift by δ of a cloud in d dimensions reads |δ|/√d. In the plane the
    directions are evenly spaced (then exact for a shift); in more dimensions they are drawn from the seed.

    Args:
        x: (m, d).
        y: (n, d).
        num_directions: at least 3.
        seed: of the directions, from three dimensions on.

    Raises:
        DataError: empty clouds, different or unfit widths, or too few directions.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or 0 in (*x.shape, *y.shape):
        raise DataError(
            f"clouds must be (N, d) with one d for both and N ≥ 1, but {tuple(x.shape)} and {tuple(y.shape)} came"
        )
    if num_directions < 3:
        raise DataError(f"num_directions={num_directions}: fewer than 3 do not span a plane; 128 are the default")
    directions = _directions(x.shape[1], num_directions, seed)
    first, second = (x.double() @ directions).sort(dim=0).values, (y.double() @ directions).sort(dim=0).values
    left, right, width = _common_steps(x.shape[0], y.shape[0])
    squares = width @ (first[left] - second[right]).square()
    return math.sqrt(float(squares.mean()))


def _directions(dim: int, count: int, seed: int) -> Tensor:
    """Return unit vectors, (dim, count) float64."""
    if dim == 2:
        angles = torch.arange(count, dtype=torch.float64) * (math.pi / count)
        return torch.stack([angles.cos(), angles.sin()])
    drawn = torch.from_numpy(np.random.default_rng(seed).standard_normal((dim, count)))
    return drawn / drawn.norm(dim=0)


def _common_steps(m: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return where the steps of two quantile functions lie: index into m, index into n, width (they add up to 1)."""
    # In units of 1/(mn) all edges are whole numbers.
    edges = torch.cat([torch.arange(m + 1) * n, torch.arange(n + 1) * m]).unique()
    starts = edges[:-1]
    return starts // n, starts // m, (edges[1:] - starts).double() / (m * n)
