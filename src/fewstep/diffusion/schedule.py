"""Variance-preserving noise schedules, z_t = alpha_t x + sigma_t eps: what a schedule answers, and the discrete one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor

from fewstep.diffusion.grid import step_indices
from fewstep.diffusion.random import RowRandom
from fewstep.errors import ModelError

#: What a diffusers scheduler configuration says of its noise schedule.
BETA_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
)

#: The time before index 0 of a discrete schedule: the clean picture, alpha = 1 and sigma = 0 (diffusers:
#: `set_alpha_to_one=true`).
CLEAN = -1


class NoiseSchedule(ABC):
    """alpha and sigma as functions of a time, and the times that training and sampling visit.

    A time is a number of the schedule's own kind, one for each row: an index (int64) or a real number (float64).
    Everything else in the house takes times as they come and hands them back to the schedule.
    """

    @staticmethod
    def from_scheduler_config(config: Mapping[str, Any]) -> NoiseSchedule:
        """Return the schedule of a diffusers scheduler configuration.

        Raises:
            ModelError: the configuration is that of no variance-preserving schedule that is known here.
        """
        from fewstep.diffusion.cosine import CosineSchedule

        if config.get("_class_name") == CosineSchedule.scheduler_class_name:
            return CosineSchedule.from_config(config)
        return DiscreteSchedule.from_betas(config)

    @abstractmethod
    def alpha_sigma(self, time: Tensor, *, ndim: int = 4) -> tuple[Tensor, Tensor]:
        """Return (alpha, sigma) at times (B,), float32, each (B, 1, …) with `ndim` dimensions."""

    @abstractmethod
    def network_time(self, time: Tensor) -> Tensor:
        """Return what a network is told of times (B,), the clean time included."""

    @abstractmethod
    def random_times(self, random: RowRandom) -> Tensor:
        """Return times uniform over the schedule, (B,), for training."""

    @abstractmethod
    def times(self, num_steps: int) -> Tensor:
        """Return the N + 1 times of an N-step grid, (N + 1,), on the CPU: entry i is t = i/N, so that the first is
        clean and the last the noisiest."""

    @abstractmethod
    def fraction(self, time: Tensor) -> Tensor:
        """Return t in [0, 1] of times (B,), float32: 0 is clean, 1 the noisiest."""

    @abstractmethod
    def same_as(self, other: NoiseSchedule) -> bool:
        """Return whether both are one and the same function."""

    @property
    @abstractmethod
    def last_alpha(self) -> float:
        """alpha at the noisiest time."""

    def noise(self, x: Tensor, eps: Tensor, time: Tensor, *, pure_noise_at_end: bool = False) -> Tensor:
        """Return z_t = alpha_t x + sigma_t eps, float32, in x's shape.

        Args:
            x: clean samples, (B, …).
            eps: standard normal noise, same shape.
            time: (B,).
            pure_noise_at_end: take eps itself at the noisiest time. Sampling begins there with pure noise, whatever
                trace of the picture the schedule leaves; the formulas keep their alpha (SDXL-Lightning, Lin et al.
                2024, §3.1).
        """
        alpha, sigma = self.alpha_sigma(time, ndim=x.ndim)
        z = alpha * x + sigma * eps
        if not pure_noise_at_end:
            return z
        at_end = (self.fraction(time) >= 1.0).view(-1, *(1,) * (x.ndim - 1))
        return torch.where(at_end, eps, z)


@dataclass(frozen=True)
class DiscreteSchedule(NoiseSchedule):
    """T integer times, as Stable Diffusion has them; time −1 is the clean picture.

    Attributes:
        alphas: (T + 1,) float64; entry k is the time index k − 1, so that entry 0 is the clean picture (index −1).
        sigmas: (T + 1,) float64, likewise.
    """

    alphas: Tensor
    sigmas: Tensor
    _on_device: dict[torch.device, tuple[Tensor, ...]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_betas(cls, config: Mapping[str, Any]) -> DiscreteSchedule:
        """Return the schedule of a diffusers configuration with betas (zero-terminal-SNR rescaling included).

        Raises:
            ModelError: the configuration is not that of a variance-preserving beta schedule.
        """
        if "num_train_timesteps" not in config or not ("beta_schedule" in config or config.get("trained_betas")):
            raise ModelError(
                f"the scheduler configuration ({config.get('_class_name', 'no class name')}) names no beta schedule: "
                "num_train_timesteps and beta_schedule (or trained_betas) are needed; "
                "save the teacher with a DDIM, PNDM, DPM-Solver or Euler scheduler"
            )
        settings = {key: config[key] for key in BETA_KEYS if config.get(key) is not None}
        # Building diffusers' own scheduler keeps every named beta schedule and the rescaling exactly as it has them.
        # On the CPU also where networks are being made on another device, or on none.
        try:
            with torch.device("cpu"):
                alphas_cumprod = DDIMScheduler(**settings).alphas_cumprod.double()
                squares = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod])
        except NotImplementedError as error:
            raise ModelError(
                f"beta_schedule={config.get('beta_schedule')!r} is none that diffusers' DDIMScheduler knows: "
                "linear, scaled_linear and squaredcos_cap_v2; give the betas themselves as trained_betas"
            ) from error
        return cls(alphas=squares.sqrt(), sigmas=(1 - squares).clamp_min(0).sqrt())

    @property
    def num_train_timesteps(self) -> int:
        """Number of time indices T; the noisiest is T − 1."""
        return self.alphas.numel() - 1

    @property
    def last_alpha(self) -> float:
        return float(self.alphas[-1])

    def alpha_sigma(self, time: Tensor, *, ndim: int = 4) -> tuple[Tensor, Tensor]:
        """Return (alpha, sigma) at integer times, float32, each (B, 1, …) with `ndim` dimensions.

        Args:
            time: (B,) int64 in −1 … T − 1; −1 is the clean picture.
            ndim: dimensions of the tensor that they will multiply.
        """
        shape = (-1,) + (1,) * (ndim - 1)
        alphas, sigmas, _ = self._tables(time.device)
        return alphas[time + 1].view(shape), sigmas[time + 1].view(shape)

    def network_time(self, time: Tensor) -> Tensor:
        """Return the index; a network knows none for the clean picture, and the one beside it is 0."""
        return time.clamp_min(0)

    def random_times(self, random: RowRandom) -> Tensor:
        return random.integers(0, self.num_train_timesteps)

    def times(self, num_steps: int) -> Tensor:
        return torch.tensor(step_indices(num_steps, num_train_timesteps=self.num_train_timesteps)).flip(0)

    def fraction(self, time: Tensor) -> Tensor:
        return (time + 1).float() / self.num_train_timesteps

    def same_as(self, other: NoiseSchedule) -> bool:
        return isinstance(other, DiscreteSchedule) and torch.equal(self.alphas, other.alphas)

    def snr(self, time: Tensor) -> Tensor:
        """Return the signal-to-noise ratio alpha²/sigma² at integer times, (B,), float32 (infinite at −1)."""
        return self._tables(time.device)[2][time + 1]

    def _tables(self, device: torch.device) -> tuple[Tensor, ...]:
        # The float32 tables stay on each device: looking a time up must not wait for the device.
        if device not in self._on_device:
            snr = (self.alphas / self.sigmas) ** 2
            self._on_device[device] = tuple(table.float().to(device) for table in (self.alphas, self.sigmas, snr))
        return self._on_device[device]
