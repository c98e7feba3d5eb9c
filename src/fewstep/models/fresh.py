"""A text-to-image model from nothing, around a VAE that is trained already."""

from __future__ import annotations

from typing import Any

from diffusers.models import AutoencoderKL
from transformers import CLIPTokenizer

from fewstep.models.architecture import SCHEDULER_CONFIG, TeacherArchitecture
from fewstep.models.sdxl import SDXLParts
from fewstep.models.text_latent import TextToImageParts


def fresh_text_model(
    architecture: TeacherArchitecture, *, vae: AutoencoderKL, tokenizer: CLIPTokenizer
) -> TextToImageParts | SDXLParts:
    """Return a model of random weights (torch's global generator), with v-prediction and zero terminal SNR.

    Args:
        architecture: its sizes.
        vae: gives the number and the size of the latents.
        tokenizer: of all text encoders.
    """
    # diffusers keeps the side of the pictures in the VAE's configuration.
    size = vae.config["sample_size"] // 2 ** (len(vae.config["block_out_channels"]) - 1)
    parts: dict[str, Any] = {
        "vae": vae,
        "tokenizer": tokenizer,
        "text_encoder": architecture.build_text_encoder(tokenizer),
        "unet": architecture.build_unet(latent_channels=vae.config["latent_channels"], latent_size=size),
        "scheduler_config": dict(SCHEDULER_CONFIG),
    }
    if architecture.family == "sdxl":
        return SDXLParts(
            **parts,
            tokenizer_2=tokenizer,
            text_encoder_2=architecture.build_second_text_encoder(tokenizer),
            # In training, captions are dropped by leaving them empty.
            force_zeros_for_empty_prompt=False,
        )
    return TextToImageParts(**parts)
