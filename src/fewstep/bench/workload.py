"""What is benchmarked: a teacher of a known shape, and where its training batches come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fewstep.bench.batches import SyntheticBatches
from fewstep.bench.settings import Stage
from fewstep.data.mixture import sources_of
from fewstep.data.stream import BatchSource
from fewstep.diffusion import NoiseSchedule
from fewstep.diffusion.prediction import check_prediction_type
from fewstep.errors import RecipeError
from fewstep.models import SCHEDULER_CONFIG, ClassParts, Denoiser, load_model, text_denoiser
from fewstep.models.class_conditional import COSINE_CONFIG
from fewstep.models.inpainting import forward_inpainting
from fewstep.models.sdxl import forward_sdxl
from fewstep.plan.network import build_network
from fewstep.plan.shapes import Shape, shape_of_folder
from fewstep.plan.teacher import find_shape
from fewstep.recipe import Recipe
from fewstep.stage_settings import GuidanceStage, ProgressiveStage
from fewstep.stages.batches import SampleFormat, sample_batches
from fewstep.stages.context import encoded_shards, find_artifact
from fewstep.storage import Storage, join
from fewstep.tracking.fetch import fetch_model
from fewstep.train.settings import TrainSettings


@dataclass(frozen=True)
class TrainWorkload:
    """A training to be measured.

    Attributes:
        name: sd15, or the recipe's.
        network: what the network and its weights are, in words.
        data: where the batches come from, in words.
        sample_shape: (C, h, w) of what is diffused.
        conditions: what the network is told of a sample, name -> shape of a row.
        in_pixels: samples are pictures, not latents.
        build: returns the teacher, without w, on a device; on meta too, for counting.
        train: the training's settings; the benchmark sets updates, batch size and precision.
        w_min, w_max, embedding_dim: of the guidance weight.
        batches: returns the stored batches for a batch size; None: made in memory.
    """

    name: str
    network: str
    data: str
    sample_shape: tuple[int, int, int]
    conditions: Mapping[str, tuple[int, ...]]
    build: Callable[[torch.device], Denoiser]
    train: TrainSettings
    in_pixels: bool = False
    w_min: float = 0.0
    w_max: float = 14.0
    embedding_dim: int = 256
    batches: Callable[[int], Callable[..., BatchSource]] | None = None

    def batch_factory(self, global_batch_size: int, *, seed: int = 0) -> Callable[..., BatchSource]:
        """Return what a training job takes as its `batches`."""
        if self.batches is not None:
            return self.batches(global_batch_size)
        return partial(
            SyntheticBatches,
            sample_shape=self.sample_shape,
            conditions=self.conditions,
            in_pixels=self.in_pixels,
            global_batch_size=global_batch_size,
            seed=seed,
        )


def recipe_train_workload(recipe: Recipe, stage: Stage, storage: Storage) -> TrainWorkload:
    """Return a recipe's stage one or stage two: its own shards if `encode` has run, otherwise samples of the same shape
    made in memory; its own teacher, or random weights of its shape if the `teacher` stage has not run.

    Raises:
        RecipeError: the recipe has no such stage, or it trains adapters.
        ModelError: its teacher cannot be had.
    """
    guidance, train = _settings_of(recipe, stage)
    trained = find_artifact(recipe, storage, "teacher") if recipe.teacher is None else None
    if recipe.teacher is None and trained is None:
        shape = find_shape(recipe)
        network = "network of the recipe’s teacher stage, which has not run: random weights"
        build = partial(denoiser_of_shape, shape)
    else:
        uri = recipe.teacher if trained is None else join(trained.uri, "export")
        folder = fetch_model(str(uri), storage=storage, tracking=recipe.tracking)
        shape = shape_of_folder(folder)
        network = f"network of {recipe.teacher or 'the recipe’s teacher stage'}"
        build = partial(on_device, load_model(folder).denoiser())
    encoded = find_artifact(recipe, storage, "encode")
    sources = () if encoded is None else sources_of(encoded_shards(recipe, encoded.facts["train"]))
    return TrainWorkload(
        name=recipe.name,
        network=network,
        data=f"shards in {' and '.join(source.uri for source in sources)}"
        if sources
        else "synthetic samples in memory, as the encode stage has not run: the data wait says nothing of a store",
        sample_shape=shape.sample_shape,
        conditions=shape.conditions,
        in_pixels=shape.vae is None,
        build=build,
        train=train,
        w_min=guidance.weights[0],
        w_max=guidance.weights[1],
        embedding_dim=guidance.embedding_dim,
        batches=None if encoded is None else partial(_stored_batches, recipe, storage, encoded.facts),
    )


def planned_train_workload(recipe: Recipe, stage: Stage) -> TrainWorkload:
    """Return a recipe's training with random weights of its teacher's shape, for counting: nothing is fetched.

    Raises:
        RecipeError: the recipe has no such stage, or its teacher cannot be built from its sizes alone.
        ModelError: the sizes of its teacher are not known here.
    """
    guidance, train = _settings_of(recipe, stage)
    shape = find_shape(recipe)
    return TrainWorkload(
        name=recipe.name,
        network=shape.name,
        data="none",
        sample_shape=shape.sample_shape,
        conditions=shape.conditions,
        in_pixels=shape.vae is None,
        build=partial(denoiser_of_shape, shape),
        train=train,
        embedding_dim=guidance.embedding_dim,
    )


def _settings_of(recipe: Recipe, stage: Stage) -> tuple[GuidanceStage, TrainSettings]:
    """Return stage one's settings, and those of the training of a stage."""
    settings: GuidanceStage | ProgressiveStage | None = getattr(recipe, stage)
    if settings is None or recipe.guidance is None:
        missing = "guidance" if recipe.guidance is None else stage
        raise RecipeError(
            f"recipe {recipe.name} has no settings under the key {missing}: add them, or bench another stage"
        )
    if settings.lora is not None:
        raise RecipeError(
            f"{stage}.lora: a benchmark trains all weights, and this stage adapters alone: bench the recipe without it"
        )
    return recipe.guidance, settings.train


