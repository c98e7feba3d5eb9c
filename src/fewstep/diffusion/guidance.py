"""Classifier-free guidance in the paper's convention."""

from __future__ import annotations

from torch import Tensor


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
