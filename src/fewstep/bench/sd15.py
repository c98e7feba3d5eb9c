"""Stable Diffusion 1.5 with random weights: the real sizes without any download."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from fewstep.bench.workload import TrainWorkload, denoiser_of_shape
from fewstep.models import TeacherArchitecture, TextToImageParts
from fewstep.plan.network import build_network, build_text_encoder
from fewstep.plan.shapes import Shape, shipped_shapes
from fewstep.train.settings import TrainSettings


def sd15_train_workload(resolution: int = 512) -> TrainWorkload:
    """Return Stable Diffusion 1.5's U-Net with random weights, built on the device; nothing is downloaded."""
    shape = _shape(resolution)
    return TrainWorkload(
        name="sd15",
        network="Stable Diffusion 1.5's U-Net, random weights",
        data=f"synthetic latents of {resolution} px pictures in memory, so the data wait says nothing of a store",
        sample_shape=shape.sample_shape,
        conditions=shape.conditions,
        build=partial(denoiser_of_shape, shape),
        train=TrainSettings(updates=1, global_batch_size=32, learning_rate=1e-5, decay="constant", ema_decay=0.999),
    )


def sd15_parts(device: torch.device, dtype: torch.dtype, *, resolution: int = 512) -> TextToImageParts:
    """Return all of Stable Diffusion 1.5 with random weights on a device, frozen.

    The tokenizer is a small one of our own with as many places: which words a token stands for changes no speed.
    """
    components = _shape(resolution).components
    text = components["text_encoder"]
    tokens = text["max_position_embeddings"]
    tokenizer = TeacherArchitecture(vocabulary_size=300, max_prompt_tokens=tokens).train_tokenizer(["a red apple"])
    with torch.device(device):
        parts = TextToImageParts(
            vae=build_network(components["vae"]),
            text_encoder=build_text_encoder(text),
            tokenizer=tokenizer,
            unet=build_network(components["unet"]),
            scheduler_config=components["scheduler"],
        )
    return parts.to(device, dtype).freeze()


def _shape(resolution: int) -> Shape:
    """Return the shipped sizes for pictures of another side."""
    known = shipped_shapes()["sd15"]
    unet = {**known.network, "sample_size": resolution // 8}
    return replace(known, components={**known.components, "unet": unet})
