"""The pseudo-Huber error: a square for small differences, a distance for large ones."""

from __future__ import annotations

import pytest
import torch

from fewstep.distill.errors import row_error

#: c = 0.00054 sqrt(d), Song & Dhariwal's.
D = 3 * 64 * 64
C = 0.00054 * D**0.5


def test_c_of_64_pixel_pictures_is_0_06() -> None:
    assert pytest.approx(0.06, abs=2e-4) == C


@pytest.mark.parametrize("distance", [1e-3, 3e-3])
def test_small_differences_count_as_their_square(distance: float) -> None:
    difference = torch.full((2, 3, 64, 64), distance / D**0.5)
    error = row_error(difference, torch.zeros_like(difference), "pseudo_huber")
    assert error.tolist() == pytest.approx([distance**2 / (2 * C) / D] * 2, rel=5e-3)
    assert row_error(difference, torch.zeros_like(difference), "mse").tolist() == pytest.approx([distance**2 / D] * 2)


@pytest.mark.parametrize("distance", [10.0, 1000.0])
def test_large_differences_count_as_their_length(distance: float) -> None:
    difference = torch.full((2, 3, 64, 64), distance / D**0.5)
    error = row_error(difference, torch.zeros_like(difference), "pseudo_huber")
    assert error.tolist() == pytest.approx([(distance - C) / D] * 2, rel=1e-4)


def test_no_row_pulls_harder_than_another_however_far_it_is() -> None:
    """The gradient of a row tends to length 1/d, where that of the squared error grows without end; at zero it is 0."""
    output = torch.zeros(4, D)
    output[1, 0], output[2, 0], output[3] = 1.0, 1000.0, 1000.0
    output.requires_grad_(True)
    row_error(output, torch.zeros(4, D), "pseudo_huber").sum().backward()
    assert output.grad is not None
    lengths = output.grad.norm(dim=1) * D
    assert float(lengths[0]) == 0
    assert lengths[1:].tolist() == pytest.approx([1, 1, 1], rel=2e-3)


def test_rows_are_measured_each_by_itself() -> None:
    output, target = torch.randn(2, 5, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    for name in ("mse", "pseudo_huber"):
        together = row_error(output, target, name)
        alone = torch.cat([row_error(output[k : k + 1], target[k : k + 1], name) for k in range(5)])
        torch.testing.assert_close(together, alone)
