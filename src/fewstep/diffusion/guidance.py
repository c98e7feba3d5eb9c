"""Classifier-free guidance in the paper's convention."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fewstep.errors import SamplingError

#: t in [0, 1] of each row, (B,) -> guidance weight of each row, (B,).
WeightSchedule = Callable[[Tensor], Tensor]


def guide(conditional: Tensor, unconditional: Tensor, w: Tensor | float) -> Tensor:
    """Return (1 + w) conditional − w unconditional (Meng et al. §3, eq. below 3), (B, …).

    The weights add up to one, so it is the same whether the outputs are x, eps or v.

    Args:
        conditional: network output with the condition, (B, …).
        unconditional: network output without it, same shape.
        w: guidance weight, a number or (B,); diffusers' guidance_scale is 1 + w.
    """
    weight = w.to(conditional.dtype).view(-1, *(1,) * (conditional.ndim - 1)) if isinstance(w, Tensor) else w
    return conditional + weight * (conditional - unconditional)


def interval_weight(w: float, low: float, high: float, *, outside: float = 0.0) -> WeightSchedule:
    """Return w(t) that is `w` for t in [low, high] and `outside` elsewhere (Kynkäänniemi et al. 2024, guidance in a
    limited interval). A w-conditioned student takes it for free: w is an input of every step.

    Args:
        w: guidance weight inside.
        low, high: the interval of t; 0 is clean, 1 the noisiest.
        outside: guidance weight outside.

    Raises:
        SamplingError: the interval is empty or not within [0, 1].
    """
    if not 0 <= low < high <= 1:
        raise SamplingError(
            f"the guidance interval {low:g} … {high:g} must be within 0 … 1, its low end first: t = 0 is the clean "
            "picture and t = 1 pure noise"
        )

    def weight(t: Tensor) -> Tensor:
        inside = (t >= low) & (t <= high)
        return torch.where(inside, torch.full_like(t, w), torch.full_like(t, outside))

    return weight
