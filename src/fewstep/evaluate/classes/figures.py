"""What is measured of one set of class-conditional pictures, each figure with its jackknife interval."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fewstep.errors import DataError
from fewstep.evaluate.classes.jackknife import NUM_GROUPS, Measured, measured, measured_share, two_sets
from fewstep.evaluate.distances import frechet_distance


def fd_classifier(features: Tensor, real: Tensor, *, groups: Tensor, real_groups: Tensor) -> Measured:
    """Return the Fréchet distance of two sets of the classifier's features, ≥ 0 (`distances.frechet_distance`).

    Args:
        features: of generated pictures, (N, d).
        real: of real pictures, (M, d).
        groups: of the generated pictures, (N,).
        real_groups: of the real pictures, (M,).

    Raises:
        DataError: different widths.
    """
    return two_sets(frechet_distance, features, real, groups_x=groups, groups_y=real_groups)


def classifier_score(probabilities: Tensor, *, groups: Tensor) -> Measured:
    """Return exp(mean over pictures of KL(p(y|x) ‖ p(y))), in 1 … K (Salimans et al. 2016, the form of IS).

    1 where the classifier says the same of every picture, K where it is sure of each and all K classes come equally
    often. p(y) is the mean over these pictures.

    Args:
        probabilities: of the classes, (N, K).
        groups: of the pictures, (N,).

    Raises:
        DataError: rows that are no probabilities.
    """
    rows = probabilities.double()
    if rows.ndim != 2 or rows.shape[0] < 1 or float((rows.sum(1) - 1).abs().max()) > 1e-4 or float(rows.min()) < 0:
        raise DataError(
            f"the score takes class probabilities (N, K), each row ≥ 0 with the sum 1, but {tuple(rows.shape)} "
            "of other values came: give softmax outputs, not logits"
        )
    # xlogy: a probability of 0 adds 0, not NaN.
    entropy = -torch.special.xlogy(rows, rows).sum(1)
    left_out = [_score(rows[groups != group], entropy[groups != group]) for group in range(NUM_GROUPS)]
    return measured(_score(rows, entropy), left_out, low=1.0, high=float(rows.shape[1]))


def class_accuracy(probabilities: Tensor, labels: Tensor, *, groups: Tensor) -> Measured:
    """Return the share of pictures that the classifier takes for the asked class.

    Args:
        probabilities: of the classes, (N, K).
        labels: asked classes, (N,).
        groups: of the pictures, (N,).

    Raises:
        DataError: the numbers differ.
    """
    if probabilities.shape[0] != labels.shape[0]:
        raise DataError(f"{probabilities.shape[0]} pictures and {labels.shape[0]} labels came: one label a picture")
    right = (probabilities.argmax(1) == labels).double()
    left_out = [float(right[groups != group].mean()) for group in range(NUM_GROUPS)]
    return measured_share(float(right.mean()), left_out, count=right.shape[0])


def _score(rows: Tensor, entropy: Tensor) -> float:
    # mean KL(p ‖ q) = H(q) − mean H(p) for q the mean of p.
    mean = rows.mean(0)
    return math.exp(float(-torch.special.xlogy(mean, mean).sum() - entropy.mean()))
