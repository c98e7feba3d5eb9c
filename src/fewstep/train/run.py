"""The driver's side of a training: skip it if it is done, run it on Ray, say what went wrong in words."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray
import ray.cloudpickle
from ray.exceptions import RayError
from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.config import ScalingConfig  # type checkers see an older one in ray.train
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from fewstep.errors import CheckpointError, FewstepError, StorageError
from fewstep.storage import join
from fewstep.storage.faults import is_full
from fewstep.train.board import Notes, make_board
from fewstep.train.cluster import WorkerGroup, local_ray, worker_group
from fewstep.train.device import free_device_memory
from fewstep.train.job import TrackerHandle, TrainJob, TrainResult
from fewstep.train.lease import lease
from fewstep.train.progress import ProgressPrinter, Watcher
from fewstep.train.settings import ClusterSettings, wrong_micro_batch
from fewstep.train.worker import RESULT_NAME, WorkerTask, run_worker

if TYPE_CHECKING:
    from fewstep.storage import Storage

logger = logging.getLogger(__name__)


def run_training(
    job: TrainJob, *, cluster: ClusterSettings, storage: Storage, uri: str, tracker: TrackerHandle | None
) -> TrainResult:
    """Run a training on Ray Train to its end and return its result; at once if it is done already.

    Under `uri` (in the store) lie `checkpoints/`, `export/` and, written last, `result.json`. A worker that dies is
    started again up to `cluster.max_failures` times; after the death of this process or of the machine, the same call
    goes on from the last checkpoint. Another process that runs the same training is waited for.

    Raises:
        CheckpointError: what lies under `uri` is of another recipe, or damaged.
        FewstepError: what a worker ran into that the user can mend, as it was raised there.
    """
    result = finished_result(job, storage=storage, uri=uri)
    if result is not None:
        _drop_checkpoints(job, storage, uri)  # a process that was killed just after its end left them
        return result
    with lease(join(uri, "lease.json"), storage=storage, what=job.name):
        result = finished_result(job, storage=storage, uri=uri)  # by whom this process had to wait for
        if result is None:
            _run(job, cluster=cluster, storage=storage, uri=uri, tracker=tracker)
            result = finished_result(job, storage=storage, uri=uri)
    if result is None:
        raise FewstepError(
            f"{job.name}: the training was stopped before its end; its last checkpoint is in "
            f"{join(uri, 'checkpoints')}. Run the same command again to go on from there"
        )
    _drop_checkpoints(job, storage, uri)
    return result


def _run(job: TrainJob, *, cluster: ClusterSettings, storage: Storage, uri: str, tracker: TrackerHandle | None) -> None:
    free_device_memory()  # of the driver's own work: a worker on the same GPU may need all of it
    with local_ray(cluster):
        board = make_board()
        trainer = _trainer(job, cluster=cluster, storage=storage, uri=uri, tracker=tracker, board=board)
        with _progress(job, board), _restored_interrupt():
            _fit(trainer, job, board=board, uri=uri, cluster=cluster)


def _drop_checkpoints(job: TrainJob, storage: Storage, uri: str) -> None:
    if not job.settings.keep_checkpoints_when_done:
        storage.delete(join(uri, "checkpoints"), recursive=True)


def finished_result(job: TrainJob, *, storage: Storage, uri: str) -> TrainResult | None:
    """Return the stored result of a training that is done, or None.

    Raises:
        CheckpointError: it is the result of another recipe.
    """
    result_uri = join(uri, RESULT_NAME)
    if not storage.exists(result_uri):
        return None
    stored = storage.read_json(result_uri)
    if stored.get("fingerprint") != job.fingerprint:
        raise CheckpointError(
            f"{result_uri} is the result of a recipe with fingerprint {stored.get('fingerprint')}, and this recipe has "
            f"{job.fingerprint}. Use another run name, or remove {uri} to train from the start"
        )
    return TrainResult.from_json(stored.get("result", {}), uri=result_uri)


def trained_by(*, storage: Storage, uri: str) -> dict[str, str]:
    """Return the tags of the job whose result lies under `uri`: those of the process that trained it."""
    tags: dict[str, str] = storage.read_json(join(uri, RESULT_NAME)).get("tags", {})
    return tags


def _trainer(
    job: TrainJob,
    *,
    cluster: ClusterSettings,
    storage: Storage,
    uri: str,
    tracker: TrackerHandle | None,
    board: Any,
) -> TorchTrainer:
    group = worker_group(
        cluster, global_batch_size=job.settings.global_batch_size, num_streams=job.num_streams, what=job.name
    )
    _check_micro_batch(job, group)
    filesystem, root_path = storage.arrow_filesystem()
    task = WorkerTask(
        job=replace(job, flops=None),
        storage=storage,
        uri=uri,
        tracker=tracker,
        bounds=None if isinstance(group.num_workers, int) else group.num_workers,
        flops=_flops(job) if group.use_gpu else None,
    )
    resources = {"CPU": float(group.cpus)} | ({"GPU": 1.0} if group.use_gpu else {})
    return TorchTrainer(
        run_worker,
        # Credentials go through Ray's object store: a runtime environment would be written into Ray's logs.
        train_loop_config={
            "environment": storage.environment(),
            "task": ray.cloudpickle.dumps(task),
            "board": board,
            "cpus": group.cpus,
        },
        torch_config=TorchConfig(timeout_s=cluster.collective_timeout_s),
        scaling_config=ScalingConfig(
            num_workers=group.num_workers,
            use_gpu=group.use_gpu,
            resources_per_worker=resources,
            elastic_resize_monitor_interval_s=cluster.resize_every_s,
        ),
        run_config=RunConfig(  # type: ignore[call-arg]  # Ray shows type checkers the class of its older API
            name="checkpoints",
            storage_path=_arrow_path(uri, root=storage.root, root_path=root_path),
            storage_filesystem=filesystem,
            # By Ray's default a node that is taken away costs none of these tries, and there is no end to its own.
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=job.settings.num_checkpoints_to_keep),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )


def _check_micro_batch(job: TrainJob, group: WorkerGroup) -> None:
    """Refuse a micro-batch that leaves a rest in every update, where the number of workers is known."""
    size = job.settings.micro_batch_size
    if size is not None and isinstance(group.num_workers, int):
        rows = job.settings.global_batch_size // group.num_workers
        if rows % size:
            raise FewstepError(wrong_micro_batch(size, rows))


def _flops(job: TrainJob) -> float | None:
    """Return the FLOPs of a sample; None, said once, where they cannot be counted."""
    if job.flops is None:
        return None
    try:
        return job.flops()
    except Exception as error:  # a figure for those who watch must not end a training
        logger.info("%s: its share of the GPUs' peak (MFU) is not shown: %s", job.name, _last_line(error))
        return None


def _arrow_path(uri: str, *, root: str, root_path: str) -> str:
    if uri != root and not uri.startswith(root + "/"):
        raise FewstepError(
            f"training output {uri} does not lie under the store {root}; checkpoints are kept in the store, "
            "so name a place below it"
        )
    return root_path + uri.removeprefix(root)


@contextlib.contextmanager
def _progress(job: TrainJob, board: Any) -> Iterator[None]:
    printer = ProgressPrinter(
        name=job.name, updates=job.settings.updates, samples_per_update=job.settings.global_batch_size
    )

    def look() -> None:
        notes: Notes = ray.get(board.read.remote())
        for name, level, message in notes.log_lines:
            logging.getLogger(name).log(level, "%s", message)
        if notes.updates_done is not None:
            printer.show(notes.updates_done, notes.figures)

    with Watcher(look):
        yield
    printer.close()


@contextlib.contextmanager
def _restored_interrupt() -> Iterator[None]:
    """Undo the handler that Ray Train sets for Ctrl-C and leaves behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _fit(trainer: TorchTrainer, job: TrainJob, *, board: Any, uri: str, cluster: ClusterSettings) -> None:
    try:
        trainer.fit()
    except (TrainingFailedError, RayError) as error:
        failure: FewstepError | None = ray.get(board.failure.remote())
        raise (failure or _in_words(error, job, uri=uri, cluster=cluster) or error) from error
    failure = ray.get(board.failure.remote())
    if failure is not None:
        raise failure


