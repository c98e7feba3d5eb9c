"""One way to every interval here: leave one of ten groups of pictures out in turn.

Fréchet distance, precision and recall depend on how many different pictures there are, so a bootstrap (copies) shifts
them; a mean of one number a picture does not, but then its draws could not be combined with the others. The
delete-one-group jackknife serves them all: with G = 10 random groups and figure f₍₋ₖ₎ without group k,
variance = (G − 1)/G · Σ (f₍₋ₖ₎ − mean)², and the interval is f ± t₀.₉₇₅(G − 1) · root (Efron & Stein 1981).

**Shared groups.** All rows of a comparison have one asked class and one starting noise a picture, and one set of real
pictures; the groups come from a seed and the counts. So f₍₋ₖ₎ of two rows belong together, and ratios and differences
of figures are formed group by group (`combine`): what the rows have in common cancels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from scipy import stats
from torch import Tensor

from fewstep.errors import DataError
from fewstep.evaluate.distances import CONFIDENCE
from fewstep.evaluate.schema import Figure, FigureInterval

NUM_GROUPS = 10


class Measured(BaseModel):
    """A figure with its 95 % interval; both null where it could not be computed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: Figure
    interval: FigureInterval
    left_out: tuple[Figure, ...] = Field(
        default=(), description="the figure without group 1, 2 … of the pictures; empty = interval of another way"
    )


#: A figure that there is not.
NOT_MEASURED = Measured(value=None, interval=None)


def make_groups(count: int, *, seed: int) -> Tensor:
    """Return the group (0 … 9) of each of `count` pictures, (count,) int64: sizes differ by one at most.

    Raises:
        DataError: fewer than two pictures a group.
    """
    if count < 2 * NUM_GROUPS:
        raise DataError(f"{count} pictures came; an interval needs at least {2 * NUM_GROUPS}")
    return torch.from_numpy(np.random.default_rng(seed).permutation(np.arange(count) % NUM_GROUPS))


def measured(value: float, left_out: Sequence[float], *, low: float = -math.inf, high: float = math.inf) -> Measured:
    """Return a figure with its jackknife interval.

    Args:
        value: of all pictures.
        left_out: of the pictures without group k, for each k.
        low: what the figure cannot be below.
        high: what the figure cannot be above.
    """
    reach = _reach(left_out)
    # Rounding can leave a value just outside what it can be.
    value = min(max(value, low), high)
    return Measured(value=value, interval=(max(value - reach, low), min(value + reach, high)), left_out=tuple(left_out))


def measured_share(value: float, left_out: Sequence[float], *, count: int) -> Measured:
    """Return a share of `count` pictures with its interval, within 0 … 1.

    Where all or none of the pictures count, no group differs from another and the jackknife is blind: the interval
    then reaches to the exact binomial bound, (1 − 0.95)^(1/count) (Clopper & Pearson 1934, one-sided).
    """
    figure = measured(value, left_out, low=0.0, high=1.0)
    bound = (1 - CONFIDENCE) ** (1 / count)
    if value in (0.0, 1.0):
        return figure.model_copy(update={"interval": (0.0, 1 - bound) if value == 0.0 else (bound, 1.0)})
    return figure


def two_sets(
    distance: Callable[[Tensor, Tensor], float], x: Tensor, y: Tensor, *, groups_x: Tensor, groups_y: Tensor
) -> Measured:
    """Return a distance of two sets, ≥ 0; group k of both is left out together.

    Args:
        distance: of two sets, (m, d) and (n, d).
        x: (m, d).
        y: (n, d).
        groups_x: of the rows of x, (m,).
        groups_y: of the rows of y, (n,).
    """
    left_out = [distance(x[groups_x != group], y[groups_y != group]) for group in range(NUM_GROUPS)]
    return measured(distance(x, y), left_out, low=0.0)


def difference(first: Measured, second: Measured) -> Measured:
    """Return first − second of two rows that share their groups; nulls where one of them is null."""
    return _combine(lambda a, b: a - b, first, second)


def ratio(first: Measured, second: Measured) -> Measured:
    """Return first / second of two rows that share their groups, with an interval symmetric in the logarithm.

    Nulls where one of them is null or not above 0.
    """
    parts = [first.value, second.value, *first.left_out, *second.left_out]
    if any(part is None or part <= 0 for part in parts):
        return NOT_MEASURED
    logarithm = _combine(lambda a, b: math.log(a / b), first, second)
    if logarithm.value is None or logarithm.interval is None:
        return NOT_MEASURED
    low, high = logarithm.interval
    left_out = tuple(math.exp(part) for part in logarithm.left_out if part is not None)
    return Measured(value=math.exp(logarithm.value), interval=(math.exp(low), math.exp(high)), left_out=left_out)


def _combine(function: Callable[[float, float], float], first: Measured, second: Measured) -> Measured:
    if first.value is None or second.value is None or not first.left_out:
        return NOT_MEASURED
    pairs = zip(first.left_out, second.left_out, strict=True)
    left_out = [function(a, b) for a, b in pairs if a is not None and b is not None]
    if len(left_out) != len(first.left_out):
        return NOT_MEASURED
    return measured(function(first.value, second.value), left_out)


def _reach(left_out: Sequence[float]) -> float:
    parts = np.asarray(left_out, dtype=np.float64)
    error = math.sqrt((len(parts) - 1) / len(parts) * float(np.square(parts - parts.mean()).sum()))
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, len(parts) - 1)) * error
