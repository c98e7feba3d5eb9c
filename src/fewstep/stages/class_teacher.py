"""teacher, for class-conditional models: a U-Net in pixels, or after a VAE in latents."""

from __future__ import annotations

import tempfile
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from diffusers.models import AutoencoderKL
from torch import Tensor, nn

from fewstep.data.classes import class_names as class_picture_names
from fewstep.data.emoji import class_names as emoji_names
from fewstep.data.mixture import Shards, iterate_mixture, list_shards
from fewstep.data.pictures import decode_class_picture
from fewstep.data.sample import Decode
from fewstep.distill import DenoisingObjective
from fewstep.errors import RecipeError
from fewstep.models import COSINE_CONFIG, ClassParts, load_model
from fewstep.recipe import Recipe
from fewstep.stage_settings import ClassTeacherStage
from fewstep.stages.autoencoder import (
    NUM_LATENT_SAMPLES,
    autoencoder_uri,
    named_autoencoder,
    scaled_autoencoder,
    train_autoencoder,
)
from fewstep.stages.batches import format_of, sample_batches
from fewstep.stages.context import StageContext, is_stored, store_once
from fewstep.stages.device import driver_device
from fewstep.stages.encode import encode_sources
from fewstep.stages.encode_shards import Encoding
from fewstep.stages.training import source_digests, tag_data, train_teacher_network
from fewstep.storage import Storage, join
from fewstep.tracking.fetch import fetch_model


def class_teacher(context: StageContext) -> dict[str, Any]:
    """Train a class-conditional U-Net on the continuous cosine schedule; the artifact's export/ is its folder.

    With sizes of a VAE, that one is trained first, the pictures are encoded, and the U-Net is trained on their latents.

    Raises:
        RecipeError: the pictures have another number of classes than the network.
    """
    recipe, uri = context.recipe, context.uri("teacher")
    settings = recipe.train_class_teacher
    assert settings is not None
    names = _names(recipe)
    if names and len(names) != settings.network.num_classes:
        raise RecipeError(
            f"train_class_teacher.network.num_classes={settings.network.num_classes}, but the pictures of prepare have "
            f"{len(names)} classes: set it to {len(names)}"
        )
    shards = context.shards("train")
    begin = join(uri, "begin")
    facts: dict[str, Any] = {"source_digests": source_digests(context, shards)}
    data: Shards
    if not settings.in_latents:
        _store_fresh(context, settings, names, begin)
        data, decode = shards, format_of(load_model(fetch_model(begin, storage=context.storage))).decoder()
    elif settings.vae is not None:
        _store_fresh(context, settings, names, begin)
        data, decode = _encode(context, settings, begin, shards, join(uri, "latents"))
    else:
        pictures = partial(sample_batches, shards, decode=_decoder(settings))
        vae = train_autoencoder(context, settings, batches=pictures, channels=settings.network.channels)
        facts["autoencoder"] = vae.to_json()
        _store_fresh(context, settings, names, begin, vae_uri=vae.export_uri, shards=shards)
        # How many classes there are says which samples are left out.
        latents = join(autoencoder_uri(context), f"latents-{settings.network.num_classes}")
        data, decode = _encode(context, settings, begin, shards, latents)
    network = train_teacher_network(
        context,
        settings.train,
        objective=partial(_objective, settings, begin, context.storage),
        batches=partial(sample_batches, data, decode=decode),
        export=partial(_export, begin, context.storage),
        tags=tag_data(context, shards, resolution=settings.network.resolution),
    )
    return facts | {"network": network.to_json()}


def _names(recipe: Recipe) -> tuple[str, ...]:
    """Return the names of the classes; none for shards of the user's own."""
    if recipe.data.train is not None:
        return ()
    if recipe.prepare_classes is not None:
        return class_picture_names(recipe.prepare_classes)
    return emoji_names(recipe.prepare) if recipe.prepare is not None else ()


