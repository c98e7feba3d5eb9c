"""U-Net and text encoders trained together: the null condition, the gradients, and the weights handed back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.diffusion import RowRandom
from fewstep.distill import (
    DenoisingObjective,
    TextToImageNetwork,
    joint_denoiser,
    joint_tokenizers,
    stored_conditions,
    take_weights,
)
from fewstep.errors import ModelError
from fewstep.models import ClassArchitecture, ClassParts, InpaintingParts, Parts, SDXLParts, TextToImageParts
from fewstep.models.class_conditional import COSINE_CONFIG
from tiny import pictures_with_holes, tiny_inpainting, tiny_sdxl, tiny_teacher

FAMILIES: dict[str, Callable[[], Any]] = {
    "text_latent": tiny_teacher,
    "inpainting": tiny_inpainting,
    "sdxl": tiny_sdxl,
    "sdxl of empty prompts": lambda: tiny_sdxl(force_zeros=False),
}


@pytest.fixture(params=FAMILIES)
def parts(request: pytest.FixtureRequest) -> TextToImageParts | SDXLParts | InpaintingParts:
    return FAMILIES[request.param]()


def _ids(parts: Any, prompts: list[str]) -> dict[str, Tensor]:
    ids = parts.token_ids(prompts)
    return ids if isinstance(ids, dict) else {"token_ids": ids}


def _batch(parts: Any) -> dict[str, Tensor]:
    """Four rows as the teacher stage reads them: latents, token ids, and what is stored of the pictures."""
    samples = pictures_with_holes(4)
    mean, std = parts.encode_pictures(torch.stack([sample["pixels"] for sample in samples]))
    condition = parts.conditions(samples)
    return {
        "latent_mean": mean,
        "latent_std": std,
        **_ids(parts, [sample["caption"] for sample in samples]),
        **{name: condition[name] for name in stored_conditions(parts)},
    }


def test_it_computes_what_the_frozen_model_does(parts: Any) -> None:
    batch, samples = _batch(parts), pictures_with_holes(4)
    frozen = parts.denoiser()
    condition, z, time = parts.conditions(samples), torch.randn(4, 4, 4, 4), torch.tensor([999, 700, 300, 0])
    expected = frozen.conditional(condition)(z, time)
    unconditional = frozen.conditional(frozen.unconditional(condition))(z, time)
    model = joint_denoiser(parts)
    assert set(joint_tokenizers(parts)) | set(stored_conditions(parts)) == set(model.condition_names)
    own = model.condition_of(batch)
    with torch.no_grad():
        torch.testing.assert_close(model.conditional(own)(z, time), expected, rtol=0, atol=1e-6)
        dropped = model.conditional(model.unconditional(own))(z, time)
    torch.testing.assert_close(dropped, unconditional, rtol=0, atol=1e-6)


def test_every_trained_weight_gets_a_gradient(parts: Any) -> None:
    """Data-parallel training waits for ever for one that does not."""
    objective = DenoisingObjective(joint_denoiser(parts), condition_dropout=0.5)
    loss, _ = objective.loss(objective.network, _batch(parts), RowRandom(seed=0, step=0, rows=range(4)))
    loss.backward()
    trained = {name: p for name, p in objective.network.named_parameters() if p.requires_grad}
    assert [name for name, p in trained.items() if p.grad is None] == []
    assert any(name.startswith("text_encoder.") for name in trained)


def test_updates_reach_the_weights_that_are_handed_back(
    parts: Any, loss_after: Callable[..., tuple[float, float]]
) -> None:
    objective = DenoisingObjective(joint_denoiser(parts))
    before, after = loss_after(
        objective,
        _batch(parts),
        lambda: RowRandom(seed=0, step=0, rows=range(4)),
        updates=8,
        learning_rate=2e-3,
    )
    assert after < before
    family = next(make for make in FAMILIES.values() if type(make()) is type(parts))
    fresh = family()
    untouched = {name: value.clone() for name, value in fresh.vae.state_dict().items()}
    take_weights(fresh, objective.network)
    for name, trained in objective.network.named_children():
        own = getattr(fresh, name).state_dict()
        assert all(torch.equal(own[key], value) for key, value in trained.state_dict().items()), name
    assert all(torch.equal(fresh.vae.state_dict()[name], value) for name, value in untouched.items())


def test_a_model_without_text_encoder_is_refused() -> None:
    architecture = ClassArchitecture(resolution=8, block_out_channels=(16,), norm_num_groups=4)
    unet = architecture.build_unet(in_channels=3, sample_size=8)
    parts: Parts = ClassParts(unet=unet, scheduler_config=COSINE_CONFIG)
    with pytest.raises(ModelError, match="family class_pixel has no text encoder"):
        joint_denoiser(parts)


def test_stable_diffusions_network_keeps_its_form() -> None:
    assert isinstance(joint_denoiser(tiny_teacher()).network, TextToImageNetwork)
