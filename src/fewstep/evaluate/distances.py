"""Distances between two sets of features: kernel (KID) and Fréchet, each with its sampling error.

**Bootstrap of the kernel distance.** Drawing pictures with replacement puts copies of one picture into a sample, and
the kernel of a picture with its own copy is large: a plain bootstrap of the unbiased estimator is biased upwards.
Here a draw is a vector of weights (how often each picture was drawn) and every pair of a picture with itself, copies
included, is left out of the sums and of their divisor. The draws then centre on the estimate (a test holds it).
When both sets come from one distribution the estimator is degenerate and the interval is wider than need be, never
narrower (measured coverage in tests/evaluate/test_distances.py).

**Shared weights.** The weights come from a seed, so the draws of two methods judged on the same prompts and the same
real pictures belong together: differences and ratios of their distances are formed draw by draw, and what the methods
have in common cancels.

**Fréchet.** Its bias depends on the number of pictures, so a bootstrap (fewer different ones) shifts it. The interval
is that of a delete-one-group jackknife with 10 groups; the bias itself is shown by the real-against-real floor.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from fewstep.errors import DataError

#: Coverage of every interval in a report.
CONFIDENCE = 0.95
_NUM_JACKKNIFE_GROUPS = 10

Interval = tuple[float, float]


@dataclass(frozen=True)
class Estimate:
    """A metric with its sampling error.

    Attributes:
        value: the estimate.
        interval: its 95 % interval.
        draws: (num_bootstrap,) float64 values of the bootstrap draws; None where the interval comes from another way.
    """

    value: float
    interval: Interval
    draws: Tensor | None = None


def bootstrap_weights(count: int, *, num_bootstrap: int, seed: int) -> Tensor:
    """Return how often each of `count` items is in each draw with replacement, (num_bootstrap, count) float64."""
    # numpy: its multinomial stream is the same on every machine and under any number of threads.
    generator = np.random.default_rng(seed)
    weights = generator.multinomial(count, np.full(count, 1 / count), size=num_bootstrap)
    return torch.from_numpy(weights.astype(np.float64))


def percentile_interval(draws: Tensor) -> Interval:
    """Return the central 95 % of bootstrap draws, (num_bootstrap,)."""
    tail = (1 - CONFIDENCE) / 2
    low, high = torch.quantile(draws.double(), torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def polynomial_kernel(x: Tensor, y: Tensor) -> Tensor:
    """Return (x·y / d + 1)³ for all pairs, (m, n) float64 (Bińkowski et al., "Demystifying MMD GANs", eq. 2)."""
    return (x.double() @ y.double().T / x.shape[1] + 1) ** 3


def kid(x: Tensor, y: Tensor, *, paired: bool = False) -> float:
    """Return the unbiased squared maximum mean discrepancy with the kernel of KID; it may be negative.

    Args:
        x: features, (m, d).
        y: features, (n, d).
        paired: row i of x and row i of y share a prompt or a starting noise (m = n): the pairs (i, i) are then left out
            of the cross term, since they are not independent and would pull the distance below zero.

    Raises:
        DataError: fewer than two rows, different widths, or paired sets of different sizes.
    """
    ones_x, ones_y = torch.ones(1, x.shape[0], dtype=torch.float64), torch.ones(1, y.shape[0], dtype=torch.float64)
    return float(_weighted_kid(x, y, ones_x, ones_y, paired=paired))


def kid_with_interval(x: Tensor, y: Tensor, *, num_bootstrap: int, seed: int, paired: bool = False) -> Estimate:
    """Return KID with bootstrap draws; see the head of this file for how copies are handled.

    Args:
        x: features, (m, d).
        y: features, (n, d).
        num_bootstrap: number of draws.
        seed: of the weights. The weights of x depend on (seed, m) and those of y on (seed, n) alone.
        paired: as for `kid`; x and y are then drawn together.

    Raises:
        DataError: as for `kid`.
    """
    weights_x = bootstrap_weights(x.shape[0], num_bootstrap=num_bootstrap, seed=seed)
    weights_y = weights_x if paired else bootstrap_weights(y.shape[0], num_bootstrap=num_bootstrap, seed=seed + 1)
    draws = _weighted_kid(x, y, weights_x, weights_y, paired=paired)
    return Estimate(kid(x, y, paired=paired), percentile_interval(draws), draws)


def _weighted_kid(x: Tensor, y: Tensor, weights_x: Tensor, weights_y: Tensor, *, paired: bool) -> Tensor:
    _check_features(x, y, paired=paired)
    within_x = _mean_over_pairs(polynomial_kernel(x, x), weights_x, weights_x, same=True)
    within_y = _mean_over_pairs(polynomial_kernel(y, y), weights_y, weights_y, same=True)
    between = _mean_over_pairs(polynomial_kernel(x, y), weights_x, weights_y, same=paired)
    return within_x + within_y - 2 * between


def _mean_over_pairs(kernel: Tensor, rows: Tensor, columns: Tensor, *, same: bool) -> Tensor:
    """Return the weighted mean of the kernel over pairs, for each draw; `same`: pairs (i, i) do not count."""
    total, count = ((rows @ kernel) * columns).sum(1), rows.sum(1) * columns.sum(1)
    if same:
        both = rows * columns
        total, count = total - both @ kernel.diagonal(), count - both.sum(1)
    return total / count


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Return the Fréchet distance of Gaussians fitted to two sets of features, ≥ 0.

    |mean_x − mean_y|² + tr(C_x) + tr(C_y) − 2 tr((C_x C_y)^½), in float64. With C = FᵀF the last trace is the sum of
    the singular values of F_x F_yᵀ (the roots of the eigenvalues of the symmetric product C_x^½ C_y C_x^½): no
    matrix root is taken, and a singular covariance does no harm.

    Its bias grows as the number of pictures falls below the feature dimension: compare equal counts only.

    Args:
        x: features, (m, d).
        y: features, (n, d).

    Raises:
        DataError: fewer than two rows or different widths.
    """
    _check_features(x, y, paired=False)
    mean_x, factor_x = _mean_and_factor(x)
    mean_y, factor_y = _mean_and_factor(y)
    traces = factor_x.square().sum() + factor_y.square().sum()
    root = torch.linalg.svdvals(factor_x @ factor_y.T).sum()
    return max(float((mean_x - mean_y).square().sum() + traces - 2 * root), 0.0)


