"""What every family of models offers: its networks moved about, its pictures in and out, and its denoiser."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from fewstep.diffusion.prediction import PredictionType, check_prediction_type
from fewstep.diffusion.schedule import NoiseSchedule
from fewstep.models.denoiser import Condition, Denoiser


class Parts(ABC):
    """A model in its parts, read from and written to a diffusers folder. One subclass a family.

    Attributes:
        family: name of the family, as recipes and reports call it.
        scheduler_config: the scheduler's configuration as a dictionary.
        stores_latents: whether the encode stage makes latents; otherwise training reads the pictures themselves.
    """

    family: ClassVar[str]
    stores_latents: ClassVar[bool] = True
    scheduler_config: dict[str, Any]

    @cached_property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule."""
        return NoiseSchedule.from_scheduler_config(self.scheduler_config)

    @property
    def prediction_type(self) -> PredictionType:
        """What the denoising network outputs."""
        return check_prediction_type(self.scheduler_config.get("prediction_type", "epsilon"))

    @property
    @abstractmethod
    def network(self) -> Any:
        """The denoising network."""

    @property
    @abstractmethod
    def _networks(self) -> Sequence[nn.Module]:
        """All networks."""

    @abstractmethod
    def with_network(self, network: nn.Module, scheduler_config: dict[str, Any]) -> Self:
        """Return the same model with another denoising network and scheduler."""

    @property
    @abstractmethod
    def sample_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of what is diffused, at the model's own resolution."""

    @property
    @abstractmethod
    def resolution(self) -> int:
        """Side of the pictures in pixels."""

    @property
    def picture_channels(self) -> int:
        """Channels of the pictures: 3, or 1 for grey ones."""
        return 3

    @property
    def num_classes(self) -> int | None:
        """Number of classes of a class-conditional model; None for models that take text."""
        return None

    @abstractmethod
    def denoiser(self) -> Denoiser:
        """Return the denoising network with all that belongs to calling it."""

    @abstractmethod
    def conditions(self, samples: Sequence[Mapping[str, Any]]) -> Condition:
        """Return what the network is told of decoded samples (caption, label, size …), one row each, on its device."""

    @abstractmethod
    def encode_pictures(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of what is diffused for uint8 pictures (B, C, H, W), float32."""

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """Return the pictures of diffused samples (B, C, h, w): uint8 (B, C, H, W)."""

    @abstractmethod
    def save(self, folder: Path | str) -> None:
        """Write a diffusers folder."""

    @property
    def device(self) -> torch.device:
        """Device of the denoising network."""
        device: torch.device = self.network.device
        return device

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        """Move the networks; returns self."""
        for network in self._networks:
            # diffusers warns about every cast, also about one that changes nothing.
            network.to(device) if dtype in (None, network.dtype) else network.to(device, dtype)
        return self

    def freeze(self) -> Self:
        """Put the networks in evaluation mode without gradients; returns self."""
        for network in self._networks:
            network.eval().requires_grad_(False)
        return self


def pixels_of(x: Tensor) -> Tensor:
    """Return pictures in [−1, 1], any float type, as uint8."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
