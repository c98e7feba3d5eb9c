"""The exponential moving average of the weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Ema:
    """Averaged trainable weights, float32, on the network's device.

    After update k (from 0) the average moves by ema ← d·ema + (1 − d)·weights with d = min(decay, (1 + k) / (10 + k)),
    the warm-up of diffusers' `EMAModel`: without it the average of a short training is mostly its first weights.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        named = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self._names = list(named)
        self._weights = [p.detach() for p in named.values()]
        self._averages = [p.detach().float().clone() for p in named.values()]

    def decay_at(self, update: int) -> float:
        """Return d for update 0, 1, …"""
        return min(self.decay, (1 + update) / (10 + update))

    @torch.no_grad()
    def step(self, update: int) -> None:
        """Take in the weights as they are after `update`."""
        torch._foreach_lerp_(self._averages, [w.float() for w in self._weights], 1.0 - self.decay_at(update))

    @torch.no_grad()
    def copy_to(self, network: nn.Module) -> None:
        """Write the averages into the network's weights."""
        weights = dict(network.named_parameters())
        for name, average in self.state_dict().items():
            weights[name].copy_(average)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages by parameter name."""
        return dict(zip(self._names, self._averages, strict=True))

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over averages saved by `state_dict`.

        Raises:
            KeyError: a weight is missing.
        """
        for name, average in self.state_dict().items():
            average.copy_(state[name])
