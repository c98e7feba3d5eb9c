"""Tiny workloads for the benchmarks."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from fewstep.bench.settings import TrainBenchSettings
from fewstep.bench.workload import TrainWorkload, on_device
from fewstep.train.settings import TrainSettings
from tiny import tiny_teacher

CPU = torch.device("cpu")


def tiny_workload(**train: Any) -> TrainWorkload:
    """Return the training of the tiny teacher on made batches of four."""
    model = tiny_teacher().denoiser()
    values: dict[str, Any] = {"updates": 100, "global_batch_size": 4, "learning_rate": 1e-3, "ema_decay": 0.9, **train}
    return TrainWorkload(
        name="tiny",
        network="tiny, random weights",
        data="made",
        sample_shape=(4, 4, 4),
        conditions={"text": (16, 16)},
        build=partial(on_device, model),
        train=TrainSettings(**values),
        w_max=4.0,
        embedding_dim=16,
    )


def settings(**values: Any) -> TrainBenchSettings:
    """Return settings of a benchmark that takes a second."""
    return TrainBenchSettings(**{"device": "cpu", "updates": 2, "rounds": 2, **values})
