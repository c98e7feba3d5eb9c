"""The samplers as diffusers schedulers, for use in diffusers pipelines."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMScheduler, DDIMSchedulerOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fewstep.diffusion.cosine import CosineSchedule
from fewstep.diffusion.prediction import PredictionType, check_prediction_type, ddim_step, from_sample, to_sample
from fewstep.diffusion.samplers import noise_std
from fewstep.diffusion.schedule import DiscreteSchedule, NoiseSchedule
from fewstep.errors import SamplingError


class StochasticDDIMScheduler(DDIMScheduler):
    """The N-step stochastic sampler (Meng et al. eqs. 4–7) for stock pipelines.

    Loads from a student's folder, whose configuration is DDIMScheduler's::

        pipe.scheduler = StochasticDDIMScheduler.from_pretrained(folder, subfolder="scheduler")
        pipe("a red apple", num_inference_steps=4, guidance_scale=4.0, generator=generator)

    It is DDIM with an eta of its own each step (`stochastic_etas`), but not computed so: at the last but one step
    DDIM takes the root of 1 − alpha² − (eta …)², which is 0 and in float32 now and then a little less.
    """

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Set the times of the steps.

        Raises:
            SamplingError: the stock scheduler's next time would leave the grid.
        """
        total = self.config.num_train_timesteps
        if num_inference_steps < 1 or total % num_inference_steps:
            raise SamplingError(
                f"num_inference_steps={num_inference_steps} does not divide num_train_timesteps={total}: diffusers' "
                "DDIM would leave the trailing grid that the student was made for. Use a divisor (1, 2, 4, 5, 8, …)"
            )
        if self.config.timestep_spacing != "trailing" or not self.config.set_alpha_to_one:
            raise SamplingError(
                f"timestep_spacing={self.config.timestep_spacing!r}, set_alpha_to_one={self.config.set_alpha_to_one}: "
                "students are made for trailing times that end at the clean picture; load the scheduler of the "
                "student's own folder"
            )
        super().set_timesteps(num_inference_steps, device)
        self.schedule = DiscreteSchedule.from_betas(self.config)
        self._times = self.schedule.times(num_inference_steps)

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, ...]:
        """Return the state after one step, and x̂; the arguments are DDIMScheduler's.

        Args:
            model_output, timestep, sample, generator, return_dict: as there. Pipelines hand the generator over only to
                a scheduler whose `step` names it.
            eta: 0, the pipelines' default.
            use_clipped_model_output: of no effect: eps-hat always belongs to the x̂ that is taken.
            variance_noise: standard normal noise instead of the generator's.

        Raises:
            SamplingError: an eta, or a timestep that `set_timesteps` did not make.
        """
        if eta:
            raise SamplingError(
                f"eta={eta:g} was given, but the stochastic sampler has an eta for each of its steps: leave it out"
            )
        place = (self._times[1:] == int(timestep)).nonzero()
        if not len(place):
            raise SamplingError(f"timestep={int(timestep)} is none of the {len(self.timesteps)} of set_timesteps")
        z, x = _step(
            model_output,
            sample,
            int(place) + 1,
            times=self._times,
            schedule=self.schedule,
            prediction_type=check_prediction_type(self.config.prediction_type),
            clip=self.config.clip_sample_range if self.config.clip_sample else None,
            stochastic=True,
            generator=generator,
            noise=variance_noise,
        )
        return DDIMSchedulerOutput(prev_sample=z, pred_original_sample=x) if return_dict else (z, x)


class CosineDDIMScheduler(SchedulerMixin, ConfigMixin):
    """DDIM on the continuous cosine schedule, deterministic or as the N-step stochastic sampler.

    Args:
        logsnr_min, logsnr_max: of `CosineSchedule`.
        prediction_type: what the network outputs.
        clip_sample: keep x̂ within [−1, 1], for pictures in pixels.
        stochastic: the stochastic sampler instead of the deterministic one.
    """

    order = 1
    config_name = "scheduler_config.json"

    @register_to_config
    def __init__(
        self,
        logsnr_min: float = -20.0,
        logsnr_max: float = 20.0,
        prediction_type: str = "v_prediction",
        clip_sample: bool = True,
        stochastic: bool = False,
    ) -> None:
        self.schedule = CosineSchedule(logsnr_min, logsnr_max)
        self.init_noise_sigma = 1.0
        self._type = check_prediction_type(prediction_type)
        self.timesteps = torch.empty(0)

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Set the N times, noisiest first, as the network is told them (float32)."""
        self.num_inference_steps = num_inference_steps
        self._times = self.schedule.times(num_inference_steps)
        self.timesteps = self.schedule.network_time(self._times[1:].flip(0)).to(device)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Return the sample as it is."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, ...]:
        """Return the state after the step that begins at `timestep`, and x̂.

        Raises:
            SamplingError: `timestep` is none of `timesteps`.
        """
        told = self.timesteps.cpu()
        place = int((told - float(timestep)).abs().argmin())
        if abs(float(told[place]) - float(timestep)) > 1e-3:
            raise SamplingError(f"timestep={float(timestep):g} is none of the {len(told)} that set_timesteps made")
        z, x = _step(
            model_output,
            sample,
            len(told) - place,
            times=self._times,
            schedule=self.schedule,
            prediction_type=self._type,
            clip=1.0 if self.config.clip_sample else None,
            stochastic=self.config.stochastic,
            generator=generator,
        )
        return DDIMSchedulerOutput(prev_sample=z, pred_original_sample=x) if return_dict else (z, x)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return z_t of clean samples, at times as the network is told them, (B,)."""
        return self.schedule.noise(original_samples, noise, self.schedule.time_of_network(timesteps))

    def __len__(self) -> int:
        return 1000


def _step(
    output: Tensor,
    z: Tensor,
    i: int,
    *,
    times: Tensor,
    schedule: NoiseSchedule,
    prediction_type: PredictionType,
    clip: float | None,
    stochastic: bool,
    generator: torch.Generator | list[torch.Generator] | None,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the state after the step from t = i/N, and x̂; one step of `samplers.ddim` or `samplers.stochastic`."""
    given = z.dtype
    # In half precision the difference of two products that S is would lose most of its digits.
    z, output = (value.to(torch.promote_types(given, torch.float32)) for value in (z, output))

    def at(j: int) -> tuple[Tensor, Tensor]:
        alpha, sigma = schedule.alpha_sigma(times[j : j + 1], ndim=z.ndim)
        return alpha.to(z), sigma.to(z)

    k = max(i - 2, 0) if stochastic else i - 1
    x = to_sample(output, z, *at(i), prediction_type)
    if clip is not None:
        x = x.clamp(-clip, clip)
        output = from_sample(x, z, *at(i), prediction_type)
    after = ddim_step(output, z, *at(i), *at(k), prediction_type)
    if stochastic and i > 1:
        if noise is None:
            noise = randn_tensor(z.shape, generator=generator, device=z.device, dtype=z.dtype)
        after = at(i - 1)[0] / at(k)[0] * after + noise_std(*at(i - 1), *at(k)) * noise.to(z)
    return after.to(given), x.to(given)
