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
import torch.distributed as dist
from ray.train import CheckpointUploadMode
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fewstep.errors import FewstepError, StorageError
from fewstep.storage import join
from fewstep.storage.faults import full_error, is_full
from fewstep.train.board import BoardLogHandler
from fewstep.train.checkpoint import TrainState, load_state, save_state, scratch_folder
from fewstep.train.in_process import make_result
from fewstep.train.job import TrackerHandle, TrainJob
from fewstep.train.loop import train

if TYPE_CHECKING:
    from fewstep.storage import Storage

RESULT_NAME = "result.json"
_TICK_EVERY_S = 0.5


@dataclass(frozen=True, kw_only=True)
class WorkerTask:
    """What each worker is told; travels pickled, and is opened after the environment is set."""

    job: TrainJob
    storage: Storage
    uri: str
    tracker: TrackerHandle | None


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
    batch_size = job.settings.global_batch_size
    return FewstepError(
        f"{job.name}: the GPU's memory is full ({str(error).splitlines()[0]}). A worker has {batch_size // world_size} "
        f"of global_batch_size={batch_size} at once, with precision: {job.settings.precision}. Take more workers "
        "(cluster.num_workers), a smaller global_batch_size, or bfloat16"
    )


def _log_to(board: Any) -> None:
    logger = logging.getLogger("fewstep")
    logger.handlers = [handler for handler in logger.handlers if not isinstance(handler, BoardLogHandler)]
    logger.addHandler(BoardLogHandler(board))
    logger.setLevel(logging.INFO)


class RayHost:
    """The loop's surroundings inside Ray Train."""

    def __init__(self, task: WorkerTask, board: Any) -> None:
        context = ray.train.get_context()
        self.rank = context.get_world_rank()
        self.world_size = context.get_world_size()
        self.device = ray.train.torch.get_device()
        self.checkpoint_uri = join(task.uri, "checkpoints")
        self.scratch = scratch_folder()
        self._board = board
        self._tracker = task.tracker if self.rank == 0 else None
        self._ticked_s = 0.0
        self._uploading: list[Path] = []

    def load(self) -> TrainState | None:
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return None
        # A folder of our own: Ray's shared one is named after the path and can hold leftovers of a killed process.
        folder = Path(self.scratch, "resumed")
        checkpoint.to_directory(folder)
        state = load_state(str(folder))
        shutil.rmtree(folder)  # the mapping keeps the content until it is let go
        return state

    def parallel(self, network: nn.Module) -> nn.Module:
        gc.collect()
        gc.freeze()  # what is loaded now stays: the collector need not walk through it again in every step
        if self.world_size == 1:
            return network
        device_ids = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(
            network, device_ids=device_ids, broadcast_buffers=False, gradient_as_bucket_view=True
        )

    def gather(self, value: Any) -> list[Any]:
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def mean(self, value: Tensor) -> Tensor:
        if self.world_size > 1:
            dist.all_reduce(value)
            value /= self.world_size
        return value

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

    def ticked(self, updates_done: int) -> None:
        now_s = time.monotonic()
        if self.rank == 0 and now_s - self._ticked_s >= _TICK_EVERY_S:
            self._ticked_s = now_s
            self._board.progress.remote(updates_done, None)

    def logged(self, figures: dict[str, float], *, updates_done: int) -> None:
        if self.rank != 0:
            return
        self._board.progress.remote(updates_done, figures)
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
