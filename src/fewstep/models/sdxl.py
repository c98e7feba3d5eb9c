"""Text to picture in latents: Stable Diffusion XL, with two text encoders and the picture's sizes as conditions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers.models import AutoencoderKL, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from fewstep.errors import ModelError
from fewstep.models.denoiser import Condition, Denoiser
from fewstep.models.folder import check_components, choose_attention, load_network, read_scheduler
from fewstep.models.latent import CLIP_COMPONENTS, LatentParts, tokenize

#: Original size, crop and target size, two numbers each.
NUM_TIME_IDS = 6


@dataclass(kw_only=True)
class SDXLParts(LatentParts):
    """The parts of a Stable-Diffusion-XL-shaped model.

    Attributes:
        vae, text_encoder, text_encoder_2, tokenizer, tokenizer_2, unet: as in `StableDiffusionXLPipeline`.
        scheduler_config: the scheduler's configuration as a dictionary.
        force_zeros_for_empty_prompt: the unconditional branch gets zeros (SDXL 1.0); otherwise the empty prompt.
    """

    family: ClassVar[str] = "sdxl"

    text_encoder: CLIPTextModel
    text_encoder_2: CLIPTextModelWithProjection
    tokenizer: CLIPTokenizer
    tokenizer_2: CLIPTokenizer
    force_zeros_for_empty_prompt: bool = True

    @property
    def _networks(self) -> tuple[nn.Module, ...]:
        return self.vae, self.text_encoder, self.text_encoder_2, self.unet

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        """Move the networks; returns self. SDXL's VAE overflows in float16 and stays in float32 then."""
        super().to(device, dtype)
        if self.vae.dtype == torch.float16 and self.vae.config["force_upcast"]:
            self.vae.to(dtype=torch.float32)
        return self

    def token_ids(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return the token ids of the prompts for each text encoder, (B, L) int64, on the CPU."""
        return {
            "token_ids": tokenize(self.tokenizer, prompts),
            "token_ids_2": tokenize(self.tokenizer_2, prompts),
        }

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return the text embeddings that the U-Net attends to, (B, L, D), and the pooled ones, (B, P)."""
        ids = {name: value.to(self.text_encoder.device) for name, value in self.token_ids(prompts).items()}
        return embed_tokens(self.text_encoder, self.text_encoder_2, **ids)

    def time_ids(self, count: int) -> Tensor:
        """Return original size, crop and target size of uncropped pictures of the model's own size, (count, 6) int64.

        They are what `StableDiffusionXLPipeline` takes when it is told no sizes, so that a student is trained for them.
        """
        _, height, width = self.latent_shape
        size = (height * self.vae_scale_factor, width * self.vae_scale_factor)
        # Whole numbers, which no change of precision rounds.
        return torch.tensor([*size, 0, 0, *size], device=self.device).expand(count, -1)

    def denoiser(self) -> Denoiser:
        null: dict[str, Tensor] = {}
        # A U-Net that takes w has one branch.
        if self.unet.config["time_cond_proj_dim"] is None:
            text, pooled = self.encode_prompts([""])
            if self.force_zeros_for_empty_prompt:
                text, pooled = torch.zeros_like(text), torch.zeros_like(pooled)
            null = {"text": text, "pooled": pooled}
        return Denoiser(
            network=self.unet,
            forward=forward_sdxl,
            schedule=self.schedule,
            prediction_type=self.prediction_type,
            condition_names=("text", "pooled", "time_ids"),
            null=null,
        )

    def conditions(self, samples: Sequence[Mapping[str, Any]]) -> Condition:
        """Return the samples' captions as text (B, L, D) and pooled (B, P), and time_ids (B, 6): their own, or without
        them those of uncropped pictures of the model's own size."""
        text, pooled = self.encode_prompts([sample["caption"] for sample in samples])
        time_ids = self.time_ids(len(samples))
        if "time_ids" in samples[0]:
            time_ids = torch.stack([torch.as_tensor(sample["time_ids"]) for sample in samples]).to(time_ids)
        return {"text": text, "pooled": pooled, "time_ids": time_ids}

    def pipeline(self) -> StableDiffusionXLPipeline:
        """Return an unmodified StableDiffusionXLPipeline over these parts."""
        return StableDiffusionXLPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            text_encoder_2=self.text_encoder_2,
            tokenizer=self.tokenizer,
            tokenizer_2=self.tokenizer_2,
            unet=self.unet,
            scheduler=DDIMScheduler.from_config(self.scheduler_config),
            force_zeros_for_empty_prompt=self.force_zeros_for_empty_prompt,
        )

    def save(self, folder: Path | str) -> None:
        """Write a diffusers folder that StableDiffusionXLPipeline.from_pretrained reads."""
        self.pipeline().save_pretrained(str(folder), safe_serialization=True)