def _in_words(error: Exception, job: TrainJob, *, uri: str, cluster: ClusterSettings) -> FewstepError | None:
    """Return the error that a user can act on, or None for a fault of ours, whose stack must be seen."""
    checkpoints = join(uri, "checkpoints")
    failures: list[Exception] = []
    if isinstance(error, ControllerError):
        failures = [error.controller_failure]  # the controller writes its list of checkpoints into the store
    elif isinstance(error, WorkerGroupError):
        failures = list(error.worker_failures.values())
    for failure in failures:
        if isinstance(failure, FewstepError):
            return failure
    for failure in failures:
        # The workers that lost a peer report a broken connection; what counts is the one that died.
        death = getattr(failure, "health_check_failure", failure)
        if isinstance(death, RayError):
            return FewstepError(
                f"{job.name}: a worker died more than cluster.max_failures={cluster.max_failures} times "
                f"({_last_line(death)}). The usual reason is memory: try a smaller global_batch_size or more workers. "
                f"The last checkpoint is in {checkpoints}; the same command goes on from there"
            )
    for failure in failures:
        if "AWS Error" in str(failure):
            return StorageError(
                f"{job.name}: a checkpoint could not be stored in {checkpoints}: {_last_line(failure)}. "
                "Check that the store answers and has room; the same command goes on from the last checkpoint"
            )
        if is_full(failure):
            return StorageError(
                f"{job.name}: the disk of a worker is full ({_last_line(failure)}). Free some, in TMPDIR, in /tmp/ray "
                f"or in /dev/shm; the same command goes on from the last checkpoint, in {checkpoints}"
            )
    if isinstance(error, ControllerError) and "checkpoint" in str(error).lower():
        return CheckpointError(
            f"{job.name}: the checkpoints in {checkpoints} cannot be used: {_last_line(error)}. "
            f"Remove {checkpoints} to train from the start"
        )
    return None


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
