"""One Ray Train worker: it runs the loop, with Ray for checkpoints and torch.distributed for the other workers."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.cloudpickle
import ray.train
import ray.train.torch
import torch
from ray.train import CheckpointUploadMode

from fewstep.errors import FewstepError, StorageError
from fewstep.storage import join
from fewstep.storage.faults import full_error, is_full
from fewstep.train.board import BoardLogHandler
from fewstep.train.checkpoint import TrainState, load_state, save_state, scratch_folder
from fewstep.train.gauges import TrainingGauges
from fewstep.train.in_process import make_result
from fewstep.train.job import TrackerHandle, TrainJob
from fewstep.train.loop import train
from fewstep.train.parallel import Workers
from fewstep.train.peak import peak_tflops
from fewstep.train.precision import resolve_precision
from fewstep.train.preemption import PreemptionWatch, is_watched
from fewstep.train.share import share_of

if TYPE_CHECKING:
    from fewstep.storage import Storage

logger = logging.getLogger(__name__)

RESULT_NAME = "result.json"
_TICK_EVERY_S = 0.5


@dataclass(frozen=True, kw_only=True)
class WorkerTask:
    """What each worker is told; travels pickled, and is opened after the environment is set.

    Attributes:
        bounds: the fewest and the most workers, where their number changes with the cluster.
        flops: of one sample in an update; None: not known.
    """

    job: TrainJob
    storage: Storage
    uri: str
    tracker: TrackerHandle | None
    bounds: tuple[int, int] | None = None
    flops: float | None = None


def run_worker(config: dict[str, Any]) -> None:
    """Train, then export and store the result on rank 0. The function that Ray Train calls in every worker.

    Args:
        config: `environment`, `task` (a pickled WorkerTask), `board` (handle), `cpus`.
    """
    os.environ.update(config["environment"])
    board = config["board"]
    if ray.get(board.failure.remote()) is not None:
        return  # restarted after a failure that is the user's to mend: the driver raises it
    _log_to(board)
    torch.set_num_threads(config["cpus"])
    task: WorkerTask = ray.cloudpickle.loads(config["task"])
    host = RayHost(task, board)
    try:
        trained = train(task.job, host)
        gc.unfreeze()
        if host.rank == 0:
            export_uri = join(task.uri, "export")
            with tempfile.TemporaryDirectory(dir=host.scratch) as folder:
                task.job.export(trained.network, folder)
                task.storage.upload_folder(folder, export_uri)
            result = make_result(task.job, trained, export_uri=export_uri, device=host.device)
            # Written last: with it the training counts as done.
            done = {"fingerprint": task.job.fingerprint, "tags": task.job.tags, "result": result.to_json()}
            task.storage.write_json(join(task.uri, RESULT_NAME), done)
    except Exception as raised:
        error = _in_words(raised, task.job, host)
        if error is None:
            host.outlast_preemption()
            raise
        ray.get(board.fail.remote(error))
        if host.world_size > 1:
            raise  # the other workers wait in a collective: only the end of the group frees them
    finally:
        host.close()


def _in_words(error: Exception, job: TrainJob, host: RayHost) -> FewstepError | None:
    """Return the error that a user can act on, or None for one that another try may mend or that is a fault of ours."""
    if isinstance(error, FewstepError):
        return error
    if isinstance(error, torch.OutOfMemoryError):
        return _out_of_memory(error, job, host.world_size)
    # Arrow's errors of a full store; Ray Train tries again, and the driver has words for them.
    if "AWS Error" in str(error) or not is_full(error):
        return None
    full = full_error(what=f"{job.name}: write to {host.scratch}", place="disk", folder=Path(host.scratch))
    return StorageError(
        f"{full} Or set TMPDIR to a larger disk. The same command goes on from the last checkpoint, in "
        f"{host.checkpoint_uri}"
    )


def _out_of_memory(error: BaseException, job: TrainJob, world_size: int) -> FewstepError:
    settings = job.settings
    rows = share_of(job, rank=0, world_size=world_size).rows
    at_once = settings.micro_batch_size or job.rows_of_one_shape or rows
    return FewstepError(
        f"{job.name}: the GPU's memory is full ({str(error).splitlines()[0]}). A worker has {rows} of "
        f"global_batch_size={settings.global_batch_size}, {at_once} of them at once, with "
        f"precision: {settings.precision}, strategy: {settings.strategy} and gradient_checkpointing: "
        f"{str(settings.gradient_checkpointing).lower()}. Take a smaller micro_batch_size, gradient_checkpointing, "
        "bfloat16, ema_device: cpu, or more workers (cluster.num_workers), with strategy: fsdp if the weights alone "
        "do not fit"
    )


def _flops_of_peak(task: WorkerTask, device: torch.device) -> float | None:
    """Return the seconds that a sample would take at one GPU's peak; None: FLOPs or peak are not known."""
    if task.flops is None or device.type != "cuda":
        return None
    peak = peak_tflops(torch.cuda.get_device_name(device), resolve_precision(task.job.settings.precision, device))
    return None if peak is None else task.flops / (peak * 1e12)


