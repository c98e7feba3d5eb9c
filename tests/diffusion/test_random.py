"""A row's random numbers are its own, wherever and with whomever it is computed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fewstep.diffusion import RowRandom

DRAWS: dict[str, Callable[[RowRandom], Tensor]] = {
    "normal": lambda random: random.normal(2, 3),
    "uniform": lambda random: random.uniform(2.0, 5.0),
    "integers": lambda random: random.integers(0, 1000),
}


@pytest.mark.parametrize("draw", DRAWS)
def test_rows_do_not_depend_on_their_company_or_order(draw: str) -> None:
    take = DRAWS[draw]
    together = take(RowRandom(seed=1, step=7, rows=range(8)))
    assert torch.equal(take(RowRandom(seed=1, step=7, rows=[5])), together[5:6])
    assert torch.equal(take(RowRandom(seed=1, step=7, rows=[6, 1, 3])), together[[6, 1, 3]])


def test_a_sequence_of_draws_does_not_depend_on_the_company() -> None:
    alone, among = RowRandom(seed=0, step=0, rows=[9]), RowRandom(seed=0, step=0, rows=[2, 9])
    for take in [*DRAWS.values(), *DRAWS.values()]:
        assert torch.equal(take(alone)[0], take(among)[1])


@pytest.mark.parametrize("other", [{"seed": 2}, {"step": 8}, {"rows": [4]}])
def test_another_seed_step_or_row_gives_other_numbers(other: dict[str, object]) -> None:
    place: dict[str, object] = {"seed": 1, "step": 7, "rows": [3]}
    for take in (DRAWS["normal"], DRAWS["uniform"]):
        assert not torch.equal(take(RowRandom(**place)), take(RowRandom(**{**place, **other})))  # type: ignore[arg-type]


def test_neighbouring_steps_and_rows_share_no_stream() -> None:
    draws = torch.cat([RowRandom(seed=0, step=step, rows=range(16)).uniform() for step in range(16)])
    assert len(draws.unique()) == len(draws)


def test_shapes_types_and_ranges() -> None:
    random = RowRandom(seed=0, step=0, rows=range(500))
    assert len(random) == 500
    normal, uniform, integers = random.normal(4, 2), random.uniform(2.0, 5.0), random.integers(1, 4)
    assert normal.shape == (500, 4, 2)
    assert normal.dtype == uniform.dtype == torch.float32
    assert integers.dtype == torch.int64
    assert abs(float(normal.mean())) < 0.08
    assert abs(float(normal.std()) - 1) < 0.05
    assert uniform.shape == (500,)
    assert 2.0 <= float(uniform.min()) < 2.1
    assert 4.9 < float(uniform.max()) < 5.0
    assert sorted(integers.unique().tolist()) == [1, 2, 3]
