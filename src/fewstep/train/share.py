"""One worker's part of every global batch: how many rows, in which passes, and what they weigh in the mean of all.

A worker takes whole canonical streams, those with ``stream % world_size == rank``, and so one more or one less than
another where their number does not divide. DDP and FSDP average over the workers, as if all had as many rows. So the
mean loss of a pass over k rows is divided by global / (k · world_size): then the average over the workers is the mean
over the rows of the global batch, whoever has how many. With equal shares that is the number of passes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.errors import DataError
from fewstep.train.job import TrainJob
from fewstep.train.settings import wrong_group, wrong_micro_batch


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass.

    Attributes:
        rows: of the worker's rows, those that go through the network.
        divisor: what their mean loss is divided by. Infinite for a pass that adds nothing: it makes the exchanges that
            the other workers, who have more rows, wait for (under FSDP every pass gathers weights).
    """

    rows: slice
    divisor: float


@dataclass(frozen=True)
class Share:
    """A worker's rows in a global batch, and its passes: as many on every worker, the idle ones last."""

    rows: int
    passes: tuple[Pass, ...]

    @torch.no_grad()
    def mean(self, readings: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return figures whose plain mean over the workers is that over the rows of the global batch.

        Args:
            readings: of each pass, each figure a mean over its rows.
        """
        if all(each.divisor == len(self.passes) for each in self.passes):
            if len(readings) == 1:
                return readings[0]
            return {name: torch.stack([reading[name].detach() for reading in readings]).mean() for name in readings[0]}
        counted = [
            (reading, each.divisor)
            for reading, each in zip(readings, self.passes, strict=True)
            if math.isfinite(each.divisor)
        ]
        return {
            name: torch.stack([reading[name].detach() / divisor for reading, divisor in counted]).sum()
            for name in readings[0]
        }


def share_of(job: TrainJob, *, rank: int, world_size: int) -> Share:
    """Return what a worker does of each update; a pure function of the job, the rank and the number of workers.

    The last pass may have fewer rows than the others.

    Raises:
        DataError: there are more workers than streams, or the micro-batch does not fit the batch.
    """
    batch_size, group = job.settings.global_batch_size, job.rows_of_one_shape
    streams = batch_size if job.num_streams is None else job.num_streams
    if world_size > streams:
        raise DataError(
            f"{job.name}: {world_size} workers cannot share {streams} "
            f"{'rows' if job.num_streams is None else 'canonical streams'}: each needs one; take at most {streams}"
        )
    each = batch_size // streams
    own, most = len(range(rank, streams, world_size)) * each, math.ceil(streams / world_size) * each
    size = job.settings.micro_batch_size or group or most
    if group is not None and group % size:
        raise DataError(wrong_group(size, group, batch_size))
    if job.settings.micro_batch_size is not None and batch_size % size:
        raise DataError(wrong_micro_batch(size, batch_size))
    slices = [slice(start, min(start + size, own)) for start in range(0, own, size)]
    passes = [Pass(rows, batch_size / ((rows.stop - rows.start) * world_size)) for rows in slices]
    idle = [Pass(slices[0], math.inf)] * (math.ceil(most / size) - len(passes))
    return Share(own, (*passes, *idle))
