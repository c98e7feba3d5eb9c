"""An objective that is given token ids has the loss of one that is given text embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fewstep.diffusion import RowRandom
from fewstep.distill import GuidanceObjective
from fewstep.distill.tokens import FromTokens, TextEncoders, conditions_without_text
from fewstep.errors import ModelError
from fewstep.models import Parts
from tiny import tiny_inpainting, tiny_sdxl, tiny_teacher
from tiny_classes import tiny_class_model

CAPTIONS = ["a red apple", "two birds", "a house", ""]


def _batch(parts: Any) -> dict[str, Any]:
    channels, height, width = parts.latent_shape
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(4, channels, height, width, generator=generator)
    samples = [
        {"caption": caption, "pixels": torch.zeros(3, parts.resolution, parts.resolution, dtype=torch.uint8),
         "mask": torch.ones(1, parts.resolution, parts.resolution, dtype=torch.bool)}
        for caption in CAPTIONS
    ]  # fmt: skip
    return {"latent_mean": mean, "latent_std": torch.ones_like(mean) / 10, **parts.conditions(samples)}


@pytest.mark.parametrize("make", [tiny_teacher, tiny_sdxl, tiny_inpainting])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_loss_is_that_with_embeddings(make: Callable[[], Any], autocast: bool) -> None:
    parts = make()
    batch = _batch(parts)
    objective = GuidanceObjective(parts.denoiser(), w_min=1, w_max=4, embedding_dim=16)
    wrapped = FromTokens(objective, TextEncoders(parts))
    ids = parts.token_ids(CAPTIONS)
    told = {name: batch[name] for name in ("latent_mean", "latent_std", *conditions_without_text(parts))}
    told |= {"token_ids": ids} if isinstance(ids, torch.Tensor) else ids
    assert "text" not in told
    losses = []
    for each, given in ((objective, batch), (wrapped, told)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss, _ = each.loss(objective.network, given, RowRandom(seed=0, step=0, rows=range(4)))
        losses.append(loss)
    assert losses[0] == losses[1]
    losses[1].backward()
    assert all(p.grad is None for p in wrapped._encoders.parameters())


def test_the_encoders_are_frozen_networks_and_the_rest_is_the_objectives_own() -> None:
    parts = tiny_teacher()
    objective = GuidanceObjective(parts.denoiser(), w_min=1, w_max=4, embedding_dim=16)
    encoders = TextEncoders(parts)
    wrapped = FromTokens(objective, encoders)
    assert wrapped.network is objective.network
    assert wrapped.frozen == [objective.teacher, encoders]
    assert not any(p.requires_grad for p in encoders.parameters())
    assert wrapped.w_max == 4
    assert getattr(wrapped, "parameter_groups", None) is None


def test_what_else_a_model_is_told() -> None:
    assert conditions_without_text(tiny_teacher()) == ()
    assert conditions_without_text(tiny_sdxl()) == ("time_ids",)
    assert set(conditions_without_text(tiny_inpainting())) == {"mask", "masked_latents"}


def test_a_model_without_text_is_told() -> None:
    parts: Parts = tiny_class_model()
    with pytest.raises(ModelError, match="has no text encoder: leave encode"):
        TextEncoders(parts)
