"""What is benchmarked: networks of a known shape, and where their training batches come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from fewstep.bench.batches import SyntheticBatches
from fewstep.bench.settings import Stage
from fewstep.data.stream import BatchSource
from fewstep.errors import RecipeError
from fewstep.models import SCHEDULER_CONFIG, TextToImageParts, load_parts
from fewstep.plan.teacher import find_shape
from fewstep.recipe import Recipe
from fewstep.stages import find_artifact
from fewstep.stages.batches import latent_batches
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
        unet_config: configuration of the teacher's U-Net, without w.
        scheduler_config: noise schedule and prediction type.
        latent_shape: (C, h, w).
        text_shape: (L, D).
        build_unet: returns the teacher's U-Net on a device.
        train: the training's settings; the benchmark sets updates, batch size and precision.
        w_min, w_max, embedding_dim: of the guidance weight.
        batches: returns the stored batches for a batch size; None: made in memory.
    """

    name: str
    network: str
    data: str
    unet_config: dict[str, Any]
    scheduler_config: dict[str, Any]
    latent_shape: tuple[int, int, int]
    text_shape: tuple[int, int]
    build_unet: Callable[[torch.device], UNet2DConditionModel]
    train: TrainSettings
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
            latent_shape=self.latent_shape,
            text_shape=self.text_shape,
            global_batch_size=global_batch_size,
            seed=seed,
        )


def recipe_train_workload(recipe: Recipe, stage: Stage, storage: Storage) -> TrainWorkload:
    """Return a recipe's stage one or stage two: its own latent shards if `encode` has run, otherwise made latents of
    the same shape; its own teacher, or random weights of its shape if the `teacher` stage has not run.

    Raises:
        RecipeError: the recipe has no such stage.
        ModelError: its teacher cannot be had.
    """
    settings = getattr(recipe, stage)
    if settings is None or recipe.guidance is None:
        missing = "guidance" if recipe.guidance is None else stage
        raise RecipeError(
            f"recipe {recipe.name} has no settings under the key {missing}: add them, or bench another stage"
        )
    parts = _recipe_parts(recipe, storage)
    if parts is not None:
        unet_config, scheduler_config = dict(parts.unet.config), parts.scheduler_config
        latent_shape, tokens = parts.latent_shape, parts.tokenizer.model_max_length
        network = f"U-Net of {recipe.teacher or 'the recipe’s teacher stage'}"
        build = partial(_to_device, parts.unet)
    else:
        shape = find_shape(recipe)
        if set(shape.conditions) != {"text"} or shape.attended is None:
            raise RecipeError(
                f"the teacher of recipe {recipe.name} is told {', '.join(shape.conditions)}, and its teacher stage has "
                "not run: run it first, or bench a recipe of a text-to-image teacher"
            )
        latent_shape, tokens = shape.sample_shape, shape.attended[0]
        unet_config, scheduler_config = dict(shape.network), {**SCHEDULER_CONFIG, **shape.components["scheduler"]}
        unet = UNet2DConditionModel.from_config(unet_config)
        network = "U-Net of the recipe’s teacher stage, which has not run: random weights"
        build = partial(_to_device, unet)
    encoded = find_artifact(recipe, storage, "encode")
    return TrainWorkload(
        name=recipe.name,
        network=network,
        data=f"latent shards in {encoded.facts['train']['uri']}"
        if encoded is not None
        else "synthetic latents in memory, as the encode stage has not run: the data wait says nothing of a store",
        unet_config={key: value for key, value in unet_config.items() if not key.startswith("_")},
        scheduler_config=scheduler_config,
        latent_shape=latent_shape,
        text_shape=(tokens, unet_config["cross_attention_dim"]),
        build_unet=build,
        train=settings.train,
        w_min=recipe.guidance.w_min,
        w_max=recipe.guidance.w_max,
        embedding_dim=recipe.guidance.embedding_dim,
        batches=None if encoded is None else partial(_stored_batches, recipe, storage, encoded.facts["train"]["uri"]),
    )


def _to_device(unet: UNet2DConditionModel, device: torch.device) -> UNet2DConditionModel:
    return unet.to(device)


def _recipe_parts(recipe: Recipe, storage: Storage) -> TextToImageParts | None:
    if recipe.teacher is not None:
        return load_parts(fetch_model(recipe.teacher, storage=storage, tracking=recipe.tracking))
    trained = find_artifact(recipe, storage, "teacher")
    return None if trained is None else load_parts(fetch_model(join(trained.uri, "export"), storage=storage))


def _stored_batches(recipe: Recipe, storage: Storage, uri: str, global_batch_size: int) -> Callable[..., BatchSource]:
    return partial(
        latent_batches,
        uri,
        storage=storage,
        stream=recipe.stream,
        global_batch_size=global_batch_size,
        seed=recipe.seed,
    )
