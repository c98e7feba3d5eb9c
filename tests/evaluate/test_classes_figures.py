"""The figures on sets whose answers are known, and the coverage of their intervals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fewstep.errors import DataError
from fewstep.evaluate import distances
from fewstep.evaluate.classes.figures import class_accuracy, classifier_score, fd_classifier
from fewstep.evaluate.classes.jackknife import Measured, difference, make_groups, measured_share, ratio
from fewstep.evaluate.classes.precision_recall import make_manifold, precision_and_recall
from fewstep.evaluate.classes.sliced import sliced_wasserstein


def normal(count: int, *, seed: int, dim: int = 4) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def precision_recall_of(generated: Tensor, real: Tensor, *, neighbours: int = 3) -> tuple[Measured, Measured]:
    groups = make_groups(generated.shape[0], seed=0)
    manifolds = [make_manifold(features, groups, neighbours=neighbours) for features in (generated, real)]
    return precision_and_recall(*manifolds)


def values(figures: tuple[Measured, Measured]) -> list[float | None]:
    return [figure.value for figure in figures]


def test_frechet_of_known_gaussians_is_that_of_distances_with_its_interval() -> None:
    """|shift|² + Σ (sd difference)² = 4·0.25 + 4·1; value and interval agree with `distances.frechet_with_interval`."""
    x, y = normal(20_000, seed=0), 2 * normal(20_000, seed=1) + 0.5
    groups = {"groups": make_groups(20_000, seed=3), "real_groups": make_groups(20_000, seed=4)}
    figure = fd_classifier(x, y, **groups)
    assert figure.value == pytest.approx(5.0, rel=0.03)
    other = distances.frechet_with_interval(x, y, seed=3)
    assert figure.value == pytest.approx(other.value)
    assert figure.interval == pytest.approx(other.interval)


def test_score_of_perfect_and_constant_predictors() -> None:
    groups = make_groups(100, seed=0)
    sure = torch.eye(10, dtype=torch.float64).repeat(10, 1)
    assert classifier_score(sure, groups=groups).value == pytest.approx(10)
    same = torch.full((100, 10), 0.1, dtype=torch.float64)
    assert classifier_score(same, groups=groups).value == pytest.approx(1)
    one_class = sure[:1].expand(100, -1)
    assert classifier_score(one_class, groups=groups).value == pytest.approx(1), "sure, but always of one class"
    half = 0.5 * sure + 0.5 * sure.roll(1, dims=1)
    assert classifier_score(half, groups=groups).value == pytest.approx(5), "two classes in doubt: half the score"


def test_score_refuses_what_are_no_probabilities() -> None:
    with pytest.raises(DataError, match="softmax outputs, not logits"):
        classifier_score(normal(30, seed=0), groups=make_groups(30, seed=0))


def test_accuracy_and_the_interval_of_a_share_without_exceptions() -> None:
    groups, labels = make_groups(60, seed=0), torch.arange(60) % 3
    probabilities = torch.eye(3)[labels]
    every = class_accuracy(probabilities, labels, groups=groups)
    assert every.value == 1.0
    assert every.interval == pytest.approx((0.05 ** (1 / 60), 1.0)), "not [1, 1]: 60 pictures cannot show that"
    third = class_accuracy(probabilities, torch.zeros(60, dtype=torch.int64), groups=groups)
    assert third.value == pytest.approx(1 / 3)
    assert third.interval is not None
    assert 0 <= third.interval[0] < 1 / 3 < third.interval[1] <= 1
    assert measured_share(0.0, [0.0] * 10, count=60).interval == pytest.approx((0.0, 1 - 0.05 ** (1 / 60)))
    with pytest.raises(DataError, match="one label a picture"):
        class_accuracy(probabilities, labels[:5], groups=groups)


def test_precision_and_recall_of_identical_disjoint_and_partial_sets() -> None:
    x = normal(200, seed=0)
    assert values(precision_recall_of(x, x)) == [1.0, 1.0]
    assert values(precision_recall_of(x, x + 100)) == [0.0, 0.0]
    # Two far clusters; the generator knows one of them: all it makes is real, half of what is real it makes.
    two = torch.cat([x[:100], x[:100] + 100])
    one = normal(200, seed=1)
    precision, recall = precision_recall_of(one, two)
    assert precision.value is not None
    assert recall.value is not None
    assert precision.value > 0.85
    assert 0.4 < recall.value <= 0.5
    assert values(precision_recall_of(two, one)) == pytest.approx([recall.value, precision.value])


def test_precision_and_recall_are_their_definition() -> None:
    generated, real = normal(60, seed=0), 0.8 * normal(60, seed=1) + 0.3

    def share(queries: Tensor, centres: Tensor) -> float:
        radii = torch.cdist(centres, centres).fill_diagonal_(torch.inf).sort(dim=1).values[:, 2]
        return float((torch.cdist(queries, centres) <= radii).any(1).double().mean())

    precision, recall = precision_recall_of(generated, real)
    assert values((precision, recall)) == pytest.approx([share(generated, real), share(real, generated)])
    groups = make_groups(60, seed=0)
    without = [(generated[groups != group], real[groups != group]) for group in range(10)]
    assert precision.left_out == pytest.approx([share(x, y) for x, y in without])
    assert recall.left_out == pytest.approx([share(y, x) for x, y in without])


def test_copies_of_one_picture_are_in_the_manifold_of_each_other() -> None:
    """A collapsed generator: its manifold is a point, and rounding must not lose that point."""
    real = 100 * normal(100, seed=0, dim=128).abs()
    copies = real[:1].expand(100, -1) * 1.0
    precision, recall = precision_recall_of(copies, real)
    assert precision.value == 1.0
    assert recall.value == pytest.approx(0.01)


def test_precision_and_recall_refuse_sets_that_cannot_be_compared() -> None:
    x, groups = normal(40, seed=0), make_groups(40, seed=0)
    with pytest.raises(DataError, match="one N and d"):
        precision_and_recall(make_manifold(x, groups), make_manifold(x[:30], make_groups(30, seed=0)))
    with pytest.raises(DataError, match=r"neighbours=36, but only 36 of 40"):
        make_manifold(x, groups, neighbours=36)
    with pytest.raises(DataError, match="one group each"):
        make_manifold(x, groups[:5])
    with pytest.raises(DataError, match="19 pictures came"):
        make_groups(19, seed=0)


def test_intervals_cover_the_truth() -> None:
    """Truth = the mean of the trials: what these counts give, with their bias. 300 trials of 400 gave 0.95 … 0.99."""
    weights, kept = normal(5, seed=1).T, {"precision": [], "recall": [], "score": [], "ratio": []}
    for trial in range(60):
        x, real = 0.7 * normal(200, seed=3 * trial) + 0.5, normal(200, seed=3 * trial + 1)
        y = 0.7 * x + 0.3 * (normal(200, seed=3 * trial + 2) + 0.3)
        groups, real_groups = make_groups(200, seed=trial), make_groups(200, seed=trial + 1)
        precision, recall = precision_recall_of(x, real)
        kept["precision"].append(precision)
        kept["recall"].append(recall)
        kept["score"].append(classifier_score((x @ weights).softmax(1), groups=groups))
        distances_of = [fd_classifier(z, real, groups=groups, real_groups=real_groups) for z in (x, y)]
        kept["ratio"].append(ratio(*distances_of))
    for name, figures in kept.items():
        truth = sum(figure.value for figure in figures) / len(figures)
        hits = sum(figure.interval[0] <= truth <= figure.interval[1] for figure in figures)
        assert hits / len(figures) >= 0.87, f"{name}: 0.95 ± 0.03 is the binomial error of 60 trials"


def test_shared_groups_make_comparisons_sharper() -> None:
    real, x = normal(400, seed=0, dim=8), normal(400, seed=1, dim=8) + 1
    groups, real_groups = make_groups(400, seed=0), make_groups(400, seed=1)
    first, second = (fd_classifier(z, real, groups=groups, real_groups=real_groups) for z in (x, x * 1.02))
    together, apart = difference(second, first).interval, first.interval
    assert together is not None
    assert apart is not None
    assert together[1] - together[0] < 0.3 * (apart[1] - apart[0])
    assert ratio(second, first).value == pytest.approx(second.value / first.value)


def test_ratio_and_difference_of_what_is_not_there() -> None:
    nothing, zero = Measured(value=math.nan, interval=None), Measured(value=0.0, interval=(0, 0), left_out=(0.0,) * 10)
    one = Measured(value=1.0, interval=(1, 1), left_out=(1.0,) * 10)
    assert nothing.value is None, "JSON has no NaN"
    assert ratio(one, nothing).value is None
    assert ratio(one, zero).value is None
    assert difference(nothing, one).value is None
    assert difference(one, zero).value == 1.0


@pytest.mark.parametrize(("dim", "tolerance"), [(1, 1e-9), (2, 1e-9), (3, 0.15)])
def test_sliced_wasserstein_of_a_shifted_cloud(dim: int, tolerance: float) -> None:
    """|shift| / √dim; exact in the plane, where directions are evenly spaced, and drawn in more dimensions."""
    x = normal(300, seed=0, dim=dim)
    shift = torch.full((dim,), 3.0, dtype=torch.float64)
    expected = float(shift.norm()) / dim**0.5
    assert sliced_wasserstein(x, x + shift) == pytest.approx(expected, rel=tolerance)
    assert sliced_wasserstein(x, x) == pytest.approx(0, abs=1e-12)


def test_sliced_wasserstein_of_clouds_of_different_sizes() -> None:
    x = normal(50, seed=0, dim=2)
    assert sliced_wasserstein(x, x.repeat(3, 1)) == pytest.approx(0, abs=1e-12), "each point thrice: the same cloud"
    # Quantile functions of {0, 1} and {0, 0.5, 1}, by hand: they differ by 0.5 on two steps of width 1/6.
    two, three = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [0.5], [1.0]])
    assert sliced_wasserstein(two, three) == pytest.approx((2 / 6 * 0.25) ** 0.5)


def test_clouds_that_cannot_be_compared() -> None:
    x, y = normal(40, seed=0, dim=2), normal(40, seed=1, dim=2) + 1
    with pytest.raises(DataError, match="one d for both"):
        sliced_wasserstein(x, normal(10, seed=0, dim=3))
    with pytest.raises(DataError, match="num_directions=2"):
        sliced_wasserstein(x, y, num_directions=2)
