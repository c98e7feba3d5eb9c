"""A latent text-to-image model in its parts, read from and written to a diffusers folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models import AutoencoderKL, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.utils.logging import disable_progress_bar as disable_diffusers_bars
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils.logging import disable_progress_bar as disable_transformers_bars

from fewstep.diffusion.prediction import PredictionType, check_prediction_type
from fewstep.diffusion.schedule import NoiseSchedule
from fewstep.errors import ModelError

# Bars for files that load in a blink would bury the progress that matters.
disable_transformers_bars()
disable_diffusers_bars()


@dataclass
class TextToImageParts:
    """The parts of a Stable-Diffusion-shaped model.

    Attributes:
        vae, text_encoder, tokenizer, unet: as in `StableDiffusionPipeline`.
        scheduler_config: the scheduler's configuration as a dictionary.
    """

    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    unet: UNet2DConditionModel
    scheduler_config: dict[str, Any]

    def __post_init__(self) -> None:
        self.schedule = NoiseSchedule.from_scheduler_config(self.scheduler_config)
        self.prediction_type: PredictionType = check_prediction_type(
            self.scheduler_config.get("prediction_type", "epsilon")
        )

    @property
    def _networks(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        return self.vae, self.text_encoder, self.unet

    @property
    def device(self) -> torch.device:
        """Device of the U-Net."""
        return self.unet.device

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

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> TextToImageParts:
        """Move the networks; returns self."""
        for network in self._networks:
            # diffusers warns about every cast, also about one that changes nothing.
            network.to(device) if dtype in (None, network.dtype) else network.to(device, dtype)
        return self

    def freeze(self) -> TextToImageParts:
        """Put the networks in evaluation mode without gradients; returns self."""
        for network in self._networks:
            network.eval().requires_grad_(False)
        return self

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
        pixels = self.vae.decode(x).sample.float()
        return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

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


def load_parts(folder: Path | str, *, dtype: torch.dtype = torch.float32) -> TextToImageParts:
    """Read a latent text-to-image model from a diffusers folder, frozen and in evaluation mode, on the CPU.

    Raises:
        ModelError: the folder is none, or a part is missing, of another kind or damaged.
    """
    folder = Path(folder)
    if not (folder / "model_index.json").is_file():
        raise ModelError(
            f"{folder} is not a diffusers folder: it has no model_index.json. "
            "Save the teacher with pipeline.save_pretrained(FOLDER) and name that folder"
        )
    missing = [f"{name}/ ({what})" for name, what in _NEEDED.items() if not (folder / name).is_dir()]
    if missing:
        raise ModelError(
            f"the model folder {folder} lacks {', '.join(missing)}. A text-to-image teacher needs "
            f"{', '.join(_NEEDED)}: save the whole pipeline, not the U-Net alone"
        )
    try:
        scheduler_config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
        parts = TextToImageParts(
            vae=_load_network(AutoencoderKL, folder / "vae", torch_dtype=dtype),
            text_encoder=_load_network(CLIPTextModel, folder / "text_encoder", dtype=dtype),
            tokenizer=CLIPTokenizer.from_pretrained(str(folder / "tokenizer")),
            unet=_load_network(UNet2DConditionModel, folder / "unet", torch_dtype=dtype),
            scheduler_config=scheduler_config,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"the model folder {folder} cannot be read: {error}") from error
    taken, made = parts.unet.config["in_channels"], parts.vae.config["latent_channels"]
    if taken != made:
        raise ModelError(
            f"the U-Net of {folder} takes {taken} channels but its VAE has {made}: text-to-image needs the two equal"
        )
    _choose_attention(parts)
    return parts.freeze()


#: Longest sequence of latent pixels for which the plain attention product is the faster one on a CPU.
_SMALL_SEQUENCE = 1024


def _choose_attention(parts: TextToImageParts) -> None:
    # For a few dozen tokens torch's CPU flash kernel, one small product at a time inside a parallel region, halves the
    # speed of the whole training; for long sequences it saves the memory of the full attention matrix.
    _, height, width = parts.latent_shape
    if not torch.cuda.is_available() and height * width <= _SMALL_SEQUENCE:
        torch.backends.cuda.enable_flash_sdp(False)  # despite its name the switch of the CPU kernel too


def _load_network(kind: Any, folder: Path, **settings: Any) -> Any:
    # Both libraries fill what a file lacks with random numbers and a warning: a picture of noise, much later.
    network, report = kind.from_pretrained(str(folder), output_loading_info=True, **settings)
    lacking = sorted(report["missing_keys"])
    if lacking:
        raise ModelError(
            f"the weights in {folder} lack {len(lacking)} tensors of a {kind.__name__}, {lacking[0]} for one: "
            "the file is incomplete or of another kind of network; save the model again"
        )
    if hasattr(network, "register_to_config"):
        # diffusers would write where the network was read from, a folder of this machine, into every copy.
        network.register_to_config(_name_or_path=None)
    return network
