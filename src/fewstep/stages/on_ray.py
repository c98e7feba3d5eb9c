"""Many like pieces of work as Ray tasks: a bounded number at a time, results as they come."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from fewstep.errors import FewstepError
from fewstep.train.cluster import local_ray
from fewstep.train.settings import ClusterSettings

T = TypeVar("T")

#: Tasks that wait beside those that run, so that no core does.
_AHEAD = 2


def run_tasks(
    function: Callable[..., T],
    arguments: Sequence[tuple[Any, ...]],
    *,
    cluster: ClusterSettings,
    what: str,
    num_cpus: float = 1,
    num_gpus: float = 0,
    at_most: int | None = None,
) -> Iterator[tuple[int, T]]:
    """Yield (number, result) of each call of `function`, in the order in which they end.

    A task whose process or machine dies is done again, three times, so `function` must bear to be called twice.

    Args:
        function: pickles, as do its arguments and its result.
        arguments: of each call.
        cluster: the Ray.
        what: for errors.
        num_cpus, num_gpus: that a task takes.
        at_most: tasks at a time; None: as many as the cluster has room for.

    Raises:
        FewstepError: of a task, as it was raised there; or a task's process died again and again.
    """
    if not arguments:
        return
    with local_ray(cluster):
        # Ray would wait without a word for a machine that can hold such a task.
        largest = max((node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]), default=0)
        if cluster.address is None and "RAY_ADDRESS" not in os.environ and num_cpus > largest:
            raise FewstepError(
                f"{what}: a task takes {num_cpus:g} CPUs (prepare_metadata.download.processes), and this Ray has "
                f"{largest:g}: set it to {max(1, int(largest))}, or cluster.num_cpus higher"
            )
        task: Any = ray.remote(_call).options(num_cpus=num_cpus, num_gpus=num_gpus, max_retries=3)
        running: dict[Any, int] = {}
        left = iter(enumerate(arguments))
        try:
            while True:
                room = at_most or int(_AHEAD + ray.cluster_resources().get("CPU", 1) / max(num_cpus, 0.01))
                while len(running) < room and (following := next(left, None)) is not None:
                    running[task.remote(function, following[1])] = following[0]
                if not running:
                    return
                done, _ = ray.wait(list(running), num_returns=1)
                number = running.pop(done[0])
                yield number, _result(done[0], what)
        finally:
            for reference in running:
                ray.cancel(reference, force=False)


def _call(function: Callable[..., T], arguments: tuple[Any, ...]) -> T:
    return function(*arguments)


def _result(reference: Any, what: str) -> Any:
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, FewstepError):
            raise error.cause from None
        raise
    except RayError as error:
        raise FewstepError(
            f"{what}: the process of a task died again and again ({str(error).strip().splitlines()[0]}). Is a machine "
            "out of memory? Lower prepare_metadata.rows_per_task or the tasks at a time, and run the stage again: it "
            "goes on"
        ) from error
