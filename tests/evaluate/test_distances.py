"""Distances on sets whose distance is known, and the coverage of their intervals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewstep.errors import DataError
from fewstep.evaluate import distances

DIM = 6


def normal(count: int, *, seed: int, shift: float = 0.0, dim: int = DIM) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def plain_kid(x: Tensor, y: Tensor) -> float:
    """The definition, pair by pair."""

    def kernel(a: Tensor, b: Tensor) -> float:
        return (float(a @ b) / len(a) + 1) ** 3

    m, n = len(x), len(y)
    xx = sum(kernel(x[i], x[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    yy = sum(kernel(y[i], y[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    return xx + yy - 2 * sum(kernel(a, b) for a in x for b in y) / (m * n)


def test_kid_is_its_definition() -> None:
    x, y = normal(7, seed=0), normal(9, seed=1, shift=0.5)
    assert distances.kid(x, y) == pytest.approx(plain_kid(x, y), rel=1e-10)


def test_kid_of_one_distribution_averages_to_zero_and_grows_with_a_shift() -> None:
    null = torch.tensor([distances.kid(normal(60, seed=s), normal(60, seed=s + 1000)) for s in range(100)])
    assert abs(null.mean()) < 3 * null.std() / 10
    assert (null < 0).any(), "an unbiased estimator of zero must be negative at times"
    shifted = [distances.kid(normal(400, seed=0), normal(400, seed=1, shift=s)) for s in (0.2, 0.5, 1.0)]
    assert null.std() < shifted[0] < shifted[1] < shifted[2]


def test_paired_kid_leaves_out_the_dependent_pairs() -> None:
    """Twins of one set: the plain estimate falls below zero by 2/n of the diagonal, the paired one does not."""
    plain, paired = [], []
    for seed in range(100):
        x = normal(40, seed=seed)
        y = x + 0.01 * normal(40, seed=seed + 5000)
        plain.append(distances.kid(x, y))
        paired.append(distances.kid(x, y, paired=True))
    error = torch.tensor(paired).std() / 10
    assert torch.tensor(plain).mean() < -0.1
    assert abs(torch.tensor(paired).mean()) < max(3 * error, torch.tensor(1e-3))
    assert distances.kid(x, x, paired=True) == pytest.approx(0, abs=1e-12)


def test_bootstrap_draws_centre_on_the_estimate() -> None:
    """A bootstrap that counted copies would sit far above."""
    x, y = normal(50, seed=3), normal(50, seed=4, shift=0.3)
    estimate = distances.kid_with_interval(x, y, num_bootstrap=4000, seed=0)
    assert estimate.draws is not None
    error = float(estimate.draws.std()) / 4000**0.5
    assert abs(float(estimate.draws.mean()) - estimate.value) < 5 * error
    kernel_of_copies = float((distances.polynomial_kernel(x, x).diagonal()).mean()) / 50
    assert kernel_of_copies > 20 * error, "the test would not see a bias from copies"


@pytest.mark.parametrize("shift", [0.0, 0.4])
def test_kid_interval_covers_the_truth(shift: float) -> None:
    truth = distances.kid(normal(4000, seed=90), normal(4000, seed=91, shift=shift)) if shift else 0.0
    trials, hits = 200, 0
    for seed in range(trials):
        x, y = normal(80, seed=2 * seed), normal(80, seed=2 * seed + 1, shift=shift)
        low, high = distances.kid_with_interval(x, y, num_bootstrap=300, seed=seed).interval
        hits += low <= truth <= high
    # 0.95 ± 0.015 is the binomial error of 200 trials; under the null the interval may be wider than need be.
    assert 0.90 <= hits / trials <= (0.985 if shift else 1.0)


def test_shared_weights_make_differences_sharper() -> None:
    """Two methods on the same prompts and real pictures: the interval of the difference is far below the naive one."""
    real, noise = normal(200, seed=0, dim=16), normal(200, seed=1, shift=0.5, dim=16)
    first = distances.kid_with_interval(noise, real, num_bootstrap=500, seed=7)
    second = distances.kid_with_interval(noise * 1.02, real, num_bootstrap=500, seed=7)
    assert first.draws is not None
    assert second.draws is not None
    together = float((second.draws - first.draws).std())
    apart = float((first.draws.var() + second.draws.var()) ** 0.5)
    assert together < 0.5 * apart


def test_frechet_distance_of_known_gaussians() -> None:
    """For diagonal covariances: sum of (mean difference)² + (sd difference)²."""
    scale = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    x = normal(200_000, seed=0, dim=3)
    y = normal(200_000, seed=1, dim=3) * scale + torch.tensor([1.0, 0.0, -2.0], dtype=torch.float64)
    expected = 1 + 4 + float((1 - scale).square().sum())
    assert distances.frechet_distance(x, y) == pytest.approx(expected, rel=0.01)


def test_frechet_distance_equals_the_matrix_root_form_and_takes_few_rows() -> None:
    from scipy import linalg

    x, y = normal(40, seed=0), normal(30, seed=1, shift=0.2) @ normal(DIM, seed=9)
    root = linalg.sqrtm(torch.cov(x.T).numpy() @ torch.cov(y.T).numpy())
    by_root = (x.mean(0) - y.mean(0)).square().sum() + torch.cov(x.T).trace() + torch.cov(y.T).trace()
    assert distances.frechet_distance(x, y) == pytest.approx(float(by_root) - 2 * root.real.trace(), rel=1e-8)
    few = normal(5, seed=2, dim=50)
    assert distances.frechet_distance(few, few) == pytest.approx(0, abs=1e-10)


def test_frechet_interval_covers_the_truth() -> None:
    trials, hits = 100, 0
    for seed in range(trials):
        x, y = normal(500, seed=2 * seed, dim=2), normal(500, seed=2 * seed + 1, shift=1.0, dim=2)
        low, high = distances.frechet_with_interval(x, y, seed=seed).interval
        hits += low <= 2.0 <= high
    assert hits / trials >= 0.88


def test_frechet_interval_needs_enough_pictures() -> None:
    with pytest.raises(DataError, match=r"a set of 12 pictures.*at least 20"):
        distances.frechet_with_interval(normal(12, seed=0), normal(50, seed=1), seed=0)


def test_paired_mse_and_mean() -> None:
    reference = torch.zeros(3, 4, 2, 2)
    latents = torch.stack([torch.full((4, 2, 2), value) for value in (0.0, 1.0, 2.0)])
    values = distances.paired_mse(latents, reference)
    assert values.tolist() == [0.0, 1.0, 4.0]
    estimate = distances.mean_with_interval(values, num_bootstrap=200, seed=0)
    assert estimate.value == pytest.approx(5 / 3)
    assert 0 <= estimate.interval[0] < 5 / 3 < estimate.interval[1] <= 4
    with pytest.raises(DataError, match="same prompts and noise"):
        distances.paired_mse(latents, reference[:2])


def test_floor_of_real_pictures_contains_zero() -> None:
    floor = distances.real_against_real(normal(400, seed=0), max_count=1000, num_bootstrap=300, seed=0)
    low, high = floor["kid"].interval
    assert low < 0 < high
    assert floor["fd"].value > 0


def test_sets_that_cannot_be_compared() -> None:
    with pytest.raises(DataError, match="one d for both"):
        distances.kid(normal(5, seed=0), normal(5, seed=1, dim=3))
    with pytest.raises(DataError, match="two pictures"):
        distances.kid(normal(1, seed=0), normal(5, seed=1))
    with pytest.raises(DataError, match="one size"):
        distances.kid(normal(4, seed=0), normal(5, seed=1), paired=True)


def test_weights_do_not_depend_on_threads() -> None:
    before = torch.get_num_threads()
    draws = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        draws.append(distances.bootstrap_weights(100, num_bootstrap=50, seed=3))
    torch.set_num_threads(before)
    assert torch.equal(*draws)
    assert torch.equal(draws[0].sum(1), torch.full((50,), 100.0, dtype=torch.float64))