def frechet_with_interval(x: Tensor, y: Tensor, *, seed: int) -> Estimate:
    """Return the Fréchet distance with a 95 % interval of its random error at these counts (not of its bias).

    Delete-one-group jackknife: both sets are split at random into 10 groups, group k of both is left out in turn.

    Args:
        x: features, (m, d).
        y: features, (n, d).
        seed: of the split.

    Raises:
        DataError: fewer than 20 rows, or different widths.
    """
    smallest = min(x.shape[0], y.shape[0])
    if smallest < 2 * _NUM_JACKKNIFE_GROUPS:
        raise DataError(
            f"the Fréchet distance was given a set of {smallest} pictures; "
            f"its interval needs at least {2 * _NUM_JACKKNIFE_GROUPS} in each"
        )
    value = frechet_distance(x, y)
    groups_x, groups_y = _random_groups(x.shape[0], seed=seed), _random_groups(y.shape[0], seed=seed + 1)
    left_out = np.array(
        [frechet_distance(x[groups_x != group], y[groups_y != group]) for group in range(_NUM_JACKKNIFE_GROUPS)]
    )
    error = np.sqrt((_NUM_JACKKNIFE_GROUPS - 1) / _NUM_JACKKNIFE_GROUPS * np.square(left_out - left_out.mean()).sum())
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, _NUM_JACKKNIFE_GROUPS - 1) * error)
    return Estimate(value, (max(value - reach, 0.0), value + reach))


def mean_with_interval(values: Tensor, *, num_bootstrap: int, seed: int) -> Estimate:
    """Return the mean of one number a picture with bootstrap draws (weights as in `kid_with_interval`'s x).

    Args:
        values: (N,).
        num_bootstrap: number of draws.
        seed: of the weights.
    """
    weights = bootstrap_weights(values.shape[0], num_bootstrap=num_bootstrap, seed=seed)
    draws = weights @ values.double() / values.shape[0]
    return Estimate(float(values.double().mean()), percentile_interval(draws), draws)


def paired_mse(latents: Tensor, reference: Tensor) -> Tensor:
    """Return the mean squared difference of each picture's latents to its partner's, (N,) float64.

    Args:
        latents: (N, C, h, w), as the sampler leaves them.
        reference: the same shape, from the same prompts and starting noise.

    Raises:
        DataError: the shapes differ.
    """
    if latents.shape != reference.shape:
        raise DataError(
            f"the paired distance compares picture by picture, but the sets are {tuple(latents.shape)} and "
            f"{tuple(reference.shape)}: sample both from the same prompts and noise"
        )
    return (latents.double() - reference.double()).square().flatten(1).mean(1)


def real_against_real(features: Tensor, *, max_count: int, num_bootstrap: int, seed: int) -> dict[str, Estimate]:
    """Return `kid` and `fd` between two disjoint random halves of the real pictures: what "no difference" reads.

    Args:
        features: of real pictures, (N, d).
        max_count: pictures a half at most (the count of generated pictures, where there are enough).
        num_bootstrap: number of draws for KID.
        seed: of the split and the draws.

    Raises:
        DataError: fewer than 40 pictures.
    """
    count = min(features.shape[0] // 2, max_count)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(features.shape[0]))
    first, second = features[order[:count]], features[order[count : 2 * count]]
    return {
        "kid": kid_with_interval(first, second, num_bootstrap=num_bootstrap, seed=seed),
        "fd": frechet_with_interval(first, second, seed=seed),
    }


def _mean_and_factor(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean (d,) and an F with FᵀF = covariance (divisor n − 1), at most (d, d)."""
    features = features.double()
    mean = features.mean(0)
    factor = (features - mean) / (features.shape[0] - 1) ** 0.5
    if factor.shape[0] > factor.shape[1]:
        factor = torch.linalg.qr(factor, mode="r").R
    return mean, factor


def _random_groups(count: int, *, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).permutation(np.arange(count) % _NUM_JACKKNIFE_GROUPS))


def _check_features(x: Tensor, y: Tensor, *, paired: bool) -> None:
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise DataError(
            f"features must be (N, d) with one d for both sets, but {tuple(x.shape)} and {tuple(y.shape)} came"
        )
    if min(x.shape[0], y.shape[0]) < 2:
        raise DataError(f"a distance between sets needs two pictures in each, but {x.shape[0]} and {y.shape[0]} came")
    if paired and x.shape[0] != y.shape[0]:
        raise DataError(f"paired sets must have one size, but {x.shape[0]} and {y.shape[0]} pictures came")
