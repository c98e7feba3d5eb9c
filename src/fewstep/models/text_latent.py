"""Text to picture in latents: Stable Diffusion 1.x and 2.x, read from and written to a diffusers folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers.models import AutoencoderKL, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from fewstep.diffusion.prediction import PredictionType
from fewstep.diffusion.schedule import NoiseSchedule
from fewstep.errors import ModelError
from fewstep.models.denoiser import Condition, Denoiser
from fewstep.models.folder import check_components, choose_attention, load_network, read_scheduler
from fewstep.models.parts import Parts, pixels_of


@dataclass
class TextToImageParts(Parts):
    """The parts of a Stable-Diffusion-shaped model.

    Attributes:
        vae, text_encoder, tokenizer, unet: as in `StableDiffusionPipeline`.
        scheduler_config: the scheduler's configuration as a dictionary.
    """

    family: ClassVar[str] = "text_latent"

    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    unet: UNet2DConditionModel
    scheduler_config: dict[str, Any]

    def __post_init__(self) -> None:
        # A schedule or prediction type that is not known is told when the model is read, not in the first step.
        _ = self.schedule, self.prediction_type

    @property
    def _networks(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        return self.vae, self.text_encoder, self.unet

    @property
    def network(self) -> UNet2DConditionModel:
        return self.unet

    def with_network(self, network: nn.Module, scheduler_config: dict[str, Any]) -> Self:
        return replace(self, unet=network, scheduler_config=scheduler_config)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        return self.latent_shape

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the latents at the model's own resolution."""
        size = self.unet.config["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        return self.vae.config["latent_channels"], height, width

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent, along a side."""
        return 2 ** (len(self.vae.config["block_out_channels"]) - 1)

    @property
    def resolution(self) -> int:
        """Side of the pictures in pixels."""
        return self.latent_shape[1] * self.vae_scale_factor

    def token_ids(self, prompts: Sequence[str]) -> Tensor:
        """Return the token ids of the prompts, padded and cut to the tokenizer's length, (B, L) int64, on the CPU."""
        return self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Return the text embeddings that the U-Net attends to, (B, L, D); "" is the null prompt."""
        return self.text_encoder(self.token_ids(prompts).to(self.text_encoder.device)).last_hidden_state

    def denoiser(self) -> Denoiser:
        return text_denoiser(
            self.unet,
            null_embedding=self.encode_prompts([""]),
            schedule=self.schedule,
            prediction_type=self.prediction_type,
        )

    def conditions(self, samples: Sequence[Mapping[str, Any]]) -> Condition:
        """Return the text embeddings of the samples' captions."""
        return {"text": self.encode_prompts([sample["caption"] for sample in samples])}

    @torch.no_grad()
    def encode_pictures(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the scaled latents of uint8 pictures (B, 3, H, W), float32."""
        x = pixels.to(self.vae.device, self.vae.dtype) / 127.5 - 1
        posterior = self.vae.encode(x).latent_dist
        scale = self.vae.config["scaling_factor"]
        return posterior.mean.float() * scale, posterior.std.float() * scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return the pictures of scaled latents (B, C, h, w): uint8 (B, 3, H, W)."""
        x = (latents / self.vae.config["scaling_factor"]).to(self.vae.device, self.vae.dtype)
        return pixels_of(self.vae.decode(x).sample)

    def pipeline(self) -> StableDiffusionPipeline:
        """Return an unmodified StableDiffusionPipeline over these parts."""
        # diffusers says that a pipeline has these two; None is how one is made without.
        no_safety_checker: Any = None
        return StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=DDIMScheduler.from_config(self.scheduler_config),
            safety_checker=no_safety_checker,
            feature_extractor=no_safety_checker,
            requires_safety_checker=False,
        )

    def save(self, folder: Path | str) -> None:
        """Write a diffusers folder that StableDiffusionPipeline.from_pretrained reads."""
        self.pipeline().save_pretrained(str(folder), safe_serialization=True)


_NEEDED = {
    "unet": "the denoising network",
    "vae": "the autoencoder of the latents",
    "text_encoder": "the text encoder",
    "tokenizer": "the tokenizer",
    "scheduler": "the noise schedule",
}


def load_text_latent(folder: Path, *, dtype: torch.dtype) -> TextToImageParts:
    """Read a Stable Diffusion of 4 (or any) latent channels; see `load_parts`.

    Raises:
        ModelError: a part is missing or of another kind, or U-Net and VAE do not fit together.
    """
    check_components(folder, _NEEDED, what="A text-to-image teacher")
    parts = TextToImageParts(
        vae=load_network(AutoencoderKL, folder / "vae", torch_dtype=dtype),
        text_encoder=load_network(CLIPTextModel, folder / "text_encoder", dtype=dtype),
        tokenizer=CLIPTokenizer.from_pretrained(str(folder / "tokenizer")),
        unet=load_network(UNet2DConditionModel, folder / "unet", torch_dtype=dtype),
        scheduler_config=read_scheduler(folder),
    )
    taken, made = parts.unet.config["in_channels"], parts.vae.config["latent_channels"]
    if taken != made:
        raise ModelError(
            f"the U-Net of {folder} takes {taken} channels but its VAE has {made}: text-to-image needs the two equal"
        )
    choose_attention(*parts.latent_shape[1:])
    return parts


def forward_text(
    network: nn.Module, z: Tensor, time: Tensor, condition: Condition, w_embedding: Tensor | None
) -> Tensor:
    """Return a U-Net's output for z_t, text embeddings (B, L, D) and, if it takes one, an embedding of w."""
    output: Tensor = network(z, time, condition["text"], timestep_cond=w_embedding, return_dict=False)[0]
    return output


def text_denoiser(
    unet: UNet2DConditionModel,
    *,
    null_embedding: Tensor,
    schedule: NoiseSchedule,
    prediction_type: PredictionType,
) -> Denoiser:
    """Return the denoiser of a text-conditional U-Net.

    Args:
        unet: guided teacher or w-conditioned student.
        null_embedding: text embedding of the empty prompt, (1, L, D).
        schedule: its noise schedule.
        prediction_type: what it outputs.
    """
    return Denoiser(
        network=unet,
        forward=forward_text,
        schedule=schedule,
        prediction_type=prediction_type,
        condition_names=("text",),
        null={"text": null_embedding},
    )
