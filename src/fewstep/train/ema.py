"""The exponential moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal

import torch
from torch import Tensor, nn

from fewstep.train.parallel import as_shard, laid_out, local


class Ema:
    """Averaged trainable weights, float32; of a sharded network each worker averages its own shards.

    After update k (from 0) the average moves by ema ← d·ema + (1 − d)·weights with d = min(decay, (1 + k) / (10 + k)),
    the warm-up of diffusers' `EMAModel`: without it the average of a short training is mostly its first weights.

    Args:
        network: whose trainable weights are averaged.
        decay: d after the warm-up.
        every: updates between two steps. One step takes in the weights after update k with the product of the decays
            of updates k − every + 1 … k, as if the weights had stood still in between. All of it is a function of the
            update, so nothing of it needs to be kept in a checkpoint.
        device: "network", or "cpu": in main memory. Then a step queues a copy of the weights into pinned memory behind
            the update, and a thread averages once it is there. The next step waits for that thread, no other update.
    """

    def __init__(
        self, network: nn.Module, decay: float, *, every: int = 1, device: Literal["network", "cpu"] = "network"
    ) -> None:
        self.decay = decay
        self.every = every
        self._weights = {name: p for name, p in network.named_parameters() if p.requires_grad}
        weights = [local(p.detach()).float() for p in self._weights.values()]
        self._beside = _Beside(weights) if device == "cpu" else None
        self._averages = [weight.clone() for weight in weights] if self._beside is None else self._beside.averages

    def decay_at(self, update: int) -> float:
        """Return d for update 0, 1, …"""
        return min(self.decay, (1 + update) / (10 + update))

    @torch.no_grad()
    def step(self, update: int) -> None:
        """Take in the weights as they are after `update`, if it is one of those that are taken in."""
        if (update + 1) % self.every:
            return
        share = 1.0 - math.prod(self.decay_at(k) for k in range(update + 1 - self.every, update + 1))
        weights = [local(p.detach()).float() for p in self._weights.values()]
        if self._beside is not None:
            self._beside.take_in(weights, share)
        else:
            torch._foreach_lerp_(self._averages, weights, share)

    @torch.no_grad()
    def copy_to(self, network: nn.Module) -> None:
        """Write the averages into the network's weights."""
        self._settle()
        weights = dict(network.named_parameters())
        for name, average in zip(self._weights, self._averages, strict=True):
            local(weights[name].detach()).copy_(average)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages by parameter name, sharded as the weights are; `gathered` makes them whole."""
        self._settle()
        named = zip(self._weights.items(), self._averages, strict=True)
        return {name: as_shard(average, weight.detach()) for (name, weight), average in named}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over whole averages, as a checkpoint has them.

        Raises:
            KeyError: a weight is missing.
        """
        self._settle()
        for (name, weight), average in zip(self._weights.items(), self._averages, strict=True):
            average.copy_(local(laid_out(state[name], weight.detach())))

    def _settle(self) -> None:
        if self._beside is not None:
            self._beside.settle()


class _Beside:
    """Averages in main memory, moved by a thread while the device goes on."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.averages = [weight.to("cpu", copy=True) for weight in weights]
        self._staged = [torch.empty_like(average, pin_memory=weights[0].is_cuda) for average in self.averages]
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="fewstep-ema")
        self._pending: Future[None] | None = None

    def take_in(self, weights: Sequence[Tensor], share: float) -> None:
        self.settle()  # before its copy of the weights is written over
        for staged, weight in zip(self._staged, weights, strict=True):
            staged.copy_(weight, non_blocking=True)
        arrived = None
        if weights[0].is_cuda:
            arrived = torch.cuda.Event()
            arrived.record()
        self._pending = self._thread.submit(self._average, arrived, share)

    def settle(self) -> None:
        """Wait for the step on its way; raise what went wrong in it."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def _average(self, arrived: torch.cuda.Event | None, share: float) -> None:
        if arrived is not None:
            arrived.synchronize()  # this thread's to wait, not the training's
        torch._foreach_lerp_(self.averages, self._staged, share)
