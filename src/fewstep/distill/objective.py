"""What the training loop asks of every objective."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from fewstep.diffusion.random import RowRandom

Batch = dict[str, Any]


class Objective(Protocol):
    """Turns (network, batch, random numbers) into a loss; owns the frozen teacher, if there is one.

    The loop owns everything else: devices, DDP, autocast, optimiser, EMA, checkpoints.

    Attributes:
        network: what is trained.
    """

    network: nn.Module

    def loss(self, network: nn.Module, batch: Batch, random: RowRandom) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the scalar loss, a mean over the local rows, and further figures as scalars on the device.

        Args:
            network: `self.network`, perhaps wrapped for data parallelism: call this one.
            batch: tensors of the local rows on the device.
            random: draws of the local rows.
        """
        ...
