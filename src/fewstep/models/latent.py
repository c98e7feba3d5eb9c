"""What the text models in latents share: a U-Net around a VAE, and CLIP's text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from diffusers.models import AutoencoderKL, UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from fewstep.models.folder import check_components, load_network, read_scheduler
from fewstep.models.parts import Parts, pixels_of

#: Of pictures that are decoded together: 4 of 1024 px, whose activations take some 12 GiB in float32.
_PIXELS_AT_ONCE = 4 * 1024**2

Pipeline = TypeVar("Pipeline", bound=DiffusionPipeline)


def scaled_posterior(vae: AutoencoderKL, pixels: Tensor, *, hole: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of the scaled latents of uint8 pictures, (B, c, h, w), float32.

    Args:
        vae: the autoencoder.
        pixels: uint8 (B, C, H, W).
        hole: (B, 1, H, W) of bool, True where the pictures are to be grey; None: nowhere.
    """
    x = pixels.to(vae.device, vae.dtype) / 127.5 - 1
    posterior = vae.encode(x if hole is None else x * ~hole).latent_dist
    scale = vae.config["scaling_factor"]
    return posterior.mean.float() * scale, posterior.std.float() * scale


def pictures_at_once(height: int, width: int) -> int:
    """Return how many pictures of a size in pixels are decoded together."""
    return max(1, _PIXELS_AT_ONCE // (height * width))


@dataclass(kw_only=True)
class LatentParts(Parts):
    """A U-Net in the latents of a VAE.

    Attributes:
        vae, unet: as in diffusers' pipelines.
        scheduler_config: the scheduler's configuration as a dictionary.
    """

    vae: AutoencoderKL
    unet: UNet2DConditionModel
    scheduler_config: dict[str, Any]

    def __post_init__(self) -> None:
        # A schedule or prediction type that is not known is told when the model is read, not in the first step.
        _ = self.schedule, self.prediction_type

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

    @torch.no_grad()
    def encode_pictures(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the scaled latents of uint8 pictures (B, 3, H, W), float32."""
        return scaled_posterior(self.vae, pixels)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return the pictures of scaled latents (B, C, h, w): uint8 (B, 3, H, W)."""
        x = (latents / self.vae.config["scaling_factor"]).to(self.vae.device, self.vae.dtype)
        at_once = pictures_at_once(*(side * self.vae_scale_factor for side in x.shape[2:]))
        return torch.cat([pixels_of(self.vae.decode(part).sample) for part in x.split(at_once)])


@dataclass(kw_only=True)
class ClipParts(LatentParts):
    """A U-Net that attends to the tokens of one CLIP text encoder, as Stable Diffusion's do.

    Attributes:
        text_encoder, tokenizer: as in `StableDiffusionPipeline`.
    """

    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer

    @property
    def _networks(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        return self.vae, self.text_encoder, self.unet

    def token_ids(self, prompts: Sequence[str]) -> Tensor:
        """Return the token ids of the prompts, padded and cut to the tokenizer's length, (B, L) int64, on the CPU."""
        return tokenize(self.tokenizer, prompts)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Return the text embeddings that the U-Net attends to, (B, L, D); "" is the null prompt."""
        return self.text_encoder(self.token_ids(prompts).to(self.text_encoder.device)).last_hidden_state

    def _pipeline(self, kind: type[Pipeline]) -> Pipeline:
        """Return an unmodified pipeline of diffusers over these parts."""
        # diffusers says that a pipeline has these two; None is how one is made without.
        make: Any = kind
        made: Pipeline = make(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=DDIMScheduler.from_config(self.scheduler_config),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        return made

    def _null_embedding(self) -> Tensor | None:
        """Return the embedding of the empty prompt, (1, L, D); None for a U-Net that takes w: it has one branch."""
        return self.encode_prompts([""]) if self.unet.config["time_cond_proj_dim"] is None else None


#: What a folder of the Stable Diffusion kind holds, in words.
CLIP_COMPONENTS = {
    "unet": "the denoising network",
    "vae": "the autoencoder of the latents",
    "text_encoder": "the text encoder",
    "tokenizer": "the tokenizer",
    "scheduler": "the noise schedule",
}


def read_clip_components(folder: Path, *, dtype: torch.dtype, what: str) -> dict[str, Any]:
    """Return what `ClipParts` are made of, read from a diffusers folder.

    Args:
        folder: the folder.
        dtype: of the networks.
        what: what it is to be, for messages, such as "An inpainting teacher".

    Raises:
        ModelError: a part is missing or of another kind.
    """
    check_components(folder, CLIP_COMPONENTS, what=what)
    return {
        "vae": load_network(AutoencoderKL, folder / "vae", torch_dtype=dtype),
        "text_encoder": load_network(CLIPTextModel, folder / "text_encoder", dtype=dtype),
        "tokenizer": CLIPTokenizer.from_pretrained(str(folder / "tokenizer")),
        "unet": load_network(UNet2DConditionModel, folder / "unet", torch_dtype=dtype),
        "scheduler_config": read_scheduler(folder),
    }


def tokenize(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> Tensor:
    """Return token ids, padded and cut to the tokenizer's length, (B, L) int64, on the CPU."""
    ids: Tensor = tokenizer(
        list(prompts),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    return ids
