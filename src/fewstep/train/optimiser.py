"""The optimiser and its learning rate, a pure function of the update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fewstep.train.settings import TrainSettings

if TYPE_CHECKING:
    from fewstep.distill.objective import Objective


def learning_rate_factor(settings: TrainSettings, update: int) -> float:
    """Return the share of the peak learning rate for update 0 … updates − 1, in [0, 1].

    It rises linearly to 1 over the warm-up, then falls to 0 at `updates` (Meng et al. §A: linear decay in every stage).
    It counts optimiser updates, whatever the number of workers.
    """
    if update < settings.warmup_updates:
        return (update + 1) / settings.warmup_updates
    if settings.decay == "constant":
        return 1.0
    progress = (update - settings.warmup_updates) / max(1, settings.updates - settings.warmup_updates)
    return 1.0 - progress if settings.decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


def make_optimizer(objective: Objective, settings: TrainSettings) -> torch.optim.AdamW:
    """Return fused AdamW over the objective's own parameter groups, or over all trainable weights of its network."""
    own_groups = getattr(objective, "parameter_groups", None)
    groups = own_groups(settings.learning_rate) if own_groups is not None else None
    if groups is None:
        groups = [{"params": [p for p in objective.network.parameters() if p.requires_grad]}]
    optimizer = torch.optim.AdamW(
        groups, lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
    )
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, settings: TrainSettings, update: int) -> None:
    """Set the rate of every parameter group for this update."""
    factor = learning_rate_factor(settings, update)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients down to a global norm and return the norm that they had, a scalar on the device."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()  # of all workers' shards
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
