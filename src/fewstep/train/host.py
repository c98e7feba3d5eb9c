"""What the loop needs from where it runs: other workers, a place for checkpoints, somebody who watches."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fewstep.train.checkpoint import TrainState
from fewstep.train.parallel import Strategy


class Host(Protocol):
    """One worker's surroundings. `in_process` has the one without Ray, `worker` the one inside Ray Train; both have the
    other workers from `parallel`.

    Every worker makes the same calls of `parallel`, `shard_frozen`, `whole`, `gather`, `mean`, `must_save` and `save`
    in the same order.
    """

    rank: int
    world_size: int
    device: torch.device
    checkpoint_uri: str  # for messages

    def load(self) -> TrainState | None:
        """Return the newest checkpoint of this training, or None."""

    def parallel(self, network: nn.Module, *, strategy: Strategy) -> nn.Module:
        """Return the network to call, such that gradients are averaged over the workers.

        With fsdp and several workers it is the network itself, whose weights are shards from here on: the optimiser and
        the average are made after it.
        """

    def shard_frozen(self, network: nn.Module) -> None:
        """Share out a network without gradients over the workers, in place; they must have loaded the same weights."""

    def whole(self, network: nn.Module) -> nn.Module:
        """Return on rank 0 a network of the same class with all its weights; elsewhere it is of no use."""

    def gather(self, value: Any) -> list[Any]:
        """Return every worker's value, in order of rank."""

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean of a tensor over the workers."""

    def save(self, state: TrainState | None, *, update: int, last: bool) -> None:
        """Store a checkpoint; rank 0 brings the state. Returns before it is stored, unless it is the last one."""

    def must_save(self, updates_done: int) -> bool:
        """Return whether a checkpoint is to be written after this update, whatever the settings say; asked after every
        update, the same answer on every worker, without waiting for the device."""

    def ticked(self, updates_done: int) -> None:
        """Be told that an update was queued."""

    def logged(self, figures: dict[str, float], *, updates_done: int) -> None:
        """Be told new figures."""
