"""What a training on Ray leaves in the store."""

from __future__ import annotations

import io
from collections.abc import Callable

import torch
from torch import Tensor

from fewstep.storage import Storage, join

OPTIONS = {"ema_decay": 0.9, "hand_over": "ema", "warmup_updates": 3}


def exported(storage: Storage, uri: str) -> dict[str, Tensor]:
    loaded: dict[str, Tensor] = torch.load(io.BytesIO(storage.read_bytes(join(uri, "export", "weights.pt"))))
    return loaded


def checkpoint_is_known(storage: Storage, uri: str, update: int) -> Callable[[], bool]:
    """Whether Ray Train goes on from the checkpoint of an update: its upload does not hold up the training."""

    def is_known() -> bool:
        known = join(uri, "checkpoints", "checkpoint_manager_snapshot.json")
        return storage.exists(known) and f"update-{update:08d}" in storage.read_bytes(known).decode()

    return is_known
