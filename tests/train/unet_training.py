"""A tiny training of a real diffusers U-Net that follows a frozen one, from endless streams."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from toy_training import STREAMS, export

from fewstep.train.in_process import train_in_process
from fewstep.train.job import TrainJob
from fewstep.train.settings import TrainSettings


def tiny_unet(seed: int) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    )


class FollowObjective:
    """Half the frozen network's output; notes how many rows the network gets at once."""

    def __init__(self, device: torch.device) -> None:
        self.network: nn.Module = tiny_unet(1).to(device)
        self.frozen = [tiny_unet(2).to(device).requires_grad_(False).eval()]
        self.rows: list[int] = []

    def loss(self, network: nn.Module, batch: dict[str, Any], random: Any) -> tuple[Tensor, dict[str, Tensor]]:
        assert len(batch["x"]) == len(batch["text"]) == len(batch["key"]) == len(random)
        self.rows.append(len(batch["x"]))
        z, index = batch["x"] + random.normal(4, 8, 8), random.integers(0, 1000)
        with torch.no_grad():
            target = self.frozen[0](z, index, batch["text"], return_dict=False)[0].float()
        output = network(z, index, batch["text"], return_dict=False)[0].float()
        return (output - 0.5 * target).square().mean(), {"target": target.square().mean()}


class KeyedBatches:
    """Sample `position` of stream s is a function of (s, position), and so is its key."""

    def __init__(self, *, rank: int, world_size: int, batch_size: int, nan_at: tuple[int, int] | None) -> None:
        self.own = [s for s in range(STREAMS) if s % world_size == rank]
        self.each = batch_size // STREAMS
        self.position = 0
        self.nan_at = nan_at  # (stream, position)

    def load_state(self, state: dict[str, Any]) -> None:
        self.position = state["streams"][str(self.own[0])][1]

    def __iter__(self) -> Iterator[Any]:
        while True:
            names = [(s, self.position + k) for s in self.own for k in range(self.each)]
            x, text = [], []
            for s, position in names:
                generator = torch.Generator().manual_seed(1000 * s + position)
                x.append(torch.randn(4, 8, 8, generator=generator))
                text.append(torch.randn(3, 8, generator=generator))
                if (s, position) == self.nan_at:
                    x[-1][0, 0, 0] = float("nan")
            self.position += self.each
            yield SimpleNamespace(
                data={"x": torch.stack(x), "text": torch.stack(text), "key": [f"{s}/{p}" for s, p in names]},
                rows=[s * self.each + k for s in self.own for k in range(self.each)],
                state={"streams": {str(s): [0, self.position] for s in self.own}},
                counts={},
                drawn={},
            )


def unet_job(*, objective: Any = FollowObjective, nan_at: tuple[int, int] | None = None, **settings: Any) -> TrainJob:
    values: dict[str, Any] = {
        "updates": 4,
        "global_batch_size": 8,
        "learning_rate": 1e-3,
        "ema_decay": 0.9,
        "hand_over": "ema",
        "checkpoint_every": 2,
        "log_every": 1,
        **settings,
    }
    return TrainJob(
        name="unet",
        fingerprint="d" * 64,
        objective=objective,
        batches=functools.partial(KeyedBatches, batch_size=values["global_batch_size"], nan_at=nan_at),
        export=export,
        settings=TrainSettings(**values),
        seed=5,
        num_streams=STREAMS,
    )


class Killed(BaseException):
    """The end of a process's life."""


def curve(job: TrainJob, folder: Path | None = None, *, kill_after: int | None = None) -> dict[int, tuple[float, ...]]:
    """Train and return (loss, gradient norm, target if there is one) by update."""
    figures: dict[int, tuple[float, ...]] = {}

    def note(done: int, means: dict[str, float]) -> None:
        figures[done] = tuple(means[name] for name in ("loss", "grad_norm", "target") if name in means)
        if done == kill_after:
            raise Killed

    with contextlib.suppress(Killed):
        train_in_process(job, folder=None if folder is None else str(folder), on_log=note)
    return figures


def exported(folder: Path) -> dict[str, Tensor]:
    loaded: dict[str, Tensor] = torch.load(folder / "export" / "weights.pt", weights_only=True)
    return loaded
