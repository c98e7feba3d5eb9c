"""Text embeddings made in training, of token ids, by the teacher's own frozen text encoders, so that shards need not
hold them: for Stable Diffusion 1.x they are two thirds of a sample, and making them is 0.3 % of an update."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fewstep.diffusion.random import RowRandom
from fewstep.distill.objective import Batch, Objective
from fewstep.errors import ModelError
from fewstep.models import Parts, SDXLParts
from fewstep.models.latent import ClipParts
from fewstep.models.sdxl import embed_tokens

#: Parts of the condition that are made of the caption.
OF_THE_CAPTION = ("text", "pooled")


class TextEncoders(nn.Module):
    """The text encoders of a model, frozen.

    Raises:
        ModelError: the model has none.
    """

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        if not isinstance(parts, (ClipParts, SDXLParts)):
            raise ModelError(
                f"a model of the family {parts.family} has no text encoder: leave encode.store_text as it is"
            )
        self.text_encoder = parts.text_encoder
        self.text_encoder_2 = parts.text_encoder_2 if isinstance(parts, SDXLParts) else None
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, token_ids: Tensor, token_ids_2: Tensor | None = None) -> dict[str, Tensor]:
        """Return text (B, L, D) and, of a Stable Diffusion XL, pooled (B, P) for token ids (B, L)."""
        if self.text_encoder_2 is None:
            return {"text": self.text_encoder(token_ids).last_hidden_state}
        assert token_ids_2 is not None
        text, pooled = embed_tokens(
            self.text_encoder, self.text_encoder_2, token_ids=token_ids, token_ids_2=token_ids_2
        )
        return {"text": text, "pooled": pooled}


class Encoded:
    """An objective behind frozen encoders, that make what it wants of what a batch has; subclasses give the loss.

    Args:
        objective: gets the batch with what they made.
        encoders: make it.
    """

    def __init__(self, objective: Objective, encoders: nn.Module) -> None:
        self._objective, self._encoders = objective, encoders
        self.network = objective.network
        self.frozen = [*getattr(objective, "frozen", ()), encoders]

    def __getattr__(self, name: str) -> Any:  # what an objective may have besides, such as parameter_groups
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._objective, name)


class FromTokens(Encoded):
    """An objective whose batches have token ids where it wants text embeddings, which `TextEncoders` make.

    Embeddings are computed in the encoders' own precision, without autocast, as those in shards are.
    """

    def loss(self, network: nn.Module, batch: Batch, random: RowRandom) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the objective's loss; see there. The batch has token_ids (B, L), and token_ids_2 where two are."""
        ids = {name: batch[name] for name in ("token_ids", "token_ids_2") if name in batch}
        with torch.autocast(ids["token_ids"].device.type, enabled=False):
            told = self._encoders(**ids)
        return self._objective.loss(network, {**batch, **told}, random)


def conditions_without_text(parts: Parts) -> tuple[str, ...]:
    """Return the parts of the condition that are not made of the caption, which shards hold in any case."""
    return tuple(name for name in parts.denoiser().condition_names if name not in OF_THE_CAPTION)
