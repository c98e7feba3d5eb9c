"""teacher: a text-conditional teacher from nothing, for those who have no model to begin with, or one trained on."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.data.mixture import Shards, iterate_mixture, list_shards
from fewstep.data.pictures import decode_picture
from fewstep.data.samples import with_rules
from fewstep.distill import (
    DenoisingObjective,
    joint_denoiser,
    joint_tokenizers,
    stored_conditions,
    take_weights,
)
from fewstep.errors import RecipeError
from fewstep.models import (
    InpaintingParts,
    SDXLParts,
    TextToImageParts,
    add_inpainting,
    add_pooled_text,
    fresh_text_model,
    load_model,
)
from fewstep.stage_settings import TeacherStage
from fewstep.stages.autoencoder import (
    NUM_LATENT_SAMPLES,
    autoencoder_uri,
    named_autoencoder,
    scaled_autoencoder,
    train_autoencoder,
)
from fewstep.stages.batches import latent_batches, picture_batches
from fewstep.stages.class_teacher import class_teacher
from fewstep.stages.context import StageContext, is_stored, store_once
from fewstep.stages.convert import changed_config
from fewstep.stages.device import driver_device
from fewstep.stages.encode import encode_sources, encoding_of
from fewstep.stages.training import source_digests, tag_data, train_teacher_network
from fewstep.storage import Storage, join
from fewstep.tracking.fetch import fetch_model


def teacher(context: StageContext) -> dict[str, Any]:
    """Train the VAE, encode the shards with it, then train U-Net and text encoders together; the artifact's export/ is
    a diffusers folder. With `init`, the model named there is trained on, and its VAE stays as it is; with `vae` fresh
    networks are trained around a VAE that is there."""
    recipe, uri = context.recipe, context.uri("teacher")
    if recipe.train_class_teacher is not None:
        return class_teacher(context)
    settings = recipe.train_teacher
    assert settings is not None
    shards = context.shards("train")
    facts: dict[str, Any] = {"source_digests": source_digests(context, shards)}
    begin = join(uri, "begin")
    if settings.init is not None:
        _store_init(context, settings, begin)
        latents = join(uri, "latents")
    elif settings.vae is not None:
        _store_fresh(context, settings, begin, shards)
        latents = join(uri, "latents")
    else:
        pictures = partial(
            picture_batches, shards, resolution=settings.autoencoder.resolution, rules=recipe.sample_rules
        )
        vae = train_autoencoder(context, settings, batches=pictures)
        facts["autoencoder"] = vae.to_json()
        _store_fresh(context, settings, begin, shards, vae_uri=vae.export_uri)
        latents = join(autoencoder_uri(context), "latents")
    parts = load_model(fetch_model(begin, storage=context.storage)).to(driver_device(recipe.cluster))
    stored = stored_conditions(parts)
    data = encode_sources(
        shards,
        latents,
        parts=parts,
        storage=context.storage,
        # Of a picture's own size and crop the networks are told when they are distilled; here it is as before.
        encoding=replace(
            encoding_of(recipe, masks=bool(stored)), condition_names=stored, crop="center", picture_sizes=False
        ),
        max_bad_share=recipe.stream.max_bad_share,
        label="encode for the teacher",
    )
    tags = tag_data(context, shards, resolution=parts.resolution)
    tokenizers = {name: (begin, folder) for name, folder in joint_tokenizers(parts).items()}
    del parts  # the worker may need all of the GPU
    network = train_teacher_network(
        context,
        settings.train,
        objective=partial(_denoising_objective, settings, begin, context.storage),
        batches=partial(
            latent_batches,
            data,
            tokenizers=tokenizers,
            condition_names=stored,
        ),
        export=partial(_export_teacher, begin, context.storage),
        tags=tags,
    )
    return facts | {"network": network.to_json()}


def _store_init(context: StageContext, settings: TeacherStage, begin: str) -> None:
    if is_stored(begin, context.storage):
        return
    assert settings.init is not None
    parts = load_model(context.fetch(settings.init))  # an incomplete model is told now, not by a worker
    if not isinstance(parts, (TextToImageParts, SDXLParts, InpaintingParts)):
        raise RecipeError(
            f"train_teacher.init={settings.init} is a model of the family {parts.family}: this stage trains models "
            "that take text"
        )
    if settings.inpainting:
        if isinstance(parts, SDXLParts):
            raise RecipeError(
                f"train_teacher.inpainting is for models of Stable Diffusion's kind, and init={settings.init} is of "
                f"the family {parts.family}: leave inpainting out, or name another model"
            )
        parts = add_inpainting(parts)
    if settings.add_pooled_text:
        torch.manual_seed(context.recipe.seed)
        parts.unet = add_pooled_text(parts.unet, num_heads=settings.network.num_attention_heads)
    config = changed_config(parts, settings.prediction_type, rescale_betas_zero_snr=settings.rescale_betas_zero_snr)
    parts = parts.with_network(parts.network, config)
    with tempfile.TemporaryDirectory() as folder:
        parts.save(folder)
        store_once(Path(folder), begin, context.storage)


def _store_fresh(
    context: StageContext, settings: TeacherStage, begin: str, shards: Shards, *, vae_uri: str | None = None
) -> None:
    """Store the teacher as it is before its training: a trained VAE, its latents scaled to unit variance, or the one
    that `vae` names; the tokenizer learned from the captions; and fresh networks. Workers begin from this folder, so
    that all begin alike."""
    if is_stored(begin, context.storage):
        return
    named = None if settings.vae is None else named_autoencoder(context, settings.vae)
    # diffusers keeps the side of the pictures in the VAE's configuration.
    resolution = settings.autoencoder.resolution if named is None else named.config["sample_size"]
    listed = list_shards(shards, storage=context.storage)
    captions: list[str] = []
    pixels: list[Tensor] = []
    decode = with_rules(partial(decode_picture, resolution=resolution), context.recipe.sample_rules)
    bad = context.recipe.stream.max_bad_share
    for sample in iterate_mixture(listed, storage=context.storage, decode=decode, max_bad_share=bad):
        captions.append(sample["caption"])
        if len(pixels) < NUM_LATENT_SAMPLES:
            pixels.append(sample["pixels"])
    vae = named or scaled_autoencoder(context, str(vae_uri), torch.stack(pixels))
    torch.manual_seed(context.recipe.seed)
    tokenizer = settings.network.train_tokenizer(captions)
    parts = fresh_text_model(settings.network, vae=vae, tokenizer=tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        parts.save(folder)
        store_once(Path(folder), begin, context.storage)


def _denoising_objective(
    settings: TeacherStage, begin: str, storage: Storage, device: torch.device
) -> DenoisingObjective:
    return DenoisingObjective(
        joint_denoiser(load_model(fetch_model(begin, storage=storage))),
        condition_dropout=settings.condition_dropout,
        loss_weight=settings.loss_weight,
    )


def _export_teacher(begin: str, storage: Storage, network: nn.Module, folder: str) -> None:
    parts = load_model(fetch_model(begin, storage=storage))
    take_weights(parts, network)
    parts.save(Path(folder))
