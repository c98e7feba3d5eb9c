"""Stage one: one w-conditioned network that matches the classifier-free-guided pair (Meng et al. §3.1, eq. 3)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from diffusers.models import UNet2DConditionModel
from torch import Tensor, nn

from fewstep.diffusion.prediction import PredictionType, to_velocity
from fewstep.diffusion.random import RowRandom
from fewstep.diffusion.schedule import NoiseSchedule
from fewstep.distill.latents import draw_latents
from fewstep.distill.objective import Batch
from fewstep.distill.weights import LossWeight, output_weight
from fewstep.errors import ModelError
from fewstep.models.sampling import guided_model
from fewstep.models.student import guidance_embedding, make_student

_QUARTERS = 4


class GuidanceObjective:
    """E[ omega(lambda_t) ||x̂_student(z_t, c, w) − ((1 + w) x̂(z_t, c) − w x̂(z_t, ∅))||² ] (eq. 3).

    One w ~ U[w_min, w_max], one t uniform over the schedule's indices and one noise for each row; the inputs are noised
    data. The teacher's two branches run in one batch of 2B without gradients; the student is only ever conditional.
    Guidance commutes with the prediction type, so outputs are compared as they are and the weight is converted.

    Args:
        teacher: U-Net sampled with classifier-free guidance, frozen.
        null_embedding: text embedding of the empty prompt, (1, L, D).
        schedule: noise schedule of the teacher.
        prediction_type: what teacher and student output.
        w_min, w_max: range of the guidance weight; guidance_scale is 1 + w.
        embedding_dim: width of the w embedding (`time_cond_proj_dim`).
        loss_weight: name of omega; the paper's "constant" for latent models is "x".
    """

    def __init__(
        self,
        teacher: UNet2DConditionModel,
        *,
        null_embedding: Tensor,
        schedule: NoiseSchedule,
        prediction_type: PredictionType,
        w_min: float,
        w_max: float,
        embedding_dim: int = 256,
        loss_weight: LossWeight = "x",
    ) -> None:
        refuse_epsilon_at_zero_snr(schedule, prediction_type)
        self.teacher = teacher.requires_grad_(False).eval()
        self.network: nn.Module = make_student(teacher, embedding_dim=embedding_dim).requires_grad_(True)
        self.null_embedding = null_embedding
        self.schedule = schedule
        self.prediction_type = prediction_type
        self.w_min, self.w_max = w_min, w_max
        self.embedding_dim = embedding_dim
        self.loss_weight: LossWeight = loss_weight

    def loss(self, network: nn.Module, batch: Batch, random: RowRandom) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss over latent_mean, latent_std (B, C, h, w) and text (B, L, D)."""
        x = draw_latents(batch, random)
        text = batch["text"].to(self.teacher.dtype)
        eps = random.normal(*x.shape[1:])
        index = random.integers(0, self.schedule.num_train_timesteps)
        w = random.uniform(self.w_min, self.w_max)
        alpha, sigma = self.schedule.alpha_sigma(index)
        z = alpha * x + sigma * eps
        with torch.no_grad():
            target = guided_model(self.teacher, text, self.null_embedding.to(text), w)(z, index).float()
        w_embedding = guidance_embedding(w, self.embedding_dim).to(text.dtype)
        output = network(z, index, text, timestep_cond=w_embedding, return_dict=False)[0].float()
        error = (output - target).square().mean(dim=(1, 2, 3))
        weight = output_weight(self.loss_weight, alpha, sigma, self.prediction_type).flatten()
        relative = (error.mean() / target.square().mean()).sqrt()
        return (weight * error).mean(), {"output_mse": error.mean().detach(), "relative_error": relative.detach()}


def refuse_epsilon_at_zero_snr(schedule: NoiseSchedule, prediction_type: PredictionType) -> None:
    """Refuse eps-prediction on a schedule whose last time is pure noise: x̂ = (z − sigma epŝ)/alpha needs alpha > 0.

    Raises:
        ModelError: the two are combined.
    """
    if prediction_type == "epsilon" and float(schedule.alphas[-1]) == 0.0:
        raise ModelError(
            "prediction_type=epsilon cannot be used with rescale_betas_zero_snr: at the last time alpha is 0 and eps "
            "says nothing of the picture. Use a v_prediction teacher, or one without the rescaling"
        )


@dataclass(frozen=True)
class GuidedError:
    """Relative errors of a student's v̂ against the guided pair: ‖Δv‖ / ‖v^w‖ over all rows that belong to a key.

    Attributes:
        by_w: for each guidance weight, over all times.
        by_time: for each quarter of the times ("750-999" is the noisiest of 1000), over all weights.
    """

    by_w: dict[float, float]
    by_time: dict[str, float]

    @property
    def mean(self) -> float:
        """The mean over the weights."""
        return sum(self.by_w.values()) / len(self.by_w)


@torch.no_grad()
def guided_relative_error(
    teacher: UNet2DConditionModel,
    student: UNet2DConditionModel,
    batches: Iterable[Batch],
    *,
    null_embedding: Tensor,
    schedule: NoiseSchedule,
    prediction_type: PredictionType,
    weights: Sequence[float],
    seed: int,
) -> GuidedError:
    """Return the relative errors of the student's v̂ against the guided pair's.

    Times are uniform over the indices; every w sees the same noise and times. For networks that output eps or x the
    error is converted to v (‖Δv‖² = (SNR + 1) ‖Δx‖²).

    Args:
        batches: held-out latents and text, as in training.
        weights: the guidance weights to measure at.
        seed: seed of noise and times.
    """
    # (weights, quarters of the times, [error, norm])
    sums = torch.zeros(len(weights), _QUARTERS, 2, dtype=torch.float64)
    for number, batch in enumerate(batches):
        random = RowRandom(seed=seed, step=number, rows=range(len(batch["text"])), device=batch["text"].device)
        x = draw_latents(batch, random)
        text = batch["text"].to(teacher.dtype)
        index = random.integers(0, schedule.num_train_timesteps)
        alpha, sigma = schedule.alpha_sigma(index)
        z = alpha * x + sigma * random.normal(*x.shape[1:])
        to_v = output_weight("snr_plus_one", alpha, sigma, prediction_type)
        quarter = (index * _QUARTERS // schedule.num_train_timesteps).cpu()
        for row, w in enumerate(weights):
            target = guided_model(teacher, text, null_embedding.to(text), w)(z, index).float()
            embedding = guidance_embedding(
                torch.full((len(text),), w, device=text.device), student.config["time_cond_proj_dim"]
            )
            output = student(z.to(text.dtype), index, text, timestep_cond=embedding.to(text.dtype)).sample.float()
            target_v = to_velocity(target, z, alpha, sigma, prediction_type)
            both = torch.stack([to_v * (output - target).square(), target_v.square()], dim=-1)
            sums[row].index_add_(0, quarter, both.sum(dim=(1, 2, 3)).double().cpu())
    edges = [-(-k * schedule.num_train_timesteps // _QUARTERS) for k in range(_QUARTERS + 1)]  # rounded up
    return GuidedError(
        by_w={w: _relative(sums[row].sum(0)) for row, w in enumerate(weights)},
        by_time={
            f"{low}-{high - 1}": _relative(sums[:, k].sum(0))
            for k, (low, high) in enumerate(pairwise(edges))
            if sums[:, k, 1].sum() > 0
        },
    )


def _relative(error_and_norm: Tensor) -> float:
    return float((error_and_norm[0] / error_and_norm[1]).sqrt())
