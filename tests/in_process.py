"""Trainings of stages in this process, for tests that are not about Ray."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ray import cloudpickle

from fewstep.storage import Storage, join
from fewstep.train import run
from fewstep.train.in_process import train_in_process
from fewstep.train.job import TrainJob


@contextmanager
def trainings_in_process(factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let every training in the block run here, in place of Ray's workers, and leave what theirs leaves."""

    def train_here(job: TrainJob, *, storage: Storage, uri: str, **_: Any) -> None:
        job = cloudpickle.loads(cloudpickle.dumps(job))  # as it goes to a worker
        result = train_in_process(job, folder=str(factory.mktemp("training")))
        storage.upload_folder(Path(result.export_uri), join(uri, "export"))
        told = {**result.to_json(), "export_uri": join(uri, "export")}
        storage.write_json(join(uri, "result.json"), {"fingerprint": job.fingerprint, "tags": job.tags, "result": told})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "_run", train_here)
        yield
