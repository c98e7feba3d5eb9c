"""Text-guided inpainting in latents: a U-Net that also gets the hole and the picture around it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.models import AutoencoderKL
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint import StableDiffusionInpaintPipeline
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.errors import DataError, ModelError
from fewstep.models.architecture import unet_like
from fewstep.models.denoiser import Condition, Denoiser
from fewstep.models.folder import choose_attention
from fewstep.models.latent import ClipParts, read_clip_components, scaled_posterior
from fewstep.models.text_latent import TextToImageParts


@dataclass(kw_only=True)
class InpaintingParts(ClipParts):
    """The parts of an inpainting model of Stable Diffusion's shape.

    The U-Net takes the noisy latents, the hole and the latents of the picture with the hole grey, in this order:
    4 + 1 + 4 channels.

    Attributes:
        vae, text_encoder, tokenizer, unet: as in `StableDiffusionInpaintPipeline`.
        scheduler_config: the scheduler's configuration as a dictionary.
    """

    family: ClassVar[str] = "inpainting"

    def denoiser(self) -> Denoiser:
        null = self._null_embedding()
        return Denoiser(
            network=self.unet,
            forward=forward_inpainting,
            schedule=self.schedule,
            prediction_type=self.prediction_type,
            condition_names=("text", "mask", "masked_latents"),
            # Both branches see the hole and what is around it.
            null={} if null is None else {"text": null},
        )

    def conditions(self, samples: Sequence[Mapping[str, Any]]) -> Condition:
        """Return text (B, L, D) of the samples' captions, and mask and masked_latents of their pictures and holes.

        Args:
            samples: each with caption, pixels (uint8, (3, H, W)) and mask ((1, H, W), True or 1 where the hole is).

        Raises:
            DataError: a sample has no mask, or one that does not fit; see `encode_holes`.
        """
        for sample in samples:
            if "mask" not in sample:
                raise DataError(
                    f"the sample {sample.get('key', sample['caption'])!r} has no mask: an inpainting model needs one "
                    "for each picture, (1, H, W), True where the hole is"
                )
        pixels = torch.stack([sample["pixels"] for sample in samples])
        masks = [check_mask(sample["mask"], sample["pixels"]) for sample in samples]
        text = self.encode_prompts([sample["caption"] for sample in samples])
        return {"text": text, **self.encode_holes(pixels, torch.stack(masks))}

    @torch.no_grad()
    def encode_holes(self, pixels: Tensor, masks: Tensor) -> dict[str, Tensor]:
        """Return what the U-Net is told of pictures with holes; see the function."""
        return encode_holes(self.vae, pixels, masks)

    def pipeline(self) -> StableDiffusionInpaintPipeline:
        """Return an unmodified StableDiffusionInpaintPipeline over these parts."""
        return self._pipeline(StableDiffusionInpaintPipeline)

    def save(self, folder: Path | str) -> None:
        """Write a diffusers folder that StableDiffusionInpaintPipeline.from_pretrained reads."""
        self.pipeline().save_pretrained(str(folder), safe_serialization=True)


def encode_holes(vae: AutoencoderKL, pixels: Tensor, masks: Tensor) -> dict[str, Tensor]:
    """Return what the U-Net is told of pictures with holes, as `StableDiffusionInpaintPipeline` computes it.

    Args:
        vae: the autoencoder.
        pixels: uint8 pictures (B, 3, H, W).
        masks: (B, 1, H, W), True or 1 where the hole is.

    Returns:
        mask (B, 1, h, w), 1 where the hole is, reduced to the latents' size by taking the nearest pixel, and
        masked_latents (B, C, h, w), the mean of the scaled latents of the picture with its hole grey; float32. The
        pipeline draws from the posterior instead, whose deviation is small beside the latents' own.

    Raises:
        DataError: the masks are of another size than the pictures, or hold values between 0 and 1.
    """
    hole = check_mask(masks, pixels).to(vae.device)
    masked_latents, _ = scaled_posterior(vae, pixels, hole=hole)
    return {"mask": F.interpolate(hole.float(), size=masked_latents.shape[2:]), "masked_latents": masked_latents}


def check_mask(mask: Tensor, pixels: Tensor) -> Tensor:
    """Return a mask as bool, True where the hole is.

    Args:
        mask: (…, 1, H, W) of bool, or numbers of which all are 0 or 1.
        pixels: the pictures that it is for, (…, C, H, W).

    Raises:
        DataError: it is of another size than the pictures, or holds other values.
    """
    wanted = (*pixels.shape[:-3], 1, *pixels.shape[-2:])
    if mask.shape != wanted:
        raise DataError(
            f"the mask has the shape {tuple(mask.shape)} and the picture {tuple(pixels.shape)}: a mask must be "
            f"{wanted}, as high and wide as its picture; resize it (nearest) to that"
        )
    if mask.dtype == torch.bool:
        return mask
    others = mask[(mask != 0) & (mask != 1)]
    if others.numel():
        raise DataError(
            f"the mask holds {others.flatten()[0].item():g}, and each pixel must be 0 (kept) or 1 (hole): a mask of "
            "soft edges or of 0 to 255 has to be cut first, for example `mask > 0.5` or `mask > 127`"
        )
    return mask.bool()


def forward_inpainting(
    network: nn.Module, z: Tensor, time: Tensor, condition: Condition, w_embedding: Tensor | None
) -> Tensor:
    """Return a U-Net's output for z_t, the condition of `InpaintingParts` and, if it takes one, an embedding of w."""
    inputs = torch.cat([z, condition["mask"], condition["masked_latents"]], dim=1)
    output: Tensor = network(inputs, time, condition["text"], timestep_cond=w_embedding, return_dict=False)[0]
    return output


