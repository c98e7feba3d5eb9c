"""What the training loop asks of every objective."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from fewstep.diffusion.random import RowRandom

Batch = dict[str, Any]


class Objective(Protocol):
    """Turns (network, batch, random numbers) into a loss; owns the frozen teacher, if there is one.

    The loop owns everything else: devices, DDP and FSDP, micro-batches, autocast, optimiser, EMA, checkpoints.

    Two more attributes are optional. `frozen: Sequence[nn.Module]` names the networks that `loss` uses without
    gradients (the teacher), so that the loop can shard, compile or round them; they never get optimiser state.
    `parameter_groups(learning_rate)` returns the optimiser's groups, where they differ.

    Attributes:
        network: what is trained.
    """

    network: nn.Module

    def loss(self, network: nn.Module, batch: Batch, random: RowRandom) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the scalar loss, a mean over the local rows, and further figures as scalars on the device.

        Args:
            network: `self.network`, perhaps wrapped for data parallelism: call this one.
            batch: tensors of local rows on the device: all of them, or those of one micro-batch.
            random: draws of the same rows.
        """
        ...
