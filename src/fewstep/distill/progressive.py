"""Stage two: a student whose one step does what two steps of its teacher do (Meng et al. §3.2, Algorithm 2)."""

from __future__ import annotations

import torch
from diffusers.models import UNet2DConditionModel
from torch import Tensor, nn

from fewstep.diffusion.grid import step_index
from fewstep.diffusion.prediction import PredictionType, ddim_step
from fewstep.diffusion.random import RowRandom
from fewstep.diffusion.schedule import NoiseSchedule
from fewstep.distill.guidance import refuse_epsilon_at_zero_snr
from fewstep.distill.latents import draw_latents
from fewstep.distill.objective import Batch
from fewstep.distill.targets import step_target
from fewstep.distill.weights import LossWeight, output_weight
from fewstep.models.student import copy_unet, guidance_embedding


class ProgressiveObjective:
    """One rung of the halving ladder: N steps of the student imitate 2N steps of the teacher.

    i uniform in 1 … N; t = i/N, m = (i − 0.5)/N, s = (i − 1)/N on the shared grid; two teacher DDIM steps t → m → s
    without gradients, in float32 and unclipped; the target is the output that takes the student from z_t to z_s at
    once.

    Args:
        teacher: w-conditioned U-Net of 2N steps (for the first rung, stage one's), frozen.
        schedule: noise schedule.
        prediction_type: what both networks output.
        num_inference_steps: N of the student.
        w_min, w_max: range of the guidance weight.
        loss_weight: name of omega; the paper uses "truncated_snr".
    """

    def __init__(
        self,
        teacher: UNet2DConditionModel,
        *,
        schedule: NoiseSchedule,
        prediction_type: PredictionType,
        num_inference_steps: int,
        w_min: float,
        w_max: float,
        loss_weight: LossWeight = "truncated_snr",
    ) -> None:
        refuse_epsilon_at_zero_snr(schedule, prediction_type)
        self.teacher = teacher.requires_grad_(False).eval()
        self.network: nn.Module = copy_unet(teacher)
        self.schedule = schedule
        self.prediction_type = prediction_type
        self.num_inference_steps = num_inference_steps
        self.w_min, self.w_max = w_min, w_max
        self.loss_weight: LossWeight = loss_weight
        # Entry j is the time of j half steps: t = 2i, m = 2i − 1, s = 2i − 2.
        self._half_steps = torch.tensor(
            [
                step_index(j / 2, num_inference_steps, num_train_timesteps=schedule.num_train_timesteps)
                for j in range(2 * num_inference_steps + 1)
            ]
        )

    def loss(self, network: nn.Module, batch: Batch, random: RowRandom) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss over latent_mean, latent_std (B, C, h, w) and text (B, L, D)."""
        x = draw_latents(batch, random)
        text = batch["text"].to(self.teacher.dtype)
        eps = random.normal(*x.shape[1:])
        i = random.integers(1, self.num_inference_steps + 1)
        w = random.uniform(self.w_min, self.w_max)
        self._half_steps = self._half_steps.to(x.device)
        t, m, s = (self._half_steps[2 * i - back] for back in (0, 1, 2))
        w_embedding = guidance_embedding(w, self.teacher.config["time_cond_proj_dim"]).to(text.dtype)

        at_t, at_m, at_s = (self.schedule.alpha_sigma(index) for index in (t, m, s))
        z_t = at_t[0] * x + at_t[1] * eps
        with torch.no_grad():
            first = self.teacher(z_t, t, text, timestep_cond=w_embedding, return_dict=False)[0].float()
            z_m = ddim_step(first, z_t, *at_t, *at_m, self.prediction_type)
            second = self.teacher(z_m, m, text, timestep_cond=w_embedding, return_dict=False)[0].float()
            z_s = ddim_step(second, z_m, *at_m, *at_s, self.prediction_type)
            target = step_target(z_t, z_s, *at_t, *at_s, self.prediction_type)
        output = network(z_t, t, text, timestep_cond=w_embedding, return_dict=False)[0].float()
        error = (output - target).square().mean(dim=(1, 2, 3))
        weight = output_weight(self.loss_weight, *at_t, self.prediction_type).flatten()
        relative = (error.mean() / target.square().mean()).sqrt()
        return (weight * error).mean(), {"output_mse": error.mean().detach(), "relative_error": relative.detach()}
