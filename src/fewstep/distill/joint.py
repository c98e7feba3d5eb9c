"""U-Net and text encoders as one network, so that all of a text-conditional teacher is trained together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fewstep.distill.denoising import TextToImageNetwork
from fewstep.errors import ModelError
from fewstep.models import Denoiser, InpaintingParts, Parts, SDXLParts, TextToImageParts
from fewstep.models.denoiser import Condition
from fewstep.models.inpainting import forward_inpainting
from fewstep.models.sdxl import embed_tokens, forward_sdxl

#: Parts of the condition that are made of the caption -> sub-folder of the tokenizer.
_TOKENIZERS = {"token_ids": "tokenizer", "token_ids_2": "tokenizer_2"}

_OF_THE_PICTURE = ("mask", "masked_latents")


class InpaintingNetwork(nn.Module):
    """The U-Net of an inpainting model and its text encoder."""

    def __init__(self, parts: InpaintingParts) -> None:
        super().__init__()
        self.unet = parts.unet
        self.text_encoder = parts.text_encoder

    @property
    def config(self) -> Any:
        return self.unet.config

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    def forward(self, z: Tensor, time: Tensor, token_ids: Tensor, mask: Tensor, masked_latents: Tensor) -> Tensor:
        """Return the U-Net's output, (B, C, h, w)."""
        text = self.text_encoder(token_ids).last_hidden_state
        condition = {"text": text, "mask": mask, "masked_latents": masked_latents}
        return forward_inpainting(self.unet, z, time, condition, None)


class SDXLNetwork(nn.Module):
    """The U-Net of a Stable Diffusion XL and its two text encoders; pictures are uncropped and of the model's size."""

    def __init__(self, parts: SDXLParts) -> None:
        super().__init__()
        self.unet = parts.unet
        self.text_encoder = parts.text_encoder
        self.text_encoder_2 = parts.text_encoder_2
        self._time_ids: list[int] = parts.time_ids(1)[0].tolist()

    @property
    def config(self) -> Any:
        return self.unet.config

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    def freeze_unused(self) -> None:
        """Take the weights that nothing depends on out of the training: the first encoder's last layer. SDXL reads the
        layer before, and data-parallel training waits for the gradient of every weight that has one."""
        encoder = getattr(self.text_encoder, "text_model", self.text_encoder)
        for unused in (encoder.encoder.layers[-1], encoder.final_layer_norm):
            unused.requires_grad_(False)

    def forward(self, z: Tensor, time: Tensor, token_ids: Tensor, token_ids_2: Tensor) -> Tensor:
        """Return the U-Net's output, (B, C, h, w). Rows of negative ids get zeros in place of text."""
        text, pooled = embed_tokens(
            self.text_encoder,
            self.text_encoder_2,
            token_ids=token_ids.clamp_min(0),
            token_ids_2=token_ids_2.clamp_min(0),
        )
        told = (token_ids[:, :1] >= 0).to(pooled.dtype)
        time_ids = torch.tensor(self._time_ids, device=z.device).expand(z.shape[0], -1)
        condition = {"text": text * told[:, :, None], "pooled": pooled * told, "time_ids": time_ids}
        return forward_sdxl(self.unet, z, time, condition, None)


def joint_denoiser(parts: Parts) -> Denoiser:
    """Return U-Net and text encoders of a model as one trainable denoiser, conditioned on token ids.

    Its null condition is what the family's own pipeline gives the unconditional branch.

    Raises:
        ModelError: the model has no text encoder.
    """
    common: dict[str, Any] = {"schedule": parts.schedule, "prediction_type": parts.prediction_type}
    if isinstance(parts, SDXLParts):
        network = SDXLNetwork(parts).requires_grad_(True).train()
        network.freeze_unused()
        null = parts.token_ids([""])
        if parts.force_zeros_for_empty_prompt:
            null = {name: torch.full_like(ids, -1) for name, ids in null.items()}
        return Denoiser(network=network, forward=_forward_sdxl, condition_names=tuple(null), null=null, **common)
    if isinstance(parts, InpaintingParts):
        return Denoiser(
            network=InpaintingNetwork(parts).requires_grad_(True).train(),
            forward=_forward_inpainting,
            condition_names=("token_ids", *_OF_THE_PICTURE),
            null={"token_ids": parts.token_ids([""])},
            **common,
        )
    if isinstance(parts, TextToImageParts):
        network_of_text = TextToImageNetwork(parts.unet, parts.text_encoder).requires_grad_(True).train()
        return network_of_text.denoiser(null_token_ids=parts.token_ids([""])[0], **common)
    raise ModelError(
        f"a model of the family {parts.family} has no text encoder to train with its U-Net: name one of the families "
        f"{TextToImageParts.family}, {SDXLParts.family} or {InpaintingParts.family}"
    )


def joint_tokenizers(parts: Parts) -> dict[str, str]:
    """Return what of a joint denoiser's condition is made of the caption: name -> sub-folder of the tokenizer."""
    return {name: folder for name, folder in _TOKENIZERS.items() if hasattr(parts, folder)}


def stored_conditions(parts: Parts) -> tuple[str, ...]:
    """Return what of a joint denoiser's condition is made of the picture, and stored beside its latents."""
    return _OF_THE_PICTURE if isinstance(parts, InpaintingParts) else ()


def take_weights(parts: Parts, network: nn.Module) -> None:
    """Copy the weights of a jointly trained network into the parts that it was made of, or into a copy of them."""
    for name, trained in network.named_children():
        getattr(parts, name).load_state_dict(trained.state_dict())


def _forward_sdxl(
    network: nn.Module, z: Tensor, time: Tensor, condition: Condition, w_embedding: Tensor | None
) -> Tensor:
    output: Tensor = network(z, time, condition["token_ids"], condition["token_ids_2"])
    return output


def _forward_inpainting(
    network: nn.Module, z: Tensor, time: Tensor, condition: Condition, w_embedding: Tensor | None
) -> Tensor:
    output: Tensor = network(z, time, condition["token_ids"], condition["mask"], condition["masked_latents"])
    return output
