"""Latents made in training, of pictures, by the teacher's own frozen VAE, so that none need be stored."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fewstep.diffusion.random import RowRandom
from fewstep.distill.objective import Batch, Objective
from fewstep.distill.tokens import Encoded, TextEncoders
from fewstep.errors import ModelError
from fewstep.models import ClassModel, Parts
from fewstep.models.inpainting import encode_holes
from fewstep.models.latent import LatentParts, pictures_at_once, scaled_posterior

_TAKEN = ("pixels", "mask", "token_ids", "token_ids_2")


class PictureEncoders(nn.Module):
    """The VAE of a model and its text encoders, if it has some, frozen.

    Raises:
        ModelError: the model has no VAE.
    """

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        if not isinstance(parts, (LatentParts, ClassModel)) or parts.vae is None:
            raise ModelError(f"a model of the family {parts.family} has no VAE: leave encode.store_latents as it is")
        self.vae = parts.vae
        self.text_encoders = None if isinstance(parts, ClassModel) else TextEncoders(parts)
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, pixels: Tensor, mask: Tensor | None = None, **token_ids: Tensor) -> dict[str, Tensor]:
        """Return what is stored otherwise: latent_mean and latent_std (B, c, h, w); mask and masked_latents of an
        inpainting model; text (B, L, D), and pooled (B, P) of a Stable Diffusion XL.

        Args:
            pixels: (B, C, H, W), uint8.
            mask: for an inpainting model, (B, 1, H, W), True or 1 where the hole is.
            token_ids: token_ids (B, L), and token_ids_2 where there are two text encoders.
        """
        made = {} if self.text_encoders is None else self.text_encoders(**token_ids)
        at_once = pictures_at_once(*pixels.shape[2:])
        encoded = [scaled_posterior(self.vae, some) for some in pixels.split(at_once)]
        made["latent_mean"], made["latent_std"] = (torch.cat(each) for each in zip(*encoded, strict=True))
        if mask is not None:
            both = zip(pixels.split(at_once), mask.split(at_once), strict=True)
            holes = [encode_holes(self.vae, *some) for some in both]
            made |= {name: torch.cat([each[name] for each in holes]) for name in holes[0]}
        return made


class FromPictures(Encoded):
    """An objective whose batches have pictures and token ids where it wants latents and text embeddings.

    Args:
        objective: gets the batch with these.
        encoders: make them.
        bfloat16: compute them under autocast, as `encode.precision` says; otherwise in the encoders' own precision
            (float32, or with `frozen_dtype` bfloat16), whatever the training computes in.
    """

    def __init__(self, objective: Objective, encoders: PictureEncoders, *, bfloat16: bool = False) -> None:
        super().__init__(objective, encoders)
        self._bfloat16 = bfloat16

    def loss(self, network: nn.Module, batch: Batch, random: RowRandom) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the objective's loss; see there. The batch has what `PictureEncoders.forward` takes."""
        # Only tensors: a compiled network would be compiled again for every caption.
        taken = {name: batch[name] for name in _TAKEN if name in batch}
        with torch.autocast(batch["pixels"].device.type, dtype=torch.bfloat16, enabled=self._bfloat16):
            made = self._encoders(**taken)
        rest = {name: value for name, value in batch.items() if name not in taken}
        return self._objective.loss(network, {**rest, **made}, random)
