"""Bytes that go over the network and stay in the store: samples as the shards keep them, checkpoints, models."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fewstep.data.latents import latent_sample
from fewstep.distill.tokens import OF_THE_CAPTION
from fewstep.plan.memory import trained_weights
from fewstep.plan.network import sizes, weights_of_parts
from fewstep.plan.shapes import WHOLE_NUMBERS, Shape
from fewstep.plan.work import Training

#: Letters of a caption; an assumption.
_CAPTION = "a" * 64

#: Bytes a pixel of stored pictures: JPEG of quality 95, as img2dataset writes it, and PNG for small ones; assumptions.
_JPEG_BYTES_PER_PIXEL = 0.5
_PNG_BYTES_PER_PIXEL = 2.5
_SMALL_PX = 128

_BLOCK = 512  # of a tar


@dataclass(frozen=True)
class SampleBytes:
    """Bytes that a sample takes in its shard.

    Attributes:
        picture: in the picture shards; an estimate.
        latents: in the latent shards, as `fewstep.data.latents` writes them; 0 for a model in pixels.
        latents_without_text: likewise, without text embeddings.
        latents_alone: likewise, without the condition.
    """

    picture: int
    latents: int
    latents_without_text: int
    latents_alone: int

    def read(self, what: str) -> int:
        """Return the bytes of a sample that a training reads."""
        return {
            "pictures": self.picture,
            "latents": self.latents,
            "latents_without_text": self.latents_without_text,
            "latents_alone": self.latents_alone,
        }[what]


def sample_bytes(shape: Shape) -> SampleBytes:
    """Return the bytes of a model's samples."""
    side = shape.resolution
    each = _PNG_BYTES_PER_PIXEL if side < _SMALL_PX else _JPEG_BYTES_PER_PIXEL
    # Picture, caption or class, and a JSON file.
    picture = _in_tar(round(each * side**2)) + _in_tar(len(_CAPTION)) + _in_tar(400)
    if shape.vae is None:
        return SampleBytes(picture, 0, 0, 0)
    condition = {
        name: torch.zeros(size, dtype=torch.int64 if name in WHOLE_NUMBERS else torch.float32)
        for name, size in shape.conditions.items()
    }
    told = {name: value for name, value in condition.items() if name not in OF_THE_CAPTION}
    return SampleBytes(picture, _latent_bytes(shape, condition), _latent_bytes(shape, told), _latent_bytes(shape, {}))


def _latent_bytes(shape: Shape, condition: dict[str, torch.Tensor]) -> int:
    zeros = torch.zeros(shape.sample_shape)
    sample = latent_sample("0" * 9, _CAPTION, zeros, zeros, condition)
    return sum(_in_tar(len(content)) for name, content in sample.items() if not name.startswith("__"))


def _in_tar(size: int) -> int:
    return _BLOCK + -(-size // _BLOCK) * _BLOCK


def checkpoint_bytes(training: Training) -> int:
    """Return the bytes of one checkpoint: network, AdamW's two moments and the average, float32."""
    trained = trained_weights(training)
    average = trained if training.settings.ema_decay is not None else 0
    untrained = 0 if training.adapters is None else sizes(training.network).weights
    return 4 * (untrained + 3 * trained + average)


def checkpoints_written(training: Training) -> int:
    """Return how many checkpoints a training writes: at every multiple and at its end."""
    return -(-training.settings.updates // training.settings.checkpoint_every)


def export_bytes(training: Training, shape: Shape) -> int:
    """Return the bytes of the model that a training leaves: the folder of all parts in float32, or the VAE alone."""
    if training.network.role == "autoencoder":
        return 4 * sizes(training.network).weights
    return 4 * weights_of_parts(shape)
