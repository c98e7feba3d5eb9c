"""What the teachers in latents share, with text or with classes: training their VAE, and the scale of its latents."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers.models import AutoencoderKL
from torch import Tensor, nn

from fewstep.data.stream import ShardStream
from fewstep.distill import AutoencoderObjective
from fewstep.errors import RecipeError
from fewstep.models import load_model
from fewstep.stage_settings import ClassTeacherStage, TeacherStage
from fewstep.stages.context import StageContext
from fewstep.stages.fingerprints import autoencoder_fingerprint
from fewstep.stages.training import tag_data, train_job
from fewstep.storage import join
from fewstep.tracking.fetch import fetch_model
from fewstep.train.job import TrainJob, TrainResult

#: Pictures that the scale of the latents is measured on.
NUM_LATENT_SAMPLES = 2048


def autoencoder_uri(context: StageContext) -> str:
    """Return the folder of the recipe's VAE, and of what else depends on it alone.

    It is named by the VAE's own settings and data: training the networks anew does not train the VAE again.
    """
    return join(context.storage.root, "autoencoder", autoencoder_fingerprint(context.recipe)[:16])


def train_autoencoder(
    context: StageContext,
    settings: TeacherStage | ClassTeacherStage,
    *,
    batches: Callable[..., ShardStream],
    channels: int = 3,
) -> TrainResult:
    """Train the VAE, unless that is done already; its export is AutoencoderKL's own folder, of scale 1.

    Args:
        context: of the stage.
        settings: with `autoencoder` and `autoencoder_train`.
        batches: of pixels; called with what `sample_batches` takes beside the shards and the way to read them.
        channels: of the pictures.
    """
    recipe = context.recipe
    assert settings.autoencoder_train is not None
    assert settings.autoencoder is not None
    job = TrainJob(
        name="autoencoder",
        fingerprint=autoencoder_fingerprint(recipe),
        objective=partial(_objective, settings, channels),
        batches=partial(
            batches,
            storage=context.storage,
            stream=recipe.stream,
            global_batch_size=settings.autoencoder_train.global_batch_size,
            seed=recipe.seed,
        ),
        export=_export,
        settings=settings.autoencoder_train,
        seed=recipe.seed,
        num_streams=recipe.stream.num_streams,
    )
    tags = tag_data(context, context.shards("train"), resolution=settings.autoencoder.resolution)
    return train_job(context, job, autoencoder_uri(context), tags=tags)


def named_autoencoder(context: StageContext, uri: str) -> AutoencoderKL:
    """Return the VAE of a MODEL, with its own scale.

    Raises:
        RecipeError: the model works in pixels.
    """
    parts = load_model(context.fetch(uri))
    vae = getattr(parts, "vae", None)
    if not isinstance(vae, AutoencoderKL):
        raise RecipeError(
            f"vae={uri} is a model of the family {parts.family}, which works in pixels and has no autoencoder: name a "
            "model in latents"
        )
    return vae


@torch.no_grad()
def scaled_autoencoder(context: StageContext, uri: str, pixels: Tensor) -> AutoencoderKL:
    """Return a trained VAE with the factor that gives its latents unit variance (Rombach et al. 2022, appendix D.1).

    Args:
        context: of the stage.
        uri: the VAE's folder.
        pixels: pictures to measure on, uint8 (B, C, H, W).
    """
    vae: Any = AutoencoderKL.from_pretrained(str(fetch_model(uri, storage=context.storage)))
    means = [vae.encode(batch.float() / 127.5 - 1).latent_dist.mean for batch in pixels.split(64)]
    vae.register_to_config(scaling_factor=float(1 / torch.cat(means).std()), _name_or_path=None)
    return vae


def _objective(settings: TeacherStage | ClassTeacherStage, channels: int, device: torch.device) -> AutoencoderObjective:
    assert settings.autoencoder is not None
    torch.manual_seed(0)
    return AutoencoderObjective(
        settings.autoencoder.build(channels=channels),
        kl_weight=settings.kl_weight,
        edge_weight=settings.edge_weight,
    )


def _export(network: nn.Module, folder: str) -> None:
    vae = network.vae
    assert isinstance(vae, AutoencoderKL)
    vae.save_pretrained(folder)
