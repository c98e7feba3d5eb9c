"""One training as a value: what to train, on what, for how long, and what came of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from fewstep.errors import CheckpointError
from fewstep.train.settings import TrainSettings

if TYPE_CHECKING:
    from fewstep.data.stream import BatchSource
    from fewstep.distill.objective import Objective


class TrackerHandle(Protocol):
    """Where figures go; picklable, so that a Ray worker can hold it. `tracking` has the one that writes to MLflow."""

    def metrics(self, figures: dict[str, float], step: int) -> None:
        """Take figures over; must not wait for a server."""

    def close(self) -> object:
        """Wait for what is on its way."""


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """A training, described so that any worker on any machine can start it or go on with it.

    Args:
        name: short name for progress lines and messages, such as `guidance`.
        fingerprint: digest of everything the result depends on; a checkpoint with another one is refused.
        objective: called as objective(device) inside each worker.
        batches: called as batches(rank=, world_size=) inside each worker.
        export: called as export(network, folder) on rank 0, with the weights to hand over; writes what the stage keeps.
        settings: the training's settings.
        seed: seed of every random number of the training.
        num_streams: canonical streams of the batches, which the workers share; None: the rows themselves.
        grouped: the rows of each stream in a batch have a shape of their own, so that no micro-batch may have rows of
            two streams.
        tags: stored beside the result.
        labels: which training it is, for those who watch: recipe, stage, training.
        flops: returns the FLOPs of one sample in an update; called by the driver where there are GPUs, and what it
            raises only leaves a figure out. None: they are not known.

    The callables must be picklable: `functools.partial` of module-level functions.
    """

    name: str
    fingerprint: str
    objective: Callable[[torch.device], Objective]
    batches: Callable[..., BatchSource]
    export: Callable[[nn.Module, str], None]
    settings: TrainSettings
    seed: int = 0
    num_streams: int | None = None
    grouped: bool = False
    tags: dict[str, str] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    flops: Callable[[], float] | None = None

    @property
    def rows_of_one_shape(self) -> int | None:
        """How many rows of a batch, one group after another, have one shape; None: all have."""
        return self.settings.global_batch_size // (self.num_streams or 1) if self.grouped else None


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a finished training leaves: where its export lies, and how it went.

    `seconds` is time inside the loop that counted towards the result, over all resumes; `figures` are means over the
    last readings (loss, grad_norm, what the objective reports); `resumed_from` is the update that the last process
    started from, or None.
    """

    export_uri: str
    updates: int
    seconds: float
    images_per_second: float
    data_wait_share: float
    peak_memory_bytes: int
    figures: dict[str, float]
    resumed_from: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the result as a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any], *, uri: str) -> TrainResult:
        """Return the result that `to_json` wrote.

        Raises:
            CheckpointError: fields are missing or unknown.
        """
        try:
            return cls(**value)
        except TypeError as error:
            raise CheckpointError(
                f"{uri} is not the result of a training ({error}); delete it, and the training runs again"
            ) from error