def _log_to(board: Any) -> None:
    logger = logging.getLogger("fewstep")
    logger.handlers = [handler for handler in logger.handlers if not isinstance(handler, BoardLogHandler)]
    logger.addHandler(BoardLogHandler(board))
    logger.setLevel(logging.INFO)


class RayHost(Workers):
    """The loop's surroundings inside Ray Train, which has joined the workers into a torch.distributed group."""

    def __init__(self, task: WorkerTask, board: Any) -> None:
        super().__init__(ray.train.torch.get_device())
        self.checkpoint_uri = join(task.uri, "checkpoints")
        self.scratch = scratch_folder()
        self._board = board
        self._tracker = task.tracker if self.rank == 0 else None
        self._job, self._bounds = task.job, task.bounds
        self._gauges = TrainingGauges(task.job.labels, flops_of_peak=_flops_of_peak(task, self.device))
        self._preemption: PreemptionWatch | None = None
        self._ticked_s = 0.0
        self._uploading: list[Path] = []

    def load(self) -> TrainState | None:
        gc.collect()
        gc.freeze()  # what is loaded now stays: the collector need not walk through it again in every step
        checkpoint = ray.train.get_checkpoint()
        state = None if checkpoint is None else self._fetch(checkpoint)
        done = 0 if state is None else state.update
        if self._bounds is not None and self.rank == 0:
            fewest, most = self._bounds
            what = "trains" if state is None else f"goes on from update {done}"
            logger.info("%s: %s with %d of %d…%d workers", self._job.name, what, self.world_size, fewest, most)
        if is_watched():
            self._preemption = PreemptionWatch(self._job.name, first=done, speaks=self.rank == 0)
        return state

    def _fetch(self, checkpoint: ray.train.Checkpoint) -> TrainState:
        # Once a node: SDXL's state is 41 GB. In a folder of our own: Ray's shared one is named after the path and can
        # hold leftovers of a killed process.
        node = ray.get_runtime_context().get_node_id()
        neighbours = [scratch for other, scratch in self.gather((node, self.scratch)) if other == node]
        folder = Path(neighbours[0], "resumed")
        fetches = neighbours[0] == self.scratch
        if fetches:
            arriving = Path(self.scratch, "arriving")
            checkpoint.to_directory(arriving)
            arriving.rename(folder)
        while not folder.exists():  # if who fetches fails, Ray ends this process too
            time.sleep(0.1)
        state = load_state(str(folder))
        self.gather(None)
        if fetches:
            shutil.rmtree(folder)  # the mappings keep the content until they are let go
            logger.info("goes on from update %d; workers that shared the checkpoint: %d", state.update, len(neighbours))
        return state

    def save(self, state: TrainState | None, *, update: int, last: bool) -> None:
        name = f"update-{update:08d}"
        checkpoint = None
        if state is not None:
            self._wait_for_uploads(at_most=1)
            folder = Path(self.scratch, name)
            save_state(state, str(folder))
            self._uploading.append(folder)  # Ray deletes it when it is uploaded
            checkpoint = ray.train.Checkpoint.from_directory(folder)
        ray.train.report(
            {"update": update},
            checkpoint=checkpoint,
            checkpoint_dir_name=name,
            # Reports are taken in order, so that the last one, waited for, also waits for those before.
            checkpoint_upload_mode=CheckpointUploadMode.SYNC if last else CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
        )

    def must_save(self, updates_done: int) -> bool:
        return self._preemption is not None and self._preemption.must_save(updates_done)

    def outlast_preemption(self) -> None:
        """Wait for the end that Ray has announced, if it has: the error at hand may come of it."""
        if self._preemption is not None:
            self._preemption.outlast()

    def ticked(self, updates_done: int) -> None:
        now_s = time.monotonic()
        if self.rank == 0 and now_s - self._ticked_s >= _TICK_EVERY_S:
            self._ticked_s = now_s
            self._board.progress.remote(updates_done, None)

    def logged(self, figures: dict[str, float], *, updates_done: int) -> None:
        if self.rank != 0:
            return
        self._board.progress.remote(updates_done, figures)
        self._gauges.show(figures, updates_done=updates_done)
        if self._tracker is not None:
            self._tracker.metrics(figures, updates_done)

    def close(self) -> None:
        """Wait for figures on their way, and leave nothing on the disk."""
        if self._tracker is not None:
            self._tracker.close()
        shutil.rmtree(self.scratch, ignore_errors=True)

    def _wait_for_uploads(self, *, at_most: int) -> None:
        """Wait while the store is slower than the training, so that waiting checkpoints do not fill the disk."""
        while len(self._uploading) > at_most:
            if self._uploading[0].exists():
                time.sleep(0.05)
            else:
                self._uploading.pop(0)
