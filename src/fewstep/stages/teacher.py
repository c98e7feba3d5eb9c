"""teacher: a Stable-Diffusion-shaped teacher from nothing, for those who have no model to begin with."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.models import AutoencoderKL
from torch import Tensor, nn

from fewstep.data.pictures import decode_picture
from fewstep.data.shards import read_index
from fewstep.data.source import SampleCounts, iterate_samples
from fewstep.distill import AutoencoderObjective, DenoisingObjective, TextToImageNetwork
from fewstep.models import SCHEDULER_CONFIG, TextToImageParts, add_pooled_text, load_parts
from fewstep.recipe import TeacherStage, digest
from fewstep.stages.batches import latent_batches, picture_batches
from fewstep.stages.context import StageContext, autoencoder_fingerprint, fingerprint, is_stored, store_once
from fewstep.stages.device import driver_device
from fewstep.stages.encode import encode_shards
from fewstep.storage import Storage, join
from fewstep.tracking.fetch import fetch_model
from fewstep.train.job import TrainJob, TrainResult
from fewstep.train.run import run_training

_LATENT_SAMPLES = 2048


def teacher(context: StageContext) -> dict[str, Any]:
    """Train the VAE, encode the shards with it, then train U-Net and text encoder together; the artifact's export/ is a
    diffusers folder. With `init`, the model named there is trained on, and its VAE stays as it is."""
    recipe, uri = context.recipe, context.uri("teacher")
    settings = recipe.train_teacher
    assert settings is not None
    shards = context.shards("train")
    facts: dict[str, Any] = {}
    begin = join(uri, "begin")
    if settings.init is not None:
        _store_init(context, settings, begin)
        latents = join(uri, "latents")
    else:
        # Named by its own settings and data alone: training the networks anew does not train the VAE again.
        autoencoder_uri = join(context.storage.root, "autoencoder", autoencoder_fingerprint(recipe)[:16])
        vae = _train_autoencoder(context, settings, shards, autoencoder_uri)
        facts["autoencoder"] = vae.to_json()
        _store_fresh(context, settings, vae.export_uri, begin, shards)
        latents = join(autoencoder_uri, "latents")
    parts = load_parts(fetch_model(begin, storage=context.storage)).to(driver_device(recipe.cluster))
    encode_shards(
        shards,
        latents,
        parts=parts,
        storage=context.storage,
        batch_size=recipe.encode.batch_size,
        max_bad_share=recipe.stream.max_bad_share,
        with_condition=False,
        label="encode for the teacher",
    )
    network = _train(
        context,
        TrainJob(
            name="teacher",
            fingerprint=digest([fingerprint(recipe, "teacher"), "network"]),
            objective=partial(_denoising_objective, settings, begin, context.storage),
            batches=partial(
                latent_batches,
                latents,
                tokenizers={"token_ids": (begin, "tokenizer")},
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


def _train_autoencoder(context: StageContext, settings: TeacherStage, shards: str, uri: str) -> TrainResult:
    recipe = context.recipe
    assert settings.autoencoder_train is not None
    return _train(
        context,
        TrainJob(
            name="autoencoder",
            fingerprint=autoencoder_fingerprint(recipe),
            objective=partial(_autoencoder_objective, settings),
            batches=partial(
                picture_batches,
                shards,
                resolution=settings.autoencoder.resolution,
                storage=context.storage,
                stream=recipe.stream,
                global_batch_size=settings.autoencoder_train.global_batch_size,
                seed=recipe.seed,
            ),
            export=_export_vae,
            settings=settings.autoencoder_train,
            seed=recipe.seed,
            num_streams=recipe.stream.num_streams,
        ),
        uri,
    )


def _store_init(context: StageContext, settings: TeacherStage, begin: str) -> None:
    if is_stored(begin, context.storage):
        return
    assert settings.init is not None
    parts = load_parts(context.fetch(settings.init))  # an incomplete model is told now, not by a worker
    if settings.add_pooled_text:
        torch.manual_seed(context.recipe.seed)
        parts.unet = add_pooled_text(parts.unet, num_heads=settings.network.num_attention_heads)
    with tempfile.TemporaryDirectory() as folder:
        parts.save(folder)
        store_once(Path(folder), begin, context.storage)


def _train(context: StageContext, job: TrainJob, uri: str) -> TrainResult:
    with context.tracker.run(job.name, key=f"{context.recipe.name}/{job.fingerprint}", parent=context.parent) as run:
        run.log_params(job.settings)
        result = run_training(
            job, cluster=context.recipe.cluster, storage=context.storage, uri=uri, tracker=run.handle()
        )
        run.log_metrics({f"final_{name}": value for name, value in result.figures.items()}, step=result.updates)
    return result


def _autoencoder_objective(settings: TeacherStage, device: torch.device) -> AutoencoderObjective:
    torch.manual_seed(0)
    return AutoencoderObjective(
        settings.autoencoder.build(), kl_weight=settings.kl_weight, edge_weight=settings.edge_weight
    )


def _export_vae(network: nn.Module, folder: str) -> None:
    vae = network.vae
    assert isinstance(vae, AutoencoderKL)
    vae.save_pretrained(folder)


def _store_fresh(context: StageContext, settings: TeacherStage, vae_uri: str, begin: str, shards: str) -> None:
    """Store the teacher as it is before its training: the VAE with its latents scaled to unit variance, the tokenizer
    learned from the captions, and fresh networks. Workers begin from this folder, so that all begin alike."""
    if is_stored(begin, context.storage):
        return
    vae = AutoencoderKL.from_pretrained(str(fetch_model(vae_uri, storage=context.storage)))
    resolution = settings.autoencoder.resolution
    index = read_index(shards, storage=context.storage)
    captions: list[str] = []
    pixels: list[Tensor] = []
    decode = partial(decode_picture, resolution=resolution)
    counts = SampleCounts(context.recipe.stream.max_bad_share)
    for sample in iterate_samples(index.shards, storage=context.storage, decode=decode, counts=counts):
        captions.append(sample["caption"])
        if len(pixels) < _LATENT_SAMPLES:
            pixels.append(sample["pixels"])
    vae.register_to_config(scaling_factor=_scaling_factor(vae, torch.stack(pixels)))
    torch.manual_seed(context.recipe.seed)
    tokenizer = settings.network.train_tokenizer(captions)
    size = resolution // 2 ** (len(settings.autoencoder.block_out_channels) - 1)
    parts = TextToImageParts(
        vae=vae,
        text_encoder=settings.network.build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=settings.network.build_unet(latent_channels=settings.autoencoder.latent_channels, latent_size=size),
        scheduler_config=SCHEDULER_CONFIG,
    )
    with tempfile.TemporaryDirectory() as folder:
        parts.save(folder)
        store_once(Path(folder), begin, context.storage)


@torch.no_grad()
def _scaling_factor(vae: AutoencoderKL, pixels: Tensor) -> float:
    """Return the factor that brings the latents to unit variance (Rombach et al. 2022, appendix D.1)."""
    means = [vae.encode(batch.float() / 127.5 - 1).latent_dist.mean for batch in pixels.split(64)]
    return float(1 / torch.cat(means).std())


def _denoising_objective(
    settings: TeacherStage, begin: str, storage: Storage, device: torch.device
) -> DenoisingObjective:
    parts = load_parts(fetch_model(begin, storage=storage))
    network = TextToImageNetwork(parts.unet, parts.text_encoder).requires_grad_(True).train()
    model = network.denoiser(
        null_token_ids=parts.token_ids([""])[0], schedule=parts.schedule, prediction_type=parts.prediction_type
    )
    return DenoisingObjective(
        model,
        condition_dropout=settings.condition_dropout,
        loss_weight=settings.loss_weight,
    )


def _export_teacher(begin: str, storage: Storage, network: nn.Module, folder: str) -> None:
    assert isinstance(network, TextToImageNetwork)
    parts = load_parts(fetch_model(begin, storage=storage))
    parts.unet.load_state_dict(network.unet.state_dict())
    parts.text_encoder.load_state_dict(network.text_encoder.state_dict())
    parts.save(Path(folder))
