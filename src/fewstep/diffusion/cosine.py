"""The continuous cosine schedule (Salimans & Ho 2022, appendix; their code's `schedules.py`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewstep.diffusion.random import RowRandom
from fewstep.diffusion.schedule import NoiseSchedule
from fewstep.errors import ModelError, RecipeError


@dataclass(frozen=True)
class CosineSchedule(NoiseSchedule):
    """Real times u in [0, 1]: log SNR(u) = −2 log tan(a u + b), so alpha = cos(a u + b) and sigma = sin(a u + b).

    b = arctan(exp(−logsnr_max/2)) and a = arctan(exp(−logsnr_min/2)) − b. Every step of an N-step grid turns by the
    same angle a/N. The clean time u = 0 still has sigma = sin(b), 4.5e-5 with the defaults.

    Attributes:
        logsnr_min: log SNR at u = 1.
        logsnr_max: log SNR at u = 0.
    """

    logsnr_min: float = -20.0
    logsnr_max: float = 20.0

    #: `_class_name` in the scheduler configuration of a model on this schedule.
    scheduler_class_name: ClassVar[str] = "CosineDDIMScheduler"

    def __post_init__(self) -> None:
        if not self.logsnr_min < self.logsnr_max:
            raise ModelError(
                f"logsnr_min={self.logsnr_min:g} is not below logsnr_max={self.logsnr_max:g}: noise would not grow "
                "with time; the usual values are -20 and 20"
            )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> CosineSchedule:
        """Return the schedule of a `CosineDDIMScheduler` configuration."""
        return cls(float(config.get("logsnr_min", -20.0)), float(config.get("logsnr_max", 20.0)))

    @property
    def _b(self) -> float:
        return math.atan(math.exp(-0.5 * self.logsnr_max))

    @property
    def _a(self) -> float:
        return math.atan(math.exp(-0.5 * self.logsnr_min)) - self._b

    @property
    def last_alpha(self) -> float:
        return math.cos(self._a + self._b)

    def angle(self, time: Tensor) -> Tensor:
        """Return phi of times (B,), float64, with alpha = cos phi and sigma = sin phi."""
        return self._a * time.double() + self._b

    def alpha_sigma(self, time: Tensor, *, ndim: int = 4) -> tuple[Tensor, Tensor]:
        shape = (-1,) + (1,) * (ndim - 1)
        # In float64 first: near pi/2 a float32 angle is off by a good part of so small a cosine.
        phi = self.angle(time)
        return phi.cos().float().view(shape), phi.sin().float().view(shape)

    def network_time(self, time: Tensor) -> Tensor:
        """Return 1000 · phi/(pi/2), float32: "inv_cos" of the log SNR, as Salimans & Ho's network is told it."""
        return (self.angle(time) * (1000.0 / (0.5 * math.pi))).float()

    def time_of_network(self, network_time: Tensor) -> Tensor:
        """Return the times that `network_time` gave, float64."""
        return (network_time.double() * (0.5 * math.pi / 1000.0) - self._b) / self._a

    def random_times(self, random: RowRandom) -> Tensor:
        return random.uniform().double()

    def times(self, num_steps: int) -> Tensor:
        if num_steps < 1:
            raise RecipeError(f"num_inference_steps={num_steps} is below 1: a sampler makes at least one step")
        return torch.arange(num_steps + 1, dtype=torch.float64) / num_steps

    def fraction(self, time: Tensor) -> Tensor:
        return time.float()

    def same_as(self, other: NoiseSchedule) -> bool:
        return self == other

    def snr(self, time: Tensor) -> Tensor:
        """Return alpha²/sigma² at times (B,), float32."""
        return (1 / self.angle(time).tan().square()).float()
