"""What is done to an objective's networks before the first update: memory format, recomputation, type, compilation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from fewstep.errors import FewstepError
from fewstep.train.parallel import compilable
from fewstep.train.precision import Precision
from fewstep.train.settings import TrainSettings

if TYPE_CHECKING:
    from fewstep.distill.objective import Objective


def prepare_network(network: nn.Module, settings: TrainSettings) -> None:
    """Set up the trained network, in place.

    Raises:
        FewstepError: a setting would have no effect on it.
    """
    if settings.channels_last:
        if not any(p.dim() == 4 for p in network.parameters()):
            raise FewstepError(
                f"channels_last=true has no effect on {type(network).__name__}, which has no convolution weights; "
                "set channels_last: false"
            )
        _to_channels_last(network)
    if settings.gradient_checkpointing:
        _recompute_activations(network)


def prepare_frozen(objective: Objective, settings: TrainSettings, precision: Precision) -> list[nn.Module]:
    """Set up the networks that the objective uses without gradients, in place, and return them.

    Args:
        objective: its optional attribute `frozen` names them.
        settings: the training's settings.
        precision: what the training computes in.

    Raises:
        FewstepError: a setting would have no effect, or does not fit the precision.
    """
    frozen = list(dict.fromkeys(getattr(objective, "frozen", ())))
    trained = {id(p) for p in objective.network.parameters() if p.requires_grad}
    if any(id(p) in trained for network in frozen for p in network.parameters()):
        raise ValueError(f"{type(objective).__name__} trains weights of a network that it names as frozen")
    if not frozen and (settings.shard_frozen or settings.frozen_dtype != "float32"):
        raise FewstepError(
            f"shard_frozen={settings.shard_frozen} and frozen_dtype={settings.frozen_dtype} are for frozen networks, "
            f"and {type(objective).__name__} has none; leave both out"
        )
    if settings.frozen_dtype == "bfloat16" and precision != "bfloat16":
        raise FewstepError(
            f"frozen_dtype=bfloat16 needs a training in bfloat16, and precision={settings.precision} means {precision} "
            "on this device; set precision: bfloat16, or frozen_dtype: float32"
        )
    for network in frozen:
        network.requires_grad_(False)
        if settings.frozen_dtype == "bfloat16":
            network.bfloat16()
        if settings.channels_last:
            _to_channels_last(network)
    return frozen


def compile_network(network: nn.Module, device: torch.device) -> None:
    """Let torch compile a network, in place, so that the names of its weights stay.

    A sharded network is compiled part by part: the gathering in between cannot be compiled. Nothing is compiled
    before the first forward pass.
    """
    # On a CPU torch 2.13 otherwise gives U-Nets wrong gradients, without a word: zero before the first upsampling.
    options: dict[str, Any] = {} if device.type == "cuda" else {"options": {"layout_optimization": False}}
    for part in compilable(network) if isinstance(network, FSDPModule) else (network,):
        part.compile(**options)


def _to_channels_last(network: nn.Module) -> None:
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _recompute_activations(network: nn.Module) -> None:
    able = list(_checkpointable(network))
    if not able:
        raise FewstepError(
            f"gradient_checkpointing=true needs a network of diffusers that can do it, and {type(network).__name__} "
            "is or holds none; set gradient_checkpointing: false, or a smaller micro_batch_size to save memory"
        )
    for part in able:
        part.enable_gradient_checkpointing()


def _checkpointable(network: nn.Module) -> Iterator[Any]:
    if getattr(network, "_supports_gradient_checkpointing", False):
        yield network
    else:
        for child in network.children():
            yield from _checkpointable(child)