def add_inpainting(parts: TextToImageParts | InpaintingParts) -> InpaintingParts:
    """Return a text-to-image model as an inpainting model, the same one if it is that already.

    The U-Net's further input channels begin with zero weights, as Stable Diffusion's inpainting model began: before it
    is trained, it draws what it drew before, whatever the hole. Networks are shared with `parts`, but for the U-Net.

    Raises:
        ModelError: the VAE has not 4 latent channels, which is what `StableDiffusionInpaintPipeline` takes.
    """
    if isinstance(parts, InpaintingParts):
        return parts
    channels = parts.vae.config["latent_channels"]
    _check_channels(2 * channels + 1, channels, what="the model to add inpainting to")
    unet = unet_like(parts.unet, in_channels=2 * channels + 1)
    state = dict(parts.unet.state_dict())
    weight = state["conv_in.weight"]
    state["conv_in.weight"] = torch.cat([weight, weight.new_zeros(weight.shape[0], channels + 1, *weight.shape[2:])], 1)
    unet.load_state_dict(state)
    return InpaintingParts(
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        unet=unet,
        scheduler_config=parts.scheduler_config,
    ).freeze()


def load_inpainting(folder: Path, *, dtype: torch.dtype) -> InpaintingParts:
    """Read an inpainting model of Stable Diffusion's shape; see `load_model`.

    Raises:
        ModelError: a part is missing or of another kind, or U-Net and VAE do not fit together.
    """
    parts = InpaintingParts(**read_clip_components(folder, dtype=dtype, what="An inpainting teacher"))
    _check_channels(parts.unet.config["in_channels"], parts.vae.config["latent_channels"], what=str(folder))
    choose_attention(*parts.latent_shape[1:])
    return parts


def _check_channels(taken: int, made: int, *, what: str) -> None:
    if (taken, made) == (9, 4):
        return
    hint = (
        "its U-Net is a text-to-image one: save it with StableDiffusionPipeline, or train an inpainting teacher from "
        "it (train_teacher.init with inpainting: true)"
        if taken == made
        else "name another model"
    )
    raise ModelError(
        f"the U-Net of {what} takes {taken} channels and its VAE has {made}: StableDiffusionInpaintPipeline needs 9 "
        f"(4 of noisy latents, 1 of the mask, 4 of the masked picture's latents) and a VAE of 4; {hint}"
    )
