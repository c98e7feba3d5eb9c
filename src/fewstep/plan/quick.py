"""The outputs of common operations on meta tensors, without torch's own meta kernels.

Those are written in Python and would take nine tenths of the time of a plan. Only shapes and types matter here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_aten: Any = torch.ops.aten

#: Their output is like their first argument, if all tensors among the arguments are alike.
_ALIKE = frozenset(
    {
        _aten.silu.default,
        _aten.silu_backward.default,
        _aten.gelu.default,
        _aten.gelu_backward.default,
        _aten.add.Tensor,
        _aten.add_.Tensor,
        _aten.mul.Tensor,
        _aten.div.Tensor,
    }
)


def quick_output(func: Any, args: tuple[Any, ...]) -> Any:
    """Return the output of an operation on meta tensors, or None when torch itself has to be asked."""
    if func in _ALIKE:
        first = args[0]
        tensors = [value for value in args[1:] if isinstance(value, Tensor)]
        if isinstance(first, Tensor) and all(t.shape == first.shape and t.dtype == first.dtype for t in tensors):
            return first if func is _aten.add_.Tensor else torch.empty_like(first)
        return None
    rule = _RULES.get(func)
    return None if rule is None else rule(*args)


def _group_norm(x: Tensor, weight: Any, bias: Any, rows: int, channels: int, size: int, groups: int, eps: float) -> Any:
    return torch.empty_like(x), x.new_empty(rows, groups), x.new_empty(rows, groups)


def _group_norm_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, *sizes_and_mask: Any
) -> Any:
    mask = sizes_and_mask[-1]
    like = (x, weight, weight)
    return tuple(torch.empty_like(t) if on and t is not None else None for t, on in zip(like, mask, strict=True))


def _layer_norm(x: Tensor, shape: list[int], weight: Any, bias: Any, eps: float) -> Any:
    statistics = (*x.shape[: x.dim() - len(shape)], *(1 for _ in shape))
    return x.new_empty(x.shape), x.new_empty(statistics), x.new_empty(statistics)  # contiguous, whatever x is


def _layer_norm_backward(
    grad: Tensor, x: Tensor, shape: Any, mean: Tensor, rstd: Tensor, weight: Any, bias: Any, mask: list[bool]
) -> Any:
    like = (x, weight, bias)
    return tuple(torch.empty_like(t) if on and t is not None else None for t, on in zip(like, mask, strict=True))


def _addmm(bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


_RULES: dict[Any, Callable[..., Any]] = {
    _aten.addmm.default: _addmm,
    _aten.native_group_norm.default: _group_norm,
    _aten.native_group_norm_backward.default: _group_norm_backward,
    _aten.native_layer_norm.default: _layer_norm,
    _aten.native_layer_norm_backward.default: _layer_norm_backward,
}
