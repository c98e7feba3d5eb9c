"""The ordinary denoising objective: training a teacher for classifier-free guidance, and converting one to another
prediction type."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from fewstep.diffusion.prediction import PredictionType, from_velocity
from fewstep.diffusion.random import RowRandom
from fewstep.diffusion.schedule import NoiseSchedule
from fewstep.distill.clean import draw_clean
from fewstep.distill.objective import Batch
from fewstep.distill.weights import LossWeight, output_weight
from fewstep.models.denoiser import Condition, Denoiser


class TextToImageNetwork(nn.Module):
    """U-Net and text encoder as one network, so that both are trained, wrapped and averaged together."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder

    @property
    def config(self) -> Any:
        return self.unet.config

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    def enable_gradient_checkpointing(self) -> None:
        """Keep fewer activations, and compute them again in the backward pass."""
        self.unet.enable_gradient_checkpointing()

    def forward(self, z: Tensor, index: Tensor, token_ids: Tensor) -> Tensor:
        """Return the U-Net's output, (B, C, h, w)."""
        return self.unet(z, index, self.text_encoder(token_ids).last_hidden_state, return_dict=False)[0]

    def denoiser(self, *, null_token_ids: Tensor, schedule: NoiseSchedule, prediction_type: PredictionType) -> Denoiser:
        """Return this network, conditioned on token ids, as a denoiser.

        Args:
            null_token_ids: token ids of the empty prompt, (L,) int64.
            schedule: noise schedule.
            prediction_type: what the U-Net outputs.
        """
        return Denoiser(
            network=self,
            forward=_forward_tokens,
            schedule=schedule,
            prediction_type=prediction_type,
            condition_names=("token_ids",),
            null={"token_ids": null_token_ids[None]},
        )


def _forward_tokens(
    network: nn.Module, z: Tensor, time: Tensor, condition: Condition, w_embedding: Tensor | None
) -> Tensor:
    output: Tensor = network(z, time, condition["token_ids"])
    return output


class DenoisingObjective:
    """Predict the noise-free part of noised samples, with the condition dropped in a share of the rows.

    Args:
        model: what is trained, and what it outputs; its network may have output something else until now (an
            eps-network that becomes a v-network).
        condition_dropout: share of rows with the null condition (0.1 in Ho & Salimans 2022).
        loss_weight: name of the weight; "snr_plus_one" is the plain MSE of a v-network.
    """

    def __init__(
        self, model: Denoiser, *, condition_dropout: float = 0.1, loss_weight: LossWeight = "snr_plus_one"
    ) -> None:
        self.model = model
        self.network: nn.Module = model.network
        self.condition_dropout = condition_dropout
        self.loss_weight: LossWeight = loss_weight

    def loss(self, network: nn.Module, batch: Batch, random: RowRandom) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted loss over clean samples (see `draw_clean`) and the model's condition, B rows each."""
        model, schedule = self.model, self.model.schedule
        x = draw_clean(batch, random)
        eps = random.normal(*x.shape[1:])
        time = schedule.random_times(random)
        dropped = random.uniform() < self.condition_dropout
        condition = model.condition_of(batch)
        if self.condition_dropout:
            null = model.unconditional(condition)
            condition = {
                name: torch.where(dropped.view(-1, *(1,) * (value.ndim - 1)), null[name], value)
                for name, value in condition.items()
            }
        alpha, sigma = schedule.alpha_sigma(time, ndim=x.ndim)
        z = alpha * x + sigma * eps
        target = from_velocity(alpha * eps - sigma * x, z, alpha, sigma, model.prediction_type)
        error = (model.call(network, z, time, condition) - target).square().flatten(1).mean(dim=1)
        weight = output_weight(self.loss_weight, alpha, sigma, model.prediction_type).flatten()
        return (weight * error).mean(), {"output_mse": error.mean().detach()}
