"""The ordinary denoising objective, for training a teacher with classifier-free guidance in mind."""

from __future__ import annotations

import torch
from diffusers.models import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from fewstep.diffusion.prediction import PredictionType, from_velocity
from fewstep.diffusion.random import RowRandom
from fewstep.diffusion.schedule import NoiseSchedule
from fewstep.distill.latents import draw_latents
from fewstep.distill.objective import Batch
from fewstep.distill.weights import LossWeight, output_weight


class TextToImageNetwork(nn.Module):
    """U-Net and text encoder as one network, so that both are trained, wrapped and averaged together."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder

    def forward(self, z: Tensor, index: Tensor, token_ids: Tensor) -> Tensor:
        """Return the U-Net's output, (B, C, h, w)."""
        return self.unet(z, index, self.text_encoder(token_ids).last_hidden_state, return_dict=False)[0]


class DenoisingObjective:
    """Predict the noise-free part of noised latents, with the condition dropped in a share of the rows.

    Args:
        network: what is trained.
        schedule: noise schedule; times are uniform over its indices.
        prediction_type: what the network outputs.
        null_token_ids: token ids of the empty prompt, (L,) int64.
        condition_dropout: share of rows with the empty prompt (0.1 in Ho & Salimans 2022).
        loss_weight: name of the weight; "snr_plus_one" is the plain MSE of a v-network.
    """

    def __init__(
        self,
        network: TextToImageNetwork,
        *,
        schedule: NoiseSchedule,
        prediction_type: PredictionType,
        null_token_ids: Tensor,
        condition_dropout: float = 0.1,
        loss_weight: LossWeight = "snr_plus_one",
    ) -> None:
        self.network: nn.Module = network
        self.schedule = schedule
        self.prediction_type = prediction_type
        self.null_token_ids = null_token_ids
        self.condition_dropout = condition_dropout
        self.loss_weight: LossWeight = loss_weight

    def loss(self, network: nn.Module, batch: Batch, random: RowRandom) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted loss over latent_mean, latent_std (B, C, h, w) and token_ids (B, L)."""
        x = draw_latents(batch, random)
        eps = random.normal(*x.shape[1:])
        index = random.integers(0, self.schedule.num_train_timesteps)
        dropped = random.uniform() < self.condition_dropout
        tokens = torch.where(dropped[:, None], self.null_token_ids.to(x.device), batch["token_ids"])
        alpha, sigma = self.schedule.alpha_sigma(index)
        z = alpha * x + sigma * eps
        target = from_velocity(alpha * eps - sigma * x, z, alpha, sigma, self.prediction_type)
        error = (network(z, index, tokens).float() - target).square().mean(dim=(1, 2, 3))
        weight = output_weight(self.loss_weight, alpha, sigma, self.prediction_type).flatten()
        return (weight * error).mean(), {"output_mse": error.mean().detach()}
