"""A distance between states in the features of the frozen teacher: LPIPS without a network of its own."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fewstep.errors import ModelError
from fewstep.models.denoiser import Condition, Denoiser


class TeacherFeatures:
    """How far two states of one time are apart in the encoder (the down blocks) of the frozen teacher's U-Net.

    As LPIPS (Zhang et al. 2018, eq. 1): the features of each layer are scaled to unit length at every position, their
    squared difference is summed over channels and averaged over positions. LPIPS then sums the layers with weights
    fitted to human judgement; here their plain mean is taken, 0 … 4. A layer is what a residual block (with its
    attention) or a downsampler of the encoder gives.

    Networks for photographs know neither latents nor noise; the teacher's own encoder knows both and works at every
    time, so that it is used as the backbone of SDXL-Lightning's discriminator (Lin et al. 2024, §3.3). For latents
    E-LatentLPIPS (Kang et al. 2024) trains a network instead, and shows that such a distance distills better than mse.

    One distance costs two passes through the encoder, of which one keeps its activations, and a backward pass; the
    encoder shares the teacher's weights, and its hooks, through which FSDP gathers sharded ones. It runs eagerly,
    whatever `compile` says.

    Args:
        teacher: its network is frozen by now. A U-Net with `down_blocks`.

    Raises:
        ModelError: its network is none.
    """

    def __init__(self, teacher: Denoiser) -> None:
        network = teacher.network
        if not isinstance(getattr(network, "down_blocks", None), nn.ModuleList):
            raise ModelError(
                f"error=features compares in the down blocks of the teacher's U-Net, and a {type(network).__name__} "
                "has none: take mse or pseudo_huber"
            )
        self._blocks: nn.ModuleList = network.down_blocks
        self._teacher = teacher.with_network(_encoder_of(network))

    def distance(
        self, z: Tensor, target: Tensor, time: Tensor, condition: Condition, w: Tensor | None = None
    ) -> Tensor:
        """Return the distance of each row, (B,), float32; gradients reach z alone.

        Args:
            z: the student's states, (B, …).
            target: the teacher's, the same shape.
            time: the time of both, (B,). The network is told that the clean picture is at its first time.
            condition: B rows.
            w: guidance weights (B,), for a teacher that takes them.
        """
        with torch.no_grad():
            wanted = self._features(target, time, condition, w)
        found = self._features(z, time, condition, w)
        layers = [(a - b).square().sum(dim=1).flatten(1).mean(dim=1) for a, b in zip(found, wanted, strict=True)]
        return torch.stack(layers).mean(dim=0)

    def _features(self, z: Tensor, time: Tensor, condition: Condition, w: Tensor | None) -> list[Tensor]:
        with _outputs_of(self._blocks) as outputs:
            self._teacher.call(self._teacher.network, z, time, condition, w)
        # eps as in LPIPS; where a feature vector is zero the gradient of its length is taken as zero.
        return [functional.normalize(layer.float(), dim=1, eps=1e-10) for layer in outputs]


def _encoder_of(unet: nn.Module) -> nn.Module:
    """Return a U-Net that ends after its down blocks and shares the modules up to there."""
    encoder: Any = copy.copy(unet)
    encoder._modules = dict(unet._modules)
    encoder.mid_block, encoder.up_blocks = None, nn.ModuleList()
    encoder.conv_norm_out, encoder.conv_out = None, nn.Identity()
    encoder_module: nn.Module = encoder
    return encoder_module


@contextmanager
def _outputs_of(blocks: nn.ModuleList) -> Iterator[list[Tensor]]:
    """Collect what the layers of down blocks give during the block: the states that a U-Net hands to its up blocks."""
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: tuple[Tensor, tuple[Tensor, ...]]) -> None:
        outputs.extend(output[1])

    hooks = [block.register_forward_hook(keep) for block in blocks]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()