def embed_tokens(
    text_encoder: nn.Module, text_encoder_2: nn.Module, *, token_ids: Tensor, token_ids_2: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what SDXL makes of token ids (B, L): both encoders' last but one hidden states side by side, (B, L, D),
    and the second one's projected text embedding, (B, P)."""
    first = text_encoder(token_ids, output_hidden_states=True)
    second = text_encoder_2(token_ids_2, output_hidden_states=True)
    return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second.text_embeds


def forward_sdxl(
    network: nn.Module, z: Tensor, time: Tensor, condition: Condition, w_embedding: Tensor | None
) -> Tensor:
    """Return a U-Net's output for z_t, the condition of `SDXLParts` and, if it takes one, an embedding of w."""
    added = {"text_embeds": condition["pooled"], "time_ids": condition["time_ids"]}
    output: Tensor = network(
        z, time, condition["text"], timestep_cond=w_embedding, added_cond_kwargs=added, return_dict=False
    )[0]
    return output


_NEEDED = {
    **CLIP_COMPONENTS,
    "text_encoder_2": "the second text encoder",
    "tokenizer_2": "the second tokenizer",
}


def load_sdxl(folder: Path, *, dtype: torch.dtype) -> SDXLParts:
    """Read a Stable Diffusion XL; see `load_model`.

    Raises:
        ModelError: a part is missing or of another kind, or the parts do not fit together (a refiner, an inpainting
            model).
    """
    check_components(folder, _NEEDED, what="A Stable Diffusion XL teacher")
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    parts = SDXLParts(
        vae=load_network(AutoencoderKL, folder / "vae", torch_dtype=dtype),
        text_encoder=load_network(CLIPTextModel, folder / "text_encoder", dtype=dtype),
        text_encoder_2=load_network(CLIPTextModelWithProjection, folder / "text_encoder_2", dtype=dtype),
        tokenizer=CLIPTokenizer.from_pretrained(str(folder / "tokenizer")),
        tokenizer_2=CLIPTokenizer.from_pretrained(str(folder / "tokenizer_2")),
        unet=load_network(UNet2DConditionModel, folder / "unet", torch_dtype=dtype),
        scheduler_config=read_scheduler(folder),
        force_zeros_for_empty_prompt=bool(index.get("force_zeros_for_empty_prompt", True)),
    )
    _check_fit(parts, folder)
    choose_attention(*parts.latent_shape[1:])
    return parts.to("cpu")


def _check_fit(parts: SDXLParts, folder: Path) -> None:
    unet, vae = parts.unet.config, parts.vae.config
    first, second = parts.text_encoder.config, parts.text_encoder_2.config
    added = NUM_TIME_IDS * (unet["addition_time_embed_dim"] or 0) + second.projection_dim
    # what, of the U-Net, of the others
    rules = (
        ("channels in", unet["in_channels"], vae["latent_channels"], "the VAE's latents have"),
        ("numbers a token", unet["cross_attention_dim"], first.hidden_size + second.hidden_size, "the encoders give"),
        (
            "added numbers",
            unet["projection_class_embeddings_input_dim"],
            added,
            f"pooled text and {NUM_TIME_IDS} sizes give",
        ),
    )
    for what, taken, given, giver in rules:
        if taken != given:
            raise ModelError(
                f"the U-Net of {folder} takes {taken} {what} but {giver} {given}: text-to-image needs the two equal. "
                "Refiners and inpainting models of Stable Diffusion XL cannot be distilled; name its base model"
            )
    if vae["latents_mean"] is not None:
        raise ModelError(
            f"the VAE of {folder} has latents_mean, a shift of the latents that only models trained with EDM's noise "
            "schedule use; that schedule cannot be distilled here: name a model with a discrete schedule"
        )
