"""Stable Diffusion 1.5 with random weights: the real sizes without any download."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from fewstep.bench.workload import TrainWorkload, denoiser_of_shape
from fewstep.models import TeacherArchitecture, TextToImageParts
from fewstep.plan.shapes import shipped_shapes
from fewstep.train.settings import TrainSettings

#: Stable Diffusion 1.5, as its folder on the hub describes itself; what is not named is diffusers' default.
SD15_UNET: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SD15_VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "sample_size": 512,
}
SD15_TEXT: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
}
SD15_SCHEDULER: dict[str, Any] = {
    "_class_name": "PNDMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
}
_SD15_TOKENS = 77


def sd15_train_workload(resolution: int = 512) -> TrainWorkload:
    """Return Stable Diffusion 1.5's U-Net with random weights, built on the device; nothing is downloaded."""
    size = resolution // 8
    known = shipped_shapes()["sd15"]
    unet = {**known.network, "sample_size": size}
    shape = replace(known, components={**known.components, "unet": unet})
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

    The tokenizer is a small one of our own with 77 places: which words a token stands for changes no speed.
    """
    tokenizer = TeacherArchitecture(vocabulary_size=300, max_prompt_tokens=_SD15_TOKENS).train_tokenizer(
        ["a red apple"]
    )
    with torch.device(device):
        parts = TextToImageParts(
            vae=AutoencoderKL(**SD15_VAE),
            text_encoder=CLIPTextModel(CLIPTextConfig(**SD15_TEXT)),
            tokenizer=tokenizer,
            unet=UNet2DConditionModel(**{**SD15_UNET, "sample_size": resolution // 8}),
            scheduler_config=SD15_SCHEDULER,
        )
    return parts.to(device, dtype).freeze()
