"""Several workers as one: how a network is spread over them, and how its tensors become whole again.

`ddp` keeps the network on every worker; `fsdp` (FSDP2) keeps a shard of every tensor there and gathers the weights of
one unit at a time. Weights, gradients, optimiser state and average stay float32 under both, and bfloat16 comes from
autocast alone: FSDP's own `MixedPrecisionPolicy` would gather half as many bytes, but round the weights of
normalisations and embeddings too, which autocast leaves alone, and the same recipe would give other numbers by the
number of workers.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

logger = logging.getLogger(__name__)

Strategy = Literal["ddp", "fsdp"]


class Workers:
    """The workers of a training: those of torch.distributed's default group, or where there is none this process alone.

    The half of a `Host` that does not depend on where checkpoints lie and who watches.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.world_size = dist.get_world_size() if together else 1
        self._unsharded: nn.Module | None = None
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # where FSDP puts its shards

    def parallel(self, network: nn.Module, *, strategy: Strategy) -> nn.Module:
        if self.world_size == 1:
            if strategy == "fsdp":
                logger.warning("strategy=fsdp shares nothing out: there is one worker, which keeps all")
            return network
        if strategy == "ddp":
            device_ids = [self.device] if self.device.type == "cuda" else None
            return DistributedDataParallel(
                network, device_ids=device_ids, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        for tensor in (*network.parameters(), *network.buffers()):
            dist.broadcast(tensor.detach(), src=0)  # all begin alike, as under DDP
        if self.rank == 0:
            self._unsharded = _without_weights(network)
        self._shard(network)
        return network

    def shard_frozen(self, network: nn.Module) -> None:
        if self.world_size > 1:
            # No backward pass comes to need the weights again: what was gathered goes after each block, the last too.
            self._shard(network, reshard_after_forward=True)

    def whole(self, network: nn.Module) -> nn.Module:
        if not isinstance(network, FSDPModule):
            return network
        weights = gathered(network.state_dict(), keep=self.rank == 0)
        if self._unsharded is None:
            return network
        self._unsharded.load_state_dict(weights, assign=True)
        return self._unsharded.cpu()

    def gather(self, value: Any) -> list[Any]:
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def mean(self, value: Tensor) -> Tensor:
        if self.world_size > 1:
            dist.all_reduce(value)
            value /= self.world_size
        return value

    def _shard(self, network: nn.Module, *, reshard_after_forward: bool | None = None) -> None:
        mesh = init_device_mesh(self.device.type, (self.world_size,))
        for part in (*units(network), network):
            fully_shard(part, mesh=mesh, reshard_after_forward=reshard_after_forward)


def units(network: nn.Module) -> Iterator[nn.Module]:
    """Yield the parts of a network whose weights are gathered together, inner ones before what holds them.

    They are its `blocks` and the transformer blocks inside each: one block of SDXL has 1.2 billion weights in twenty of
    these. What lies outside belongs to the network itself.
    """
    for block in blocks(network):
        yield from transformer_blocks(block)
        yield block


def compilable(network: nn.Module) -> Iterator[nn.Module]:
    """Yield the parts of a sharded network that can be compiled: no unit is inside another, as its gathering cannot."""
    for block in blocks(network):
        inside = list(transformer_blocks(block))
        if inside:
            yield from inside
            yield from getattr(block, "resnets", ())
        else:
            yield block


def blocks(network: nn.Module) -> Iterator[nn.Module]:
    """Yield the entries of a network's outermost lists of modules (`down_blocks`, `up_blocks`, `transformer_blocks`, a
    text encoder's `layers`) and what diffusers' U-Nets call `mid_block`."""
    for name, child in network.named_children():
        if isinstance(child, nn.ModuleList):
            yield from child
        elif name == "mid_block":
            yield child
        else:
            yield from blocks(child)


def transformer_blocks(block: nn.Module) -> Iterator[nn.Module]:
    """Yield the transformer blocks inside a block of a U-Net of diffusers."""
    for name, child in block.named_modules():
        if isinstance(child, nn.ModuleList) and name.split(".")[-1] == "transformer_blocks":
            yield from child


@contextmanager
def gradient_sync(model: nn.Module, *, on: bool) -> Iterator[None]:
    """Let a forward and backward pass in the block exchange gradients among the workers, or only add them up here.

    FSDP adds up whole gradients then, 4 bytes a weight on every worker, until a pass with `on` shares them out.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(on)
        yield
    elif isinstance(model, DistributedDataParallel) and not on:
        with model.no_sync():
            yield
    else:
        yield


def gathered(state: Any, *, keep: bool) -> Any:
    """Return a state dict with its shards put together on the CPU; tensors that are no shards stay as they are.

    Every worker must call it, with the same state; where `keep` is false None takes the place of each sharded tensor.
    """
    if isinstance(state, dict):
        return {name: gathered(value, keep=keep) for name, value in state.items()}
    if isinstance(state, list):
        return [gathered(value, keep=keep) for value in state]
    if isinstance(state, DTensor):
        full = state.full_tensor()
        return full.cpu() if keep else None
    return state


def laid_out(value: Tensor, like: Tensor) -> Tensor:
    """Return a whole tensor laid out as another: with its strides or, where that one is sharded, this worker's shard of
    it on its device. Every worker has the whole tensor, so nothing is sent. One of another shape stays as it is."""
    if value.shape != like.shape:
        return value
    if isinstance(like, DTensor):
        shards = distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
        return shards.clone()  # the shard is a view, which would keep the whole
    if value.stride() == like.stride():
        return value
    return torch.empty_like(like, dtype=value.dtype, device=value.device).copy_(value)


def local(tensor: Tensor) -> Tensor:
    """Return this worker's part of a tensor: its shard, or all of it; the storage is shared."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def as_shard(value: Tensor, like: Tensor) -> Tensor:
    """Return this worker's part of a tensor as what it is a part of; `like` is sharded the same way, or not at all."""
    if not isinstance(like, DTensor):
        return value
    return DTensor.from_local(
        value.to(like.device), like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
    )


def load_network(network: nn.Module, weights: dict[str, Tensor]) -> None:
    """Take over the whole weights of a checkpoint, each worker its part."""
    own = network.state_dict()
    network.load_state_dict(
        {name: laid_out(value, own[name]) if name in own else value for name, value in weights.items()}
    )


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take over the whole state of a checkpoint, each worker its part.

    Moments get their weights' strides: fused AdamW goes through the memory of both in one order.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {
        index: {name: laid_out(value, parameters[index]) for name, value in of_weight.items()}
        for index, of_weight in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": moments})


def _without_weights(network: nn.Module) -> nn.Module:
    """Return a copy of a network whose weights have shapes and no content."""
    shapes = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in network.parameters()}
    return copy.deepcopy(network, shapes)
