"""The same loop without Ray: this process as a worker, checkpoints in a local folder. For benchmarks and tests.

Processes that `torchrun` or the like has joined into a torch.distributed group train together: each makes the same
calls, and the folder is one that all of them see.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from fewstep.train.checkpoint import TrainState, load_state, save_state
from fewstep.train.job import TrainJob, TrainResult
from fewstep.train.loop import Trained, train
from fewstep.train.meters import peak_memory_bytes
from fewstep.train.parallel import Workers

OnLog = Callable[[int, dict[str, float]], None]


class LocalHost(Workers):
    """The loop's surroundings here; with a folder it keeps checkpoints there, without one it keeps none."""

    def __init__(self, *, device: torch.device, folder: str | None, num_to_keep: int, on_log: OnLog | None) -> None:
        super().__init__(device)
        self.checkpoint_uri = f"{folder}/checkpoints" if folder is not None else "memory"
        self._folder = Path(folder, "checkpoints") if folder is not None else None
        self._num_to_keep = num_to_keep
        self._on_log = on_log

    def load(self) -> TrainState | None:
        kept = self._kept()
        return load_state(str(kept[-1])) if kept else None

    def save(self, state: TrainState | None, *, update: int, last: bool) -> None:
        if self._folder is None or state is None:
            return
        unfinished = self._folder / "unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        save_state(state, str(unfinished))
        target = self._folder / f"update-{update:08d}"
        shutil.rmtree(target, ignore_errors=True)
        unfinished.rename(target)
        for old in self._kept()[: -self._num_to_keep]:
            shutil.rmtree(old)

    def must_save(self, updates_done: int) -> bool:
        return False

    def ticked(self, updates_done: int) -> None:
        return

    def logged(self, figures: dict[str, float], *, updates_done: int) -> None:
        if self._on_log is not None:
            self._on_log(updates_done, figures)

    def _kept(self) -> list[Path]:
        return sorted(self._folder.glob("update-*")) if self._folder is not None else []


def train_in_process(
    job: TrainJob,
    *,
    device: torch.device | str = "cpu",
    folder: str | None = None,
    on_log: OnLog | None = None,
) -> TrainResult:
    """Run a training in this process, as its only worker or as one of its torch.distributed group; return its result.

    Args:
        device: where to train.
        folder: for `checkpoints/` and `export/`; None writes neither, and nothing can be resumed.
        on_log: called as on_log(updates_done, figures) after every reading, on every worker.

    Raises:
        FewstepError: as `loop.train`.
    """
    host = LocalHost(
        device=torch.device(device), folder=folder, num_to_keep=job.settings.num_checkpoints_to_keep, on_log=on_log
    )
    trained = train(job, host)
    export = ""
    if folder is not None and host.rank == 0:
        export = str(Path(folder, "export"))
        shutil.rmtree(export, ignore_errors=True)
        Path(export).mkdir(parents=True)
        job.export(trained.network, export)
    return make_result(job, trained, export_uri=export, device=host.device)


def make_result(job: TrainJob, trained: Trained, *, export_uri: str, device: torch.device) -> TrainResult:
    """Return the result of a loop that has ended."""
    seconds = trained.meters.seconds
    return TrainResult(
        export_uri=export_uri,
        updates=job.settings.updates,
        seconds=seconds,
        images_per_second=job.settings.updates * job.settings.global_batch_size / seconds,
        data_wait_share=trained.meters.waited_s / seconds,
        peak_memory_bytes=peak_memory_bytes(device),
        figures=trained.figures,
        resumed_from=trained.resumed_from,
    )
