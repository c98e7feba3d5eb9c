"""Encoders in the cluster: a Ray Data job over picture shards, by actors that hold the networks."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from fewstep.errors import FewstepError
from fewstep.stages.encode_shards import Encoders, EncodeTask, Encoding, ShardEncoder
from fewstep.storage import Storage

_RESTARTS = 3


class _Actor:
    """Takes rows with a shard to encode, and returns its number and record.

    The networks are loaded with the first row: of what goes wrong in an actor's beginning Ray Data tells no cause.
    """

    def __init__(self, encoding: Encoding, encoders: Encoders, storage: Storage) -> None:
        self._encoding, self._encoders, self._storage = encoding, encoders, storage
        self._encoder: ShardEncoder | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        task: EncodeTask = row["task"]
        try:
            if self._encoder is None:
                self._encoder = ShardEncoder(self._encoders.load(), self._encoding, self._storage)
            return {"number": task.number, "record": self._encoder.encode(task), "error": None}
        except FewstepError as error:  # Ray Data would put it into words of its own
            return {"number": task.number, "record": None, "error": error}


def encode_in_cluster(
    tasks: Sequence[EncodeTask], encoding: Encoding, encoders: Encoders, storage: Storage
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield number and record of each shard, in the order in which they are done.

    An actor that dies is made again, and its shard is encoded again.

    Raises:
        FewstepError: of an encoder, as it was raised there; or an encoder died again and again.
    """
    import ray.data

    _quiet()
    count = min(encoders.count, len(tasks))
    actor: Any = _Actor
    data = ray.data.from_items([{"task": task} for task in tasks], override_num_blocks=len(tasks))
    records = data.map(
        actor,
        fn_constructor_args=(encoding, encoders, storage),
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=count, max_tasks_in_flight_per_actor=2),
        num_cpus=1,
        num_gpus=1 if encoders.use_gpu else 0,
        # Without limits Ray Data would begin a shard that kills its encoder for ever.
        max_restarts=_RESTARTS,
        max_task_retries=_RESTARTS,
    )
    try:
        for row in records.iter_rows():
            if row["error"] is not None:
                raise row["error"]
            yield int(row["number"]), row["record"]
    except RayTaskError as error:
        if isinstance(error.cause, FewstepError):
            raise error.cause from None
        raise
    except RayError as error:
        said = str(error).strip().splitlines()[0]
        raise FewstepError(
            f"encode: an encoder died again and again ({said}). Is its GPU or its machine out of memory? Lower "
            "encode.batch_size, and run the stage again: it goes on with the shards that are missing"
        ) from error


def _quiet() -> None:
    """Keep Ray Data's own bars and lines out of ours."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.verbose_progress = False
    context.max_errored_blocks = 0
    logging.getLogger("ray.data").setLevel(logging.ERROR)
