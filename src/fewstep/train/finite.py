"""Ends a training whose numbers stop being finite, and names the batch in which they did."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fewstep.errors import FewstepError
from fewstep.train.host import Host
from fewstep.train.job import TrainJob
from fewstep.train.parallel import local

if TYPE_CHECKING:
    from fewstep.data.stream import Batch

_MAX_KEYS = 64


@dataclass(frozen=True)
class _Place:
    """Where this worker's rows of an update come from."""

    position: dict[str, Any]
    rows: list[int]
    keys: list[Any] | None


class FiniteCheck:
    """Looks at loss, gradient norm and weights where the loop waits for the device anyway.

    Until then it holds the place of each update's batch: references that the batch has made already.
    """

    def __init__(self, job: TrainJob, host: Host) -> None:
        self._job, self._host = job, host
        self._places: list[_Place] = []

    def note(self, batch: Batch) -> None:
        """Take in where the next update's batch comes from."""
        keys = batch.data.get("key")
        self._places.append(_Place(batch.state, batch.rows, keys if isinstance(keys, list) else None))

    def check(self, figures: dict[str, list[float]], *, own_losses: list[float], done: int) -> None:
        """Look at the updates since the last check. Every worker must call it after the same update.

        Args:
            figures: means over the workers, each update's.
            own_losses: this worker's.
            done: updates done.

        Raises:
            FewstepError: a loss or gradient norm was not a finite number.
        """
        places, self._places = self._places, []
        bad = _first_not_finite(figures)
        if bad is None:
            return
        index, name, value = bad
        place = places[index]
        # All workers see the same mean, so all of them are here.
        gathered = self._host.gather((math.isfinite(own_losses[index]), place.position, place.rows, place.keys))
        # A gradient can overflow where every loss is finite; then each worker's rows may be the cause.
        culprits = [worker for worker, (finite, *_) in enumerate(gathered) if not finite] or list(range(len(gathered)))
        batch = "; ".join(_in_words(worker, *gathered[worker][1:]) for worker in culprits)
        update = done - len(places) + index + 1
        raise FewstepError(self._diverged(f"the {name} became {value} at update {update}", f" Its batch: {batch}."))

    @torch.no_grad()
    def check_weights(self, weights: list[nn.Parameter], *, done: int) -> None:
        """Look at the weights before they are saved. Every worker must call it after the same update.

        Raises:
            FewstepError: one is not a finite number.
        """
        norms = torch._foreach_norm([local(weight.detach()) for weight in weights])
        norm = self._host.mean(torch.stack(norms).sum()).item()
        if not math.isfinite(norm):
            raise FewstepError(self._diverged(f"the weights became {norm} at update {done}", ""))

    def _diverged(self, what: str, batch: str) -> str:
        settings = self._job.settings
        return (
            f"{self._job.name}: {what} of {settings.updates}.{batch} Nothing of it was saved: the last good checkpoint "
            f"is still in {self._host.checkpoint_uri}. Usual ways out: a lower learning_rate (now "
            f"{settings.learning_rate:g}), a smaller grad_clip_norm (now {settings.grad_clip_norm:g}), more "
            f"warmup_updates (now {settings.warmup_updates}), or precision: float32 (the recipe says "
            f"{settings.precision})"
        )


def _in_words(worker: int, position: dict[str, Any], rows: list[int], keys: list[Any] | None) -> str:
    words = f"worker {worker}, rows {_ranges(rows)}, ending at data position {json.dumps(_shortened(position))}"
    if keys:
        more = f" and {len(keys) - _MAX_KEYS} more" if len(keys) > _MAX_KEYS else ""
        words += f", samples {', '.join(str(key) for key in keys[:_MAX_KEYS])}{more}"
    return words


def _shortened(position: dict[str, Any]) -> dict[str, Any]:
    """Return a data position without the samples that wait for their group, which may be hundreds."""
    return {
        name: _shortened(value) if isinstance(value, dict) else value
        for name, value in position.items()
        if name != "waiting"
    }


def _ranges(rows: list[int]) -> str:
    """Return `0-3, 8-11` for eight rows of two streams."""
    ranges: list[list[int]] = []
    for row in rows:
        if ranges and row == ranges[-1][1] + 1:
            ranges[-1][1] = row
        else:
            ranges.append([row, row])
    return ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in ranges)


def _first_not_finite(figures: dict[str, list[float]]) -> tuple[int, str, float] | None:
    """Return (index of the update, name, value) of the first loss or gradient norm that is not a finite number."""
    for index, (loss, norm) in enumerate(zip(figures["loss"], figures["grad_norm"], strict=True)):
        if not math.isfinite(loss):
            return index, "loss", loss
        if not math.isfinite(norm):
            return index, "gradient norm", norm
    return None
