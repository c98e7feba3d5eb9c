"""The Ray that trainings run on: one that is there already, or one started on this machine."""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import psutil
import ray
from ray._private import ray_constants
from ray.train.v2._internal.constants import ENABLE_PREEMPTION_WATCHER_ENV_VAR

from fewstep.errors import FewstepError
from fewstep.train.settings import ClusterSettings, ElasticWorkers

logger = logging.getLogger(__name__)

NAMESPACE = "fewstep"
START_ATTEMPTS = 3


@contextmanager
def local_ray(settings: ClusterSettings) -> Iterator[None]:
    """Keep this process connected to a Ray: the connection it has, the cluster named, or a Ray started for the block.

    The cluster is `settings.address`, or $RAY_ADDRESS; without either a Ray is started on this machine, on loopback,
    without dashboard, and stopped at the end. A cluster that was there is left running. Blocks may be nested, so that
    a workflow holds one Ray over all its stages.

    Raises:
        FewstepError: no cluster answers at the address.
    """
    if ray.is_initialized():
        yield
        return
    address = settings.address or os.environ.get("RAY_ADDRESS")
    # Ray Train would otherwise move workers to a folder of its own, where relative paths of the recipe mean nothing.
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # 2 by default: seconds lost in every short stage
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the behaviour to come; silences a warning
    with _signals_as_before(), _preemption_watched(address is not None):
        _connect(settings, address)
        try:
            yield
        finally:
            ray.shutdown()


