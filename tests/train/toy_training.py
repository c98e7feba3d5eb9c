"""A tiny real training: a small network that learns a rotation of noisy points, from endless streams."""

from __future__ import annotations

import functools
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.errors import DataError
from fewstep.train.job import TrainJob
from fewstep.train.settings import TrainSettings

STREAMS = 4


class ToyObjective:
    def __init__(self, device: torch.device, *, dropout: float = 0.0) -> None:
        torch.manual_seed(1)
        self.network: nn.Module = nn.Sequential(nn.Linear(4, 32), nn.SiLU(), nn.Dropout(dropout), nn.Linear(32, 4)).to(
            device
        )

    def loss(self, network: nn.Module, batch: dict[str, Any], random: Any) -> tuple[Tensor, dict[str, Tensor]]:
        noisy = batch["x"] + 0.05 * random.normal(4)
        error = (network(noisy).float() - batch["x"].flip(1)).square().mean()
        return error, {"noise": (noisy - batch["x"]).square().mean()}


class ToyBatches:
    """Sample `position` of stream s is a function of (s, position); can die, spoil a batch or fail, once or always."""

    def __init__(
        self,
        *,
        rank: int,
        world_size: int,
        batch_size: int,
        die_at: int | None = None,
        died_marker: str | None = None,
        dies_after: Callable[[], bool] | None = None,
        nan_at: int | None = None,
        fail_at: int | None = None,
        pause_s: float = 0.0,
        log: str | None = None,
    ) -> None:
        self.own = [s for s in range(STREAMS) if s % world_size == rank]
        self.each = batch_size // STREAMS
        self.position = dict.fromkeys(self.own, 0)
        self.rank = rank
        self.die_at, self.died_marker, self.dies_after = die_at, died_marker, dies_after
        self.nan_at, self.fail_at, self.pause_s, self.log = nan_at, fail_at, pause_s, log

    def load_state(self, state: dict[str, Any]) -> None:
        self.position = {s: state["streams"][str(s)][1] for s in self.own}

    def __iter__(self) -> Iterator[Any]:
        while True:
            update = self.position[self.own[0]] // self.each
            self._mischief(update)
            samples, rows = [], []
            for s in self.own:
                for k in range(self.each):
                    generator = torch.Generator().manual_seed(1000 * s + self.position[s])
                    samples.append(torch.randn(4, generator=generator))
                    rows.append(s * self.each + k)
                    self.position[s] += 1
            x = torch.stack(samples)
            if update == self.nan_at:
                x[0, 0] = float("nan")
            state = {"streams": {str(s): [0, position] for s, position in self.position.items()}}
            drawn = {"toy": sum(self.position.values())}
            yield SimpleNamespace(data={"x": x}, rows=rows, state=state, counts={"broken": 1}, drawn=drawn)

    def _mischief(self, update: int) -> None:
        if self.log is not None and self.rank == 0:
            with open(self.log, "a") as file:
                print(update, file=file)
        if self.pause_s:
            time.sleep(self.pause_s)
        if update == self.fail_at:
            raise DataError("too many broken samples: 7 of 10, more than max_broken_share=0.1; look at the shards")
        if update == self.die_at and not (self.died_marker and Path(self.died_marker).exists()):
            deadline = time.monotonic() + 60
            while self.dies_after is not None and not self.dies_after() and time.monotonic() < deadline:
                time.sleep(0.1)
            if self.died_marker:
                Path(self.died_marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)


def export(network: nn.Module, folder: str) -> None:
    torch.save(network.state_dict(), Path(folder, "weights.pt"))


def toy_job(
    *, batch_size: int = 16, fingerprint: str = "a" * 64, dropout: float = 0.0, mischief: Any = None, **settings: Any
) -> TrainJob:
    values: dict[str, Any] = {"updates": 30, "learning_rate": 3e-3, "checkpoint_every": 5, "log_every": 1, **settings}
    return TrainJob(
        name="toy",
        fingerprint=fingerprint,
        objective=functools.partial(ToyObjective, dropout=dropout),
        batches=functools.partial(ToyBatches, batch_size=batch_size, **(mischief or {})),
        export=export,
        settings=TrainSettings(global_batch_size=batch_size, **values),
        seed=7,
    )


class FileTracker:
    """A tracker handle that appends to a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def metrics(self, figures: dict[str, float], step: int) -> None:
        with open(self.path, "a") as file:
            print(json.dumps({"step": step, **figures}), file=file)

    def close(self) -> None:
        return

    def by_step(self, name: str) -> dict[int, float]:
        """Return one figure by update; what was sent last counts."""
        lines = [json.loads(line) for line in Path(self.path).read_text().splitlines()]
        return {line["step"]: line[name] for line in lines}
