"""Text to picture in latents: Stable Diffusion 1.x and 2.x, read from and written to a diffusers folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.models import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from torch import Tensor, nn

from fewstep.diffusion.prediction import PredictionType
from fewstep.diffusion.schedule import NoiseSchedule
from fewstep.errors import ModelError
from fewstep.models.denoiser import Condition, Denoiser
from fewstep.models.folder import choose_attention
from fewstep.models.latent import ClipParts, read_clip_components


@dataclass(kw_only=True)
class TextToImageParts(ClipParts):
    """The parts of a Stable-Diffusion-shaped model.

    Attributes:
        vae, text_encoder, tokenizer, unet: as in `StableDiffusionPipeline`.
        scheduler_config: the scheduler's configuration as a dictionary.
    """

    family: ClassVar[str] = "text_latent"

    def denoiser(self) -> Denoiser:
        return text_denoiser(
            self.unet,
            null_embedding=self._null_embedding(),
            schedule=self.schedule,
            prediction_type=self.prediction_type,
        )

    def conditions(self, samples: Sequence[Mapping[str, Any]]) -> Condition:
        """Return the text embeddings of the samples' captions."""
        return {"text": self.encode_prompts([sample["caption"] for sample in samples])}

    def pipeline(self) -> StableDiffusionPipeline:
        """Return an unmodified StableDiffusionPipeline over these parts."""
        return self._pipeline(StableDiffusionPipeline)

    def save(self, folder: Path | str) -> None:
        """Write a diffusers folder that StableDiffusionPipeline.from_pretrained reads."""
        self.pipeline().save_pretrained(str(folder), safe_serialization=True)


def load_text_latent(folder: Path, *, dtype: torch.dtype) -> TextToImageParts:
    """Read a Stable Diffusion of 4 (or any) latent channels; see `load_parts`.

    Raises:
        ModelError: a part is missing or of another kind, or U-Net and VAE do not fit together.
    """
    parts = TextToImageParts(**read_clip_components(folder, dtype=dtype, what="A text-to-image teacher"))
    taken, made = parts.unet.config["in_channels"], parts.vae.config["latent_channels"]
    if taken != made:
        hint = (
            ". It is an inpainting model's: save it with StableDiffusionInpaintPipeline, for model_index.json to say so"
            if taken == 2 * made + 1
            else ""
        )
        raise ModelError(
            f"the U-Net of {folder} takes {taken} channels but its VAE has {made}: text-to-image needs the two equal"
            f"{hint}"
        )
    if parts.unet.config["addition_embed_type"] == "text_time":
        raise ModelError(
            f"the U-Net of {folder} takes sizes and pooled text as Stable Diffusion XL's does, but model_index.json "
            "names another pipeline: save it with StableDiffusionXLPipeline"
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
    null_embedding: Tensor | None,
    schedule: NoiseSchedule,
    prediction_type: PredictionType,
) -> Denoiser:
    """Return the denoiser of a text-conditional U-Net.

    Args:
        unet: guided teacher or w-conditioned student.
        null_embedding: text embedding of the empty prompt, (1, L, D); None for a U-Net without that branch.
        schedule: its noise schedule.
        prediction_type: what it outputs.
    """
    return Denoiser(
        network=unet,
        forward=forward_text,
        schedule=schedule,
        prediction_type=prediction_type,
        condition_names=("text",),
        null={} if null_embedding is None else {"text": null_embedding},
    )
