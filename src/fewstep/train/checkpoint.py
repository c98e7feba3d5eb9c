"""The checkpoint: one file with everything that a training needs to go on exactly where it was.

No state of a random generator is in it: every draw is a function of (seed, update, row) or of (seed, update, rank), so
the update index is the random state.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.errors import CheckpointError
from fewstep.train.job import TrainJob
from fewstep.train.precision import Precision

FILE_NAME = "state.pt"
_SCRATCH_PREFIX = "fewstep-train-"


@dataclass
class TrainState:
    """What is saved after an update.

    Args:
        fingerprint, settings: of the job that wrote it; settings are those that a weight depends on.
        update: updates done; also the position in the learning-rate schedule and in the random numbers.
        network, ema, optimizer: state dicts; ema is None where no average is kept.
        streams: position of every data stream, merged over the workers.
        skipped: samples skipped so far, by reason, over all workers.
        figures: the last readings.
        seconds, waited_s: time in the loop, and the part of it spent waiting for data.
        precision: what the network computed in; a training keeps to it, wherever it goes on.
    """

    fingerprint: str
    settings: dict[str, Any]
    update: int
    network: dict[str, Tensor]
    ema: dict[str, Tensor] | None
    optimizer: dict[str, Any]
    streams: dict[str, Any]
    skipped: dict[str, int]
    figures: dict[str, float]
    seconds: float
    waited_s: float
    precision: Precision


def save_state(state: TrainState, folder: str) -> None:
    """Write a state into a folder.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written.
    """
    path = Path(folder, FILE_NAME)
    content = {field.name: getattr(state, field.name) for field in fields(state)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, path)
    except (OSError, RuntimeError) as error:  # torch's zip writer reports a full disk as RuntimeError
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        free_bytes = shutil.disk_usage(tempfile.gettempdir()).free
        raise CheckpointError(
            f"the checkpoint of update {state.update} cannot be written to {path} ({free_bytes / 2**20:.0f} MiB free): "
            f"{str(error).splitlines()[0]}. Free some space or point TMPDIR to a larger disk; "
            "the run goes on from the checkpoint before"
        ) from error


def load_state(folder: str) -> TrainState:
    """Return the state in a folder, its tensors mapped from the file on the CPU.

    Raises:
        CheckpointError: the file is missing, cut short or of another format.
    """
    path = Path(folder, FILE_NAME)
    try:
        return TrainState(**torch.load(path, map_location="cpu", mmap=True, weights_only=True))
    except (OSError, RuntimeError, TypeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"checkpoint {path} cannot be read: {str(error).splitlines()[0]}. It is damaged or not fewstep's; "
            "delete it, and the training goes on from the one before or from the start"
        ) from error


def check_belongs(state: TrainState, job: TrainJob, *, uri: str) -> None:
    """Refuse a checkpoint of another recipe.

    Raises:
        CheckpointError: fingerprint or settings differ; the message names both.
    """
    way_out = f"Use another run name, or remove {uri} to train from the start"
    if state.fingerprint != job.fingerprint:
        raise CheckpointError(
            f"the checkpoint of update {state.update} in {uri} was made by a recipe with fingerprint "
            f"{state.fingerprint}, and this recipe has {job.fingerprint}. {way_out}"
        )
    settings = job.settings.of_the_weights()
    changed = [
        f"{name} was {state.settings.get(name)!r} and is {settings.get(name)!r}"
        for name in sorted(settings.keys() | state.settings.keys())
        if state.settings.get(name) != settings.get(name)
    ]
    if changed:
        raise CheckpointError(
            f"the checkpoint of update {state.update} in {uri} was made with other settings: {'; '.join(changed)}. "
            f"Set them back, or: {way_out}"
        )


def merge_streams(states: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the workers' stream states as one: dictionaries are joined, anything else must be equal.

    Raises:
        CheckpointError: two workers say different things about the same stream.
    """
    merged: dict[str, Any] = {}
    for state in states:
        for key, value in state.items():
            if isinstance(value, dict):
                value = merge_streams([merged.get(key, {}), value])
            elif merged.get(key, value) != value and key == "shards":
                raise CheckpointError(
                    f"two workers have listed different shards (digests {merged[key]!r} and {value!r}): is somebody "
                    "still writing there? Wait until they are whole, and start again"
                )
            elif merged.get(key, value) != value:
                raise CheckpointError(
                    f"two workers report different positions for {key!r}: {merged[key]!r} and {value!r}; each data "
                    "stream must belong to one worker"
                )
            merged[key] = value
    return merged


def add_counts(counts: list[dict[str, int]]) -> dict[str, int]:
    """Return the sum of counters by name."""
    names = sorted({name for count in counts for name in count})
    return {name: sum(count.get(name, 0) for count in counts) for name in names}


def scratch_folder() -> str:
    """Return a new temporary folder that names its process, and remove those whose process has died."""
    root = Path(tempfile.gettempdir())
    for old in root.glob(f"{_SCRATCH_PREFIX}*-*"):
        pid = old.name.removeprefix(_SCRATCH_PREFIX).split("-")[0]
        if pid.isdigit() and not Path("/proc", pid).exists() and Path("/proc").exists():
            shutil.rmtree(old, ignore_errors=True)
    return tempfile.mkdtemp(prefix=f"{_SCRATCH_PREFIX}{os.getpid()}-")