def denoiser_of_shape(shape: Shape, device: torch.device) -> Denoiser:
    """Return a teacher of random weights, built on the device; what stands for no prompt is zeros.

    Raises:
        RecipeError: a shape of no family that can be built from its sizes alone.
    """
    scheduler = dict(shape.components["scheduler"])
    told = shape.conditions
    # Built where it will run: 859.5 M weights drawn on a CPU would take longer than the benchmark.
    with torch.device(device):
        network: Any = build_network(shape.network)
        if set(told) == {"label"} and "patch_size" not in shape.network:
            return ClassParts(unet=network, scheduler_config=scheduler or dict(COSINE_CONFIG)).denoiser()
        null: dict[str, Tensor] = {name: torch.zeros(1, *told[name]) for name in ("text", "pooled") if name in told}
    config = {**SCHEDULER_CONFIG, **scheduler}
    shared: dict[str, Any] = {
        "schedule": NoiseSchedule.from_scheduler_config(config),
        "prediction_type": check_prediction_type(config.get("prediction_type", "epsilon")),
    }
    if set(told) == {"text"}:
        return text_denoiser(network, null_embedding=null["text"], **shared)
    forwards = {"pooled": forward_sdxl, "masked_latents": forward_inpainting}
    for mark, forward in forwards.items():
        if mark in told:
            return Denoiser(network=network, forward=forward, condition_names=tuple(told), null=null, **shared)
    raise RecipeError(
        f"a teacher that is told {', '.join(told)} cannot be built from its sizes alone: name one that is there"
    )


def on_device(model: Denoiser, device: torch.device) -> Denoiser:
    """Return a teacher on another device."""
    if device.type == "meta":  # to count: a network that is moved there has lost its weights
        with device:
            return replace(model, network=build_network(model.network.config))
    null = {name: value.to(device) for name, value in model.null.items()}
    return replace(model, network=model.network.to(device), null=null)


def _stored_batches(
    recipe: Recipe, storage: Storage, facts: Mapping[str, Any], global_batch_size: int
) -> Callable[..., BatchSource]:
    return partial(
        sample_batches,
        # Held-out latents have their text embeddings where those of training have none.
        encoded_shards(recipe, facts["evaluate" if "training_format" in facts else "train"]),
        decode=SampleFormat(**facts["format"]).decoder(),
        storage=storage,
        stream=recipe.stream,
        global_batch_size=global_batch_size,
        seed=recipe.seed,
    )
