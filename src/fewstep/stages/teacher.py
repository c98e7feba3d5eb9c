"""teacher: a text-conditional teacher from nothing, for those who have no model to begin with, or one trained on."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.data.pictures import decode_picture
from fewstep.data.shards import read_index
from fewstep.data.source import SampleCounts, iterate_samples
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
from fewstep.recipe import TeacherStage, digest
from fewstep.stages.autoencoder import (
    NUM_LATENT_SAMPLES,
    autoencoder_uri,
    scaled_autoencoder,
    train_autoencoder,
    train_job,
)
from fewstep.stages.batches import latent_batches, picture_batches
from fewstep.stages.class_teacher import class_teacher
from fewstep.stages.context import StageContext, fingerprint, is_stored, store_once
from fewstep.stages.convert import changed_config
from fewstep.stages.device import driver_device
from fewstep.stages.encode import encode_shards
from fewstep.storage import Storage, join
from fewstep.tracking.fetch import fetch_model
from fewstep.train.job import TrainJob


def teacher(context: StageContext) -> dict[str, Any]:
    """Train the VAE, encode the shards with it, then train U-Net and text encoders together; the artifact's export/ is
    a diffusers folder. With `init`, the model named there is trained on, and its VAE stays as it is."""
    recipe, uri = context.recipe, context.uri("teacher")
    if recipe.train_class_teacher is not None:
        return class_teacher(context)
    settings = recipe.train_teacher
    assert settings is not None
    shards = context.shards("train")
    facts: dict[str, Any] = {}
    begin = join(uri, "begin")
    if settings.init is not None:
        _store_init(context, settings, begin)
        latents = join(uri, "latents")
    else:
        pictures = partial(picture_batches, shards, resolution=settings.autoencoder.resolution)
        vae = train_autoencoder(context, settings, batches=pictures)
        facts["autoencoder"] = vae.to_json()
        _store_fresh(context, settings, vae.export_uri, begin, shards)
        latents = join(autoencoder_uri(context), "latents")
    parts = load_model(fetch_model(begin, storage=context.storage)).to(driver_device(recipe.cluster))
    stored = stored_conditions(parts)
    encode_shards(
        shards,
        latents,
        parts=parts,
        storage=context.storage,
        batch_size=recipe.encode.batch_size,
        max_bad_share=recipe.stream.max_bad_share,
        condition_names=stored,
        masks=recipe.encode.masks if stored else None,
        seed=recipe.seed,
        label="encode for the teacher",
    )
    network = train_job(
        context,
        TrainJob(
            name="teacher",
            fingerprint=digest([fingerprint(recipe, "teacher"), "network"]),
            objective=partial(_denoising_objective, settings, begin, context.storage),
            batches=partial(
                latent_batches,
                latents,
                tokenizers={name: (begin, folder) for name, folder in joint_tokenizers(parts).items()},
                condition_names=stored,
                storage=context.storage,
                stream=recipe.stream,
                global_batch_size=settings.train.global_batch_size,
                seed=recipe.seed,
            ),
            export=partial(_export_teacher, begin, context.storage),
            settings=settings.train,
            seed=recipe.seed,
            num_streams=recipe.stream.num_streams,
        ),
        join(uri, "network"),
    )
    folder = fetch_model(network.export_uri, storage=context.storage)
    context.storage.upload_folder(folder, join(uri, "export"))
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


def _store_fresh(context: StageContext, settings: TeacherStage, vae_uri: str, begin: str, shards: str) -> None:
    """Store the teacher as it is before its training: the VAE with its latents scaled to unit variance, the tokenizer
    learned from the captions, and fresh networks. Workers begin from this folder, so that all begin alike."""
    if is_stored(begin, context.storage):
        return
    resolution = settings.autoencoder.resolution
    index = read_index(shards, storage=context.storage)
    captions: list[str] = []
    pixels: list[Tensor] = []
    decode = partial(decode_picture, resolution=resolution)
    counts = SampleCounts(context.recipe.stream.max_bad_share)
    for sample in iterate_samples(index.shards, storage=context.storage, decode=decode, counts=counts):
        captions.append(sample["caption"])
        if len(pixels) < NUM_LATENT_SAMPLES:
            pixels.append(sample["pixels"])
    vae = scaled_autoencoder(context, vae_uri, torch.stack(pixels))
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
