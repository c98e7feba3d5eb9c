"""FLOPs and live bytes of a network's pass, measured on meta tensors: no device, no memory, the same everywhere."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

from fewstep.plan.autocast import CudaRules
from fewstep.plan.quick import quick_output

#: Rows of the measured pass: a prime, so that the sizes of tensors that grow with the rows are multiples of it, and no
#: others. Meta tensors take no memory, however many rows they have.
_ROWS = 1009


@dataclass(frozen=True)
class Footprint:
    """What a pass costs, for any number of rows.

    Attributes:
        flops: floating-point operations a row, a multiply-add as two.
        moments: (bytes whatever the rows, bytes a row) at the moments that can be the fullest. Weights, their gradients
            and inputs are not in it.
    """

    flops: float
    moments: tuple[tuple[int, float], ...]

    def peak_bytes(self, rows: int) -> int:
        """Return the most bytes that live at once beside weights, gradients and inputs."""
        return max((round(fixed + rows * each) for fixed, each in self.moments), default=0)


Call = Callable[[int], Tensor]


def forward_footprint(call: Call, network: nn.Module, *, bfloat16: bool) -> Footprint:
    """Return the footprint of a forward pass without gradients.

    Args:
        call: makes the pass for a number of rows, on meta tensors.
        network: whose weights are left out.
        bfloat16: whether it runs under autocast.
    """
    meter = _Meter(_tensors(network))
    with meter, CudaRules(bfloat16=bfloat16, count=meter.count), torch.no_grad():
        call(_ROWS)
    return meter.footprint()


def update_footprint(call: Call, network: nn.Module, *, bfloat16: bool, checkpointing: bool = False) -> Footprint:
    """Return the footprint of a forward and a backward pass; what a network computes twice is counted twice.

    Args:
        call: makes the forward pass for a number of rows, on meta tensors, and returns what has a gradient.
        network: trained; its weights and their gradients are left out of the bytes.
        bfloat16: whether the forward pass runs under autocast.
        checkpointing: whether activations are computed again, where diffusers' networks can do it.
    """
    hooks = [p.register_post_accumulate_grad_hook(_drop_gradient) for p in network.parameters() if p.requires_grad]
    meter = _Meter(_tensors(network))
    rules = CudaRules(bfloat16=bfloat16, count=meter.count)
    able: list[Any] = [part for part in network.modules() if getattr(part, "_supports_gradient_checkpointing", False)]
    for part in able if checkpointing else ():
        part.enable_gradient_checkpointing(partial(_compute_again, rules))
    try:
        with meter:
            with rules:
                loss = call(_ROWS).float().square().mean()
            rules.leave_autocast()
            loss.backward()
    finally:
        for part in able if checkpointing else ():
            part.disable_gradient_checkpointing()
        for hook in hooks:
            hook.remove()
    return meter.footprint()


def _compute_again(rules: CudaRules, block: Any, *args: Any) -> Any:
    """Checkpoint a block as diffusers does; what is computed again in the backward pass keeps to the rules too."""
    return checkpoint(block.__call__, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), rules))


def _drop_gradient(weight: Tensor) -> None:
    weight.grad = None


def _tensors(network: nn.Module) -> Iterable[Tensor]:
    yield from network.parameters()
    yield from network.buffers()


class _Meter(TorchDispatchMode):
    """Counts FLOPs, and follows every storage from its making to its end."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self._flops = 0
        self._fixed = self._by_row = 0
        self._moments: dict[int, int] = {}  # fixed bytes -> most bytes that grow with the rows beside them
        # Held, so that no other storage can take the place of one of these.
        self._known = [tensor.untyped_storage() for tensor in known]
        self._seen: dict[int, Any] = {id(storage): None for storage in self._known}

    def count(self, flops: int) -> None:
        self._flops += flops

    def footprint(self) -> Footprint:
        """Return what was measured; of the moments only those that no other is above in both respects."""
        kept: list[tuple[int, float]] = []
        for fixed in sorted(self._moments, reverse=True):
            if not kept or self._moments[fixed] > kept[-1][1]:
                kept.append((fixed, self._moments[fixed]))
        return Footprint(self._flops / _ROWS, tuple((fixed, by_row / _ROWS) for fixed, by_row in kept))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = None if kwargs else quick_output(func, args)
        if output is None:
            output = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self._flops += formula(*args, **kwargs, out_val=output)
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self._follow(tensor.untyped_storage())
        self._moments[self._fixed] = max(self._moments.get(self._fixed, 0), self._by_row)
        return output

    def _follow(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._seen:
            return
        grows = size > 0 and size % _ROWS == 0
        self._add(size, grows)

        def ended(_: Any) -> None:
            self._seen.pop(key, None)
            self._add(-size, grows)

        self._seen[key] = weakref.ref(storage, ended)

    def _add(self, size: int, grows: bool) -> None:
        if grows:
            self._by_row += size
        else:
            self._fixed += size
