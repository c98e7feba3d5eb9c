"""CUDA's autocast and its fused attention, imitated on meta tensors: which bytes a GPU would hold, without one.

Meta tensors have no autocast of their own, and a CPU's has other rules (a CPU normalises in bfloat16, CUDA in float32),
so the rules of CUDA (ATen/autocast_mode.h) stand here again, for the operations that denoising networks are made of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_LOWER = frozenset(
    {
        F.linear,
        F.conv1d,
        F.conv2d,
        F.conv_transpose2d,
        torch.matmul,
        torch.mm,
        torch.bmm,
        torch.addmm,
        torch.baddbmm,
        torch.einsum,
        Tensor.matmul,
        Tensor.__matmul__,
        Tensor.mm,
        Tensor.bmm,
    }
)
_FLOAT32 = frozenset(
    {
        F.group_norm,
        F.layer_norm,
        F.rms_norm,
        F.softmax,
        F.interpolate,
        F.mse_loss,
        torch.softmax,
        torch.pow,
        torch.exp,
        Tensor.softmax,
        Tensor.pow,
        Tensor.__pow__,
        Tensor.exp,
        Tensor.sum,
    }
)


class CudaRules(TorchFunctionMode):
    """Calls take the types that CUDA's autocast would give them, and attention keeps what a fused kernel keeps.

    Args:
        bfloat16: autocast to bfloat16; otherwise only attention is imitated.
        count: told the FLOPs of attention, which is no operation of torch's here.
    """

    def __init__(self, *, bfloat16: bool, count: Callable[[int], None]) -> None:
        super().__init__()
        self._bfloat16 = bfloat16
        self._count = count
        self._casts: dict[int, Tensor] | None = {}

    def leave_autocast(self) -> None:
        """Forget the weights' casts, as autocast does when its block ends; what autograd saved of them stays."""
        self._casts = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            q, k, v = (self._to(t, torch.bfloat16) if self._bfloat16 else t for t in args[:3] or _named(kwargs))
            return _FusedAttention.apply(q, k, v, self._count)
        if self._bfloat16 and func in _LOWER:
            args, kwargs = self._cast(args, torch.bfloat16), self._cast(kwargs, torch.bfloat16)
        elif self._bfloat16 and func in _FLOAT32:
            args, kwargs = self._cast(args, torch.float32), self._cast(kwargs, torch.float32)
        return func(*args, **kwargs)

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if isinstance(value, Tensor):
            return self._to(value, dtype)
        if isinstance(value, dict):
            return {name: self._cast(each, dtype) for name, each in value.items()}
        if isinstance(value, (tuple, list)):
            return type(value)(self._cast(each, dtype) for each in value)
        return value

    def _to(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if not tensor.is_floating_point() or tensor.dtype == dtype:
            return tensor
        # Autocast keeps the casts of weights until its block ends, so that a weight used twice is cast once.
        kept = dtype == torch.bfloat16 and tensor.is_leaf and tensor.requires_grad and torch.is_grad_enabled()
        if not kept or self._casts is None:
            return tensor.to(dtype)
        if id(tensor) not in self._casts:
            self._casts[id(tensor)] = tensor.to(dtype)
        return self._casts[id(tensor)]


def _named(kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    return kwargs["query"], kwargs["key"], kwargs["value"]


class _FusedAttention(torch.autograd.Function):
    """What flash or memory-efficient attention keeps: q, k, v, the output, and one log-sum-exp a query in float32.

    Its FLOPs are those of the two products forward and the four backward; a flash kernel's own recomputation in the
    backward pass is not counted, as a model's FLOPs never hold it.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, count: Callable[[int], None]) -> Tensor:
        flops = 2 * q.shape[:-1].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])
        count(flops)
        ctx.count, ctx.flops = count, flops
        output = _laid_out_by_token(q, v.shape[-1])
        ctx.save_for_backward(q, k, v, output, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, output, _ = ctx.saved_tensors
        ctx.count(2 * ctx.flops)
        # The kernel adds up dq in float32, and takes the row sums of output times gradient.
        beside = torch.empty_like(q, dtype=torch.float32), output.new_empty(output.shape[:-1], dtype=torch.float32)
        made = tuple(_laid_out_by_token(t, t.shape[-1]) for t in (q, k, v))
        del beside
        return *made, None


def _laid_out_by_token(like: Tensor, width: int) -> Tensor:
    # The kernels write (B, tokens, heads, width), so that joining the heads afterwards copies nothing.
    if like.dim() < 4:
        return like.new_empty(*like.shape[:-1], width)
    *batch, heads, tokens, _ = like.shape
    return like.new_empty(*batch, tokens, heads, width).transpose(-3, -2)
