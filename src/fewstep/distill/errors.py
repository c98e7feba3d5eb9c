"""How far an output is from its target, row by row."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

#: mse: mean squared error; pseudo_huber: sqrt(||Δ||² + c²) − c, which weighs large errors less.
ErrorName = Literal["mse", "pseudo_huber"]

#: features: the mse, and a distance in the frozen teacher's features of where the step leads (`features.py`).
StepErrorName = Literal["mse", "pseudo_huber", "features"]


def row_error(output: Tensor, target: Tensor, name: ErrorName = "mse") -> Tensor:
    """Return the error of each row, (B,), float32.

    pseudo_huber is Song & Dhariwal's (2024, "Improved techniques for training consistency models", §3.3): sqrt(||Δ||² +
    c²) − c with their c = 0.00054 sqrt(d) for rows of d numbers, over all numbers of a row together. It is divided by
    d, like the mean squared error: a constant, which AdamW does not see but for the limit on the gradient's norm.
    Theirs compares x̂; here, as for the mean squared error, what is compared is the network's own output, and the loss
    weight is a factor on it. For a v-network at the noisiest time of zero terminal SNR both are the same.
    """
    squared = (output - target).square().flatten(1)
    if name == "mse":
        return squared.mean(dim=1)
    d = squared.shape[1]
    c = 0.00054 * d**0.5
    return ((squared.sum(dim=1) + c * c).sqrt() - c) / d


def as_large_as(error: Tensor, other: Tensor) -> Tensor:
    """Return errors (B,) scaled to the size of others, row by row: the numbers are theirs, the gradients their own."""
    return error * (other.detach() / error.detach().clamp_min(1e-12))
