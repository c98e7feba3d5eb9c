"""The discrete variance-preserving noise schedule, read from a diffusers scheduler configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor

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

#: The time before index 0: the clean picture, alpha = 1 and sigma = 0 (diffusers: `set_alpha_to_one=true`).
CLEAN = -1


@dataclass(frozen=True)
class NoiseSchedule:
    """alpha and sigma of z_t = alpha_t x + sigma_t eps for integer times, alpha² + sigma² = 1.

    Attributes:
        alphas: (T + 1,) float64; entry k is the time index k − 1, so that entry 0 is the clean picture (index −1).
        sigmas: (T + 1,) float64, likewise.
    """

    alphas: Tensor
    sigmas: Tensor
    _on_device: dict[torch.device, tuple[Tensor, ...]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_scheduler_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """Return the schedule of a diffusers scheduler configuration (its betas, zero-terminal-SNR rescaling included).

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
        try:
            alphas_cumprod = DDIMScheduler(**settings).alphas_cumprod.double()
        except NotImplementedError as error:
            raise ModelError(
                f"beta_schedule={config.get('beta_schedule')!r} is none that diffusers' DDIMScheduler knows: "
                "linear, scaled_linear and squaredcos_cap_v2; give the betas themselves as trained_betas"
            ) from error
        squares = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod])
        return cls(alphas=squares.sqrt(), sigmas=(1 - squares).clamp_min(0).sqrt())

    @property
    def num_train_timesteps(self) -> int:
        """Number of time indices T; the noisiest is T − 1."""
        return self.alphas.numel() - 1

    def alpha_sigma(self, index: Tensor, *, ndim: int = 4) -> tuple[Tensor, Tensor]:
        """Return (alpha, sigma) at integer times, float32, each (B, 1, …) with `ndim` dimensions.

        Args:
            index: (B,) int64 in −1 … T − 1; −1 is the clean picture.
            ndim: dimensions of the tensor that they will multiply.
        """
        shape = (-1,) + (1,) * (ndim - 1)
        alphas, sigmas, _ = self._tables(index.device)
        return alphas[index + 1].view(shape), sigmas[index + 1].view(shape)

    def snr(self, index: Tensor) -> Tensor:
        """Return the signal-to-noise ratio alpha²/sigma² at integer times, (B,), float32 (infinite at −1)."""
        return self._tables(index.device)[2][index + 1]

    def _tables(self, device: torch.device) -> tuple[Tensor, ...]:
        # The float32 tables stay on each device: looking a time up must not wait for the device.
        if device not in self._on_device:
            snr = (self.alphas / self.sigmas) ** 2
            self._on_device[device] = tuple(table.float().to(device) for table in (self.alphas, self.sigmas, snr))
        return self._on_device[device]

    def add_noise(self, x: Tensor, noise: Tensor, index: Tensor) -> Tensor:
        """Return z_t = alpha_t x + sigma_t noise, float32, in x's shape; index is (B,)."""
        alpha, sigma = self.alpha_sigma(index, ndim=x.ndim)
        return alpha * x + sigma * noise
