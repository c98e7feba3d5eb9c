"""How far an output is from its target, row by row."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

#: mse: mean squared error; pseudo_huber: sqrt(||Δ||² + c²) − c, which weighs large errors less.
ErrorName = Literal["mse", "pseudo_huber"]


def row_error(output: Tensor, target: Tensor, name: ErrorName = "mse") -> Tensor:
    """Return the error of each row, (B,), float32.

    pseudo_huber is Song & Dhariwal's (2024, "Improved techniques for training consistency models", §3.3) with their
    c = 0.00054 sqrt(d) for rows of d numbers, divided by d like the mean squared error.
    """
    squared = (output - target).square().flatten(1)
    if name == "mse":
        return squared.mean(dim=1)
    d = squared.shape[1]
    c = 0.00054 * d**0.5
    return ((squared.sum(dim=1) + c * c).sqrt() - c) / d