def _decoder(settings: ClassTeacherStage) -> Decode:
    network = settings.network
    return partial(
        decode_class_picture,
        resolution=network.resolution,
        channels=network.channels,
        num_classes=network.num_classes,
    )


def _store_fresh(
    context: StageContext,
    settings: ClassTeacherStage,
    names: tuple[str, ...],
    begin: str,
    *,
    vae_uri: str | None = None,
    shards: Shards = "",
) -> None:
    """Store the teacher as it is before its training, so that all workers begin alike; in latents with its VAE."""
    if is_stored(begin, context.storage):
        return
    network, vae = settings.network, None
    channels, size = network.channels, network.resolution
    if settings.in_latents:
        vae = _autoencoder(context, settings, vae_uri, shards)
        channels = vae.config["latent_channels"]
        size //= 2 ** (len(vae.config["block_out_channels"]) - 1)
    torch.manual_seed(context.recipe.seed)
    parts = ClassParts(
        unet=network.build_unet(in_channels=channels, sample_size=size),
        # Latents have no bounds that x̂ could be kept within.
        scheduler_config=dict(COSINE_CONFIG) if vae is None else {**COSINE_CONFIG, "clip_sample": False},
        vae=vae,
        class_names=names,
    )
    with tempfile.TemporaryDirectory() as folder:
        parts.save(folder)
        store_once(Path(folder), begin, context.storage)


def _autoencoder(
    context: StageContext, settings: ClassTeacherStage, vae_uri: str | None, shards: Shards
) -> AutoencoderKL:
    if settings.vae is None:
        return scaled_autoencoder(context, str(vae_uri), _pixels(context, settings, shards))
    vae = named_autoencoder(context, settings.vae)
    channels, side = vae.config["in_channels"], vae.config["sample_size"]
    network = settings.network
    if (channels, side) != (network.channels, network.resolution):
        raise RecipeError(
            f"train_class_teacher.network has {network.channels} channels of {network.resolution} px, and the "
            f"autoencoder of vae={settings.vae} is for {channels} of {side}: set network.channels and "
            "network.resolution to these"
        )
    return vae


def _pixels(context: StageContext, settings: ClassTeacherStage, shards: Shards) -> Tensor:
    """Return some pictures, uint8 (B, C, H, W)."""
    samples = iterate_mixture(
        list_shards(shards, storage=context.storage),
        storage=context.storage,
        decode=_decoder(settings),
        max_bad_share=context.recipe.stream.max_bad_share,
    )
    return torch.stack([sample["pixels"] for sample in islice(samples, NUM_LATENT_SAMPLES)])


def _encode(
    context: StageContext, settings: ClassTeacherStage, begin: str, shards: Shards, target: str
) -> tuple[Shards, Decode]:
    """Make the latents that the U-Net is trained on; return their address and how they are read."""
    recipe = context.recipe
    parts = load_model(fetch_model(begin, storage=context.storage)).to(driver_device(recipe.cluster))
    data = encode_sources(
        shards,
        target,
        parts=parts,
        storage=context.storage,
        encoding=Encoding(batch_size=recipe.encode.batch_size, precision=recipe.encode.precision),
        max_bad_share=recipe.stream.max_bad_share,
        label="encode for the teacher",
    )
    return data, format_of(parts).decoder()


def _objective(settings: ClassTeacherStage, begin: str, storage: Storage, device: torch.device) -> DenoisingObjective:
    parts = load_model(fetch_model(begin, storage=storage)).to(device)
    parts.network.requires_grad_(True).train()
    return DenoisingObjective(
        parts.denoiser(), condition_dropout=settings.condition_dropout, loss_weight=settings.loss_weight
    )


def _export(begin: str, storage: Storage, network: nn.Module, folder: str) -> None:
    parts = load_model(fetch_model(begin, storage=storage))
    parts.with_network(network, parts.scheduler_config).save(Path(folder))