def _connect(settings: ClusterSettings, address: str | None) -> None:
    if address is None:
        _start_here(settings)
        return
    try:
        ray.init(address=address, namespace=NAMESPACE, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise FewstepError(
            f"no Ray cluster answers at {address} ({error}). Start one with `ray start --head`, correct "
            "cluster.address or RAY_ADDRESS, or unset both to have one started on this machine"
        ) from error


def _start_here(settings: ClusterSettings) -> None:
    for attempt in range(1, START_ATTEMPTS + 1):
        before = set(psutil.Process().children())
        try:
            with _loopback_only():
                ray.init(
                    address="local",
                    namespace=NAMESPACE,
                    num_cpus=settings.num_cpus,
                    object_store_memory=settings.object_store_bytes,
                    include_dashboard=False,
                    logging_level=logging.ERROR,
                    log_to_driver=False,
                )
            return
        except Exception as error:  # Ray gives its parts 30 s each and raises a bare Exception after that
            ray.shutdown()  # does not know of the parts that had started
            for leftover in set(psutil.Process().children()) - before:
                with suppress(psutil.NoSuchProcess):
                    if any("/site-packages/ray/" in part for part in leftover.cmdline()):
                        leftover.kill()
            logger.warning("Ray did not start (attempt %d of %d): %s", attempt, START_ATTEMPTS, error)
            if attempt == START_ATTEMPTS:
                raise FewstepError(
                    f"Ray cannot be started on this machine: {error}. Is it overloaded, or out of memory or of space "
                    "in /tmp/ray? Its own words are in /tmp/ray/session_latest/logs"
                ) from error


@contextmanager
def _loopback_only() -> Iterator[None]:
    """Let a Ray started in the block listen on 127.0.0.1 alone.

    Whoever reaches Ray's ports runs code as this user. Ray replaces 127.0.0.1 by the machine's address, except under
    the switch that it uses itself on macOS and Windows.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _preemption_watched(watched: bool) -> Iterator[None]:
    """Let Ray Train watch for nodes that are taken away, or not, in the block; what the environment says goes before.

    No machine is taken away from under a Ray of one machine, and the watcher is a process that wakes 200 times a second
    beside the training.
    """
    if ENABLE_PREEMPTION_WATCHER_ENV_VAR in os.environ:
        yield
        return
    os.environ[ENABLE_PREEMPTION_WATCHER_ENV_VAR] = "1" if watched else "0"
    try:
        yield
    finally:
        os.environ.pop(ENABLE_PREEMPTION_WATCHER_ENV_VAR, None)


@contextmanager
def _signals_as_before() -> Iterator[None]:
    """Undo Ray's signal handlers at the end of the block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


#: Rows that a CPU worker gets at least where their number is ours to choose: with fewer, averaging the gradients takes
#: longer than computing them.
_MIN_ROWS_PER_CPU_WORKER = 16


@dataclass(frozen=True)
class WorkerGroup:
    """How many workers a training has, and what each of them takes.

    `num_workers` is their number or, where it changes with the cluster, the fewest and the most.
    """

    num_workers: int | tuple[int, int]
    cpus: int
    use_gpu: bool


def worker_group(
    settings: ClusterSettings, *, global_batch_size: int, num_streams: int | None = None, what: str = "training"
) -> WorkerGroup:
    """Return the workers of a training on the connected cluster.

    `num_workers: auto` takes one worker for each GPU; on CPUs one for each core rather than one with many threads: two
    processes of one thread each train up to twice as fast as one of two, whose threads wait for each other after every
    operation.

    Args:
        settings: what the recipe says.
        global_batch_size: rows of an update. Workers whose number is fixed must share them equally: whoever chooses it
            can choose one of which none waits for another.
        num_streams: canonical streams of the data, likewise; None: any number of workers can read it.
        what: name of the training, for messages.

    Raises:
        FewstepError: the workers do not fit into a cluster that cannot grow, or cannot share the batch.
    """
    resources = ray.cluster_resources()
    cluster_cpus, cluster_gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
    use_gpu = cluster_gpus > 0 if settings.use_gpu == "auto" else settings.use_gpu
    shareable = num_streams or global_batch_size
    asked = settings.num_workers
    if isinstance(asked, ElasticWorkers):
        if asked.max > shareable:
            raise FewstepError(
                f"{what}: cluster.num_workers={asked} may be more than the {shareable} "
                f"{'rows of global_batch_size' if num_streams is None else 'streams of stream.num_streams'}, of which "
                f"each worker needs one; set max to at most {shareable}"
            )
        assert settings.cpus_per_worker is not None  # the settings check it
        group = WorkerGroup((asked.min, asked.max), settings.cpus_per_worker, use_gpu)
        fewest, at_least = asked.min, "at least "
    else:
        fewest = _fixed_number(settings, global_batch_size, shareable, cluster_cpus, cluster_gpus if use_gpu else None)
        at_least = ""
        if global_batch_size % fewest:
            raise FewstepError(
                f"{what}: global_batch_size={global_batch_size} cannot be shared equally by "
                f"cluster.num_workers={fewest}; take a multiple, or {{min, max}} workers, whose shares may differ"
            )
        group = WorkerGroup(fewest, settings.cpus_per_worker or max(1, cluster_cpus // fewest), use_gpu)
    if settings.address is None and "RAY_ADDRESS" not in os.environ:
        cpus = group.cpus
        if cpus * fewest > cluster_cpus:
            raise FewstepError(
                f"cluster.num_workers={asked} with {cpus} CPU each need {at_least}{cpus * fewest} CPUs and this Ray "
                f"has {cluster_cpus}; take fewer workers, fewer cpus_per_worker, or set "
                f"cluster.num_cpus={cpus * fewest}"
            )
        if use_gpu and fewest > cluster_gpus:
            raise FewstepError(
                f"cluster.num_workers={asked} need a GPU each and this Ray has {cluster_gpus}; "
                "take as many workers as there are GPUs, or set cluster.use_gpu=false"
            )
    return group


def _fixed_number(
    settings: ClusterSettings, global_batch_size: int, shareable: int, cpus: int, gpus: int | None
) -> int:
    """Return the number of workers that is asked for, or with auto the best for a cluster of so many CPUs and GPUs."""
    if isinstance(settings.num_workers, int):
        return settings.num_workers
    cores = cpus // (settings.cpus_per_worker or 1)
    most = min(cores, global_batch_size // _MIN_ROWS_PER_CPU_WORKER if gpus is None else gpus)
    shared = math.gcd(global_batch_size, shareable)
    return max(number for number in range(1, max(1, most) + 1) if shared % number == 0)
