"""Training a teacher: dropout of the condition, and losses that fall."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fewstep.diffusion import RowRandom
from fewstep.distill import AutoencoderObjective, DenoisingObjective, TextToImageNetwork
from fewstep.models import AutoencoderArchitecture, TextToImageParts
from tiny import CAPTIONS, tiny_teacher


def _objective(parts: TextToImageParts, **changes: Any) -> DenoisingObjective:
    network = TextToImageNetwork(parts.unet, parts.text_encoder).requires_grad_(True).train()
    model = network.denoiser(
        null_token_ids=parts.token_ids([""])[0], schedule=parts.schedule, prediction_type=parts.prediction_type
    )
    return DenoisingObjective(model, **changes)


def _batch(parts: TextToImageParts, rows: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "latent_mean": torch.randn(rows, 4, 4, 4, generator=generator),
        "latent_std": torch.full((rows, 4, 4, 4), 0.1),
        "token_ids": parts.token_ids([CAPTIONS[row % len(CAPTIONS)] for row in range(rows)]),
    }


def _random(rows: int = 4) -> RowRandom:
    return RowRandom(seed=0, step=0, rows=range(rows))


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_the_condition_is_dropped_in_its_share_of_rows(
    teacher: TextToImageParts, watch: Callable[[nn.Module], Any], share: float
) -> None:
    objective = _objective(teacher, condition_dropout=share)
    calls = watch(objective.network)
    batch = _batch(teacher, 1000)
    with torch.no_grad():
        objective.loss(objective.network, batch, _random(1000))
    tokens = calls.args[0][2]
    dropped = (tokens == teacher.token_ids([""])[0]).all(dim=1)
    assert torch.equal(tokens[~dropped], batch["token_ids"][~dropped])
    assert abs(float(dropped.float().mean()) - share) <= (0.03 if share else 0.0)


@pytest.mark.parametrize("kind", ["v_prediction", "sample", "epsilon"])
def test_a_network_that_knows_the_noise_has_no_loss(kind: str) -> None:
    parts = tiny_teacher(prediction_type=kind, rescale_betas_zero_snr=False)
    x = torch.randn(4, 4, 4, 4)

    class Knows(nn.Module):
        def forward(self, z: torch.Tensor, index: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
            alpha, sigma = parts.schedule.alpha_sigma(index)
            eps = (z - alpha * x) / sigma
            return {"epsilon": eps, "sample": x, "v_prediction": alpha * eps - sigma * x}[kind]

    batch = {**_batch(parts, 4), "latent_mean": x, "latent_std": torch.zeros_like(x)}
    loss, _ = _objective(parts).loss(Knows(), batch, _random())
    assert float(loss) < 1e-6


def test_the_plain_weight_is_the_mean_squared_error_of_v(teacher: TextToImageParts) -> None:
    objective = _objective(teacher)
    with torch.no_grad():
        loss, figures = objective.loss(objective.network, _batch(teacher, 4), _random())
    torch.testing.assert_close(loss, figures["output_mse"])


def test_updates_reduce_the_denoising_loss_and_reach_the_text_encoder(
    teacher: TextToImageParts, loss_after: Callable[..., tuple[float, float]]
) -> None:
    objective = _objective(teacher)
    before_text = teacher.text_encoder.state_dict()
    before_text = {name: value.clone() for name, value in before_text.items()}
    before, after = loss_after(objective, _batch(teacher, 4), _random, updates=12, learning_rate=2e-3)
    assert after < 0.8 * before
    changed = [n for n, value in teacher.text_encoder.state_dict().items() if not torch.equal(value, before_text[n])]
    assert changed


def test_updates_reduce_the_autoencoder_loss(loss_after: Callable[..., tuple[float, float]]) -> None:
    torch.manual_seed(0)
    vae = AutoencoderArchitecture(resolution=16, block_out_channels=(8, 16, 16), norm_num_groups=4).build()
    objective = AutoencoderObjective(vae)
    pixels = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
    pixels[:2, :, 4:12, 4:12] = 255
    pixels[2:, 0] = 200
    before, after = loss_after(objective, {"pixels": pixels}, _random, updates=20, learning_rate=3e-3)
    assert after < 0.8 * before


def test_the_autoencoder_loss_is_the_sum_of_its_parts() -> None:
    vae = AutoencoderArchitecture(resolution=16, block_out_channels=(8, 16), norm_num_groups=4).build()
    batch = {"pixels": torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)}

    def loss(kl_weight: float, edge_weight: float) -> tuple[float, dict[str, Any]]:
        objective = AutoencoderObjective(vae, kl_weight=kl_weight, edge_weight=edge_weight)
        with torch.no_grad():
            value, figures = objective.loss(objective.network, batch, _random(2))
        return float(value), figures

    plain, figures = loss(0.0, 0.0)
    assert plain == pytest.approx(float(figures["pixel_l1"]))
    assert loss(0.5, 0.0)[0] == pytest.approx(plain + 0.5 * float(figures["kl"]), rel=1e-5)
    assert loss(0.0, 2.0)[0] > plain
    assert float(figures["kl"]) > 0
