"""Trainings with the real objectives on tiny networks, from made-up latents."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from toy_training import STREAMS, export

from fewstep.distill import DenoisingObjective, GuidanceObjective, ProgressiveObjective
from fewstep.distill.denoising import TextToImageNetwork
from fewstep.distill.objective import Objective
from fewstep.models import load_parts
from fewstep.train.job import TrainJob
from fewstep.train.settings import TrainSettings

Kind = Literal["denoising", "guidance", "progressive"]


def objective(kind: Kind, folder: str, device: torch.device) -> Objective:
    """Return the objective of a stage; `folder` holds a teacher, or for `progressive` a student."""
    parts = load_parts(folder).to(device)
    if kind == "guidance":
        return GuidanceObjective(parts.denoiser(), w_min=0.5, w_max=4.0, embedding_dim=16)
    if kind == "progressive":
        return ProgressiveObjective(parts.denoiser(), num_inference_steps=4, w_min=0.5, w_max=4.0)
    network = TextToImageNetwork(parts.unet, parts.text_encoder).requires_grad_(True).train()
    model = network.denoiser(
        null_token_ids=parts.token_ids([""])[0], schedule=parts.schedule, prediction_type=parts.prediction_type
    )
    return DenoisingObjective(model)


class LatentBatches:
    """Sample `position` of stream s is a function of (s, position)."""

    def __init__(self, folder: str, *, rank: int, world_size: int, batch_size: int) -> None:
        self._own = [s for s in range(STREAMS) if s % world_size == rank]
        self._each = batch_size // STREAMS
        self._position = 0
        parts = load_parts(folder)
        captions = ["a red apple, twemoji", "two birds on blue", "an emoji", ""]
        self._token_ids, self._text = parts.token_ids(captions), parts.encode_prompts(captions)

    def load_state(self, state: dict[str, Any]) -> None:
        self._position = state["streams"][str(self._own[0])][1]

    def __iter__(self) -> Iterator[Any]:
        while True:
            means, rows, captions = [], [], []
            for s in self._own:
                for k in range(self._each):
                    generator = torch.Generator().manual_seed(1000 * s + self._position + k)
                    means.append(torch.randn(4, 4, 4, generator=generator))
                    captions.append((s + self._position + k) % 4)
                    rows.append(s * self._each + k)
            self._position += self._each
            mean = torch.stack(means)
            data = {
                "latent_mean": mean,
                "latent_std": torch.full_like(mean, 0.1),
                "text": self._text[captions],
                "token_ids": self._token_ids[captions],
            }
            state = {"streams": {str(s): [0, self._position] for s in self._own}}
            yield SimpleNamespace(data=data, rows=rows, state=state, counts={}, drawn={})


def real_job(kind: Kind, folder: Path, *, updates: int = 20) -> TrainJob:
    made: Callable[[torch.device], Objective] = functools.partial(objective, kind, str(folder))
    return TrainJob(
        name=kind,
        fingerprint="c" * 64,
        objective=made,
        batches=functools.partial(LatentBatches, str(folder), batch_size=8),
        export=export,
        settings=TrainSettings(
            updates=updates, global_batch_size=8, learning_rate=1e-3, checkpoint_every=updates, log_every=1
        ),
        seed=3,
        num_streams=STREAMS,
    )
