"""Runs in MLflow: one parent run a workflow, one child a stage and a rung."""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import io
import json
import logging
import re
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from fewstep.errors import StorageError, TrackingError
from fewstep.storage import Storage, join
from fewstep.tracking.artifacts import Artifacts
from fewstep.tracking.connection import connect, failures, is_permanent, without_password
from fewstep.tracking.figures import TrackerHandle
from fewstep.tracking.lineage import lineage
from fewstep.tracking.settings import TrackingSettings, fewstep_home

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from PIL.Image import Image

logger = logging.getLogger(__name__)
KEY_TAG = "fewstep.key"
_MAX_VALUE = 6000  # characters that MLflow keeps of a parameter
_PER_REQUEST = 100  # parameters or tags that MLflow takes in one request


def flatten(values: Mapping[str, Any] | BaseModel) -> dict[str, str]:
    """Nested settings as MLflow parameters: ``{"a": {"b": 1}}`` gives ``{"a.b": "1"}``; lists become JSON.

    A value longer than 6000 characters is cut and ends with the SHA-256 of the whole.
    """
    if isinstance(values, BaseModel):
        values = values.model_dump(mode="json")
    flat: dict[str, str] = {}
    for key, value in values.items():
        name = re.sub(r"[^A-Za-z0-9_.:/ -]", "_", str(key))
        if isinstance(value, (Mapping, BaseModel)) and (isinstance(value, BaseModel) or value):
            flat |= {f"{name}.{below}": text for below, text in flatten(value).items()}
            continue
        text = json.dumps(value, default=str) if isinstance(value, (list, tuple, Mapping)) else str(value)
        if len(text) > _MAX_VALUE:
            mark = f"… sha256:{hashlib.sha256(text.encode()).hexdigest()}"
            text = text[: _MAX_VALUE - len(mark)] + mark
        flat[name] = text
    return flat


class Run:
    """One MLflow run that is being written.

    What it cannot write while MLflow or the store is out of reach is counted in `lost` and logged; the work goes on.
    """

    def __init__(self, tracker: Tracker, run_id: str, artifact_uri: str) -> None:
        self.id = run_id
        self.tracker = tracker
        self.artifact_uri = artifact_uri
        self.lost = 0
        self._handle = TrackerHandle(tracker.settings, run_id)

    def handle(self) -> TrackerHandle:
        """A picklable sender of figures for other processes (Ray workers)."""
        return TrackerHandle(self.tracker.settings, self.id)

    def log_params(self, params: Mapping[str, Any] | BaseModel) -> None:
        """Writes nested settings as parameters.

        MLflow keeps the first value of a parameter for good. Where a resumed run comes with another one, that goes into
        the tag ``fewstep.changed.NAME``.
        """
        from mlflow.entities import Param

        with self._spared("log parameters"):
            flat = flatten(params)
            before = self.tracker.client.get_run(self.id).data.params
            changed = {name: text for name, text in flat.items() if name in before and before[name] != text}
            self.set_tags({f"fewstep.changed.{name}": text for name, text in changed.items()})
            new = [Param(name, text) for name, text in flat.items() if name not in before]
            for start in range(0, len(new), _PER_REQUEST):
                self.tracker.client.log_batch(self.id, params=new[start : start + _PER_REQUEST])

    def log_metrics(self, figures: dict[str, float], step: int = 0) -> None:
        """Hands over figures of `step`; returns at once (they are sent in the background)."""
        self._handle.metrics(figures, step)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Sets or replaces tags."""
        from mlflow.entities import RunTag

        rows = [RunTag(name, str(value)) for name, value in tags.items()]
        with self._spared("set tags"):
            for start in range(0, len(rows), _PER_REQUEST):
                self.tracker.client.log_batch(self.id, tags=rows[start : start + _PER_REQUEST])

    def log_image(self, image: Image, name: str, step: int = 0) -> None:
        """Keeps a picture under `name` and `step`, where MLflow's page shows it as a series over the steps."""
        # The naming is that of MlflowClient.log_image (mlflow/tracking/client.py, 3.17), which its page looks for.
        stem = f"images/{name.replace('/', '~')}+step+{step}+timestamp+{int(time.time() * 1000)}+{uuid.uuid4()}"
        small = image.convert("RGB")
        small.thumbnail((256, 256))
        with self._spared(f"log picture {name}"):
            artifacts = self.tracker.artifacts
            artifacts.write_file(self.artifact_uri, f"{stem}.png", _encoded(image, "PNG"))
            artifacts.write_file(self.artifact_uri, f"{stem}+compressed.webp", _encoded(small, "WEBP"))
            self.set_tags({"mlflow.loggedImages": "True"})

    def log_artifact(self, path: str | Path, folder: str = "") -> None:
        """Keeps a file, or a folder with all below it, in `folder` of the run's artifacts."""
        path = Path(path)
        if not path.exists():
            raise TrackingError(f"log artifact {path}: there is no such file or folder.")
        with self._spared(f"log artifact {path}"):
            if path.is_dir():
                self.tracker.artifacts.write_folder(join(self.artifact_uri, folder, path.name), path)
            else:
                self.tracker.artifacts.write_file(self.artifact_uri, str(Path(folder) / path.name), path.read_bytes())

    def _close(self, status: str) -> None:
        self.lost += self._handle.close()
        with self._spared(f"end the run as {status}"):
            self.tracker.client.set_terminated(self.id, status)
        if self.lost:
            logger.warning(
                "run %s: %d records are missing in MLflow; the warnings above say which.", self.id, self.lost
            )

    @contextlib.contextmanager
    def _spared(self, what: str) -> Iterator[None]:
        try:
            with failures(f"{what} of run {self.id}", self.tracker.settings):
                yield
        except (TrackingError, StorageError) as error:
            if is_permanent(error):
                raise
            self.lost += 1
            logger.warning("%s The work goes on without this record.", error)


class Tracker:
    """The open connection to one MLflow experiment."""

    def __init__(
        self, client: MlflowClient, experiment_id: str, *, settings: TrackingSettings, storage: Storage | None
    ) -> None:
        self.client = client
        self.experiment_id = experiment_id
        self.settings = settings
        self.uri = settings.tracking_uri()
        self.artifacts = Artifacts(settings, storage)

    @classmethod
    def open(cls, settings: TrackingSettings, storage: Storage | None = None) -> Tracker:
        """Connects and makes the experiment if it is new, with its files below ``<storage root>/mlflow``.

        TrackingError when MLflow cannot be reached: better before the work than after it.
        """
        settings = settings.resolved()
        client = connect(settings)
        with failures(f"open experiment {settings.experiment!r}", settings):
            experiment = client.get_experiment_by_name(settings.experiment)
            if experiment is None:
                location = _new_location(settings, storage)
                experiment_id = _create_experiment(client, settings.experiment, location)
            elif experiment.lifecycle_stage != "active":
                raise TrackingError(
                    f"tracking.experiment is {settings.experiment!r}, which was deleted in MLflow at "
                    f"{without_password(settings.tracking_uri())}. Restore it there, or choose another name."
                )
            else:
                experiment_id = experiment.experiment_id
        return cls(client, experiment_id, settings=settings, storage=storage)

    @contextlib.contextmanager
    def run(
        self, name: str, *, key: str, parent: str | None = None, tags: Mapping[str, str] | None = None
    ) -> Iterator[Run]:
        """A run named `name` below the run `parent`; FINISHED at the end of the block, FAILED after an exception.

        `key` names the piece of work: the same key goes on in the same MLflow run. It keeps the lineage that it began
        with; where it goes on with other code, that is in the tag ``fewstep.resumed.NAME``. TrackingError when it
        cannot begin.
        """
        code = lineage()
        all_tags = {**(tags or {}), KEY_TAG: key}
        if parent is not None:
            all_tags["mlflow.parentRunId"] = parent
        with failures(f"begin run {name!r}", self.settings):
            run_id = self.find_run(key)
            if run_id is None:
                source = {"mlflow.source.name": "fewstep", "mlflow.source.type": "LOCAL", "mlflow.user": _user()}
                begun = self.client.create_run(self.experiment_id, run_name=name, tags=code | all_tags | source)
            else:
                self.client.update_run(run_id, status="RUNNING", name=name)
                begun = self.client.get_run(run_id)
        run = Run(self, begun.info.run_id, begun.info.artifact_uri)
        if run_id is not None:
            run.set_tags(all_tags | _resumed(code, begun.data.tags))
        try:
            yield run
        except BaseException as error:
            run._close("FAILED" if isinstance(error, Exception) else "KILLED")
            raise
        run._close("FINISHED")

    def find_run(self, key: str) -> str | None:
        """The id of the newest run of `key` in this experiment; None when there is none."""
        if "'" in key or not key:
            raise TrackingError(f"run key {key!r}: a key is not empty and has no single quote. Rename the run.")
        found = self.client.search_runs(
            [self.experiment_id],
            filter_string=f"tags.`{KEY_TAG}` = '{key}'",
            max_results=1,
            order_by=["attributes.start_time DESC"],
        )
        return found[0].info.run_id if found else None


def _resumed(code: Mapping[str, str], before: Mapping[str, str]) -> dict[str, str]:
    """Tags that name the code that a run goes on with, where it is not what it began with or that is not known."""
    ours = {name.removeprefix("fewstep."): text for name, text in code.items() if name.startswith("fewstep.")}
    return {f"fewstep.resumed.{name}": text for name, text in ours.items() if before.get(f"fewstep.{name}") != text}


def _new_location(settings: TrackingSettings, storage: Storage | None) -> str | None:
    if storage is not None:
        return join(storage.root, "mlflow", settings.experiment)
    # Without a location MLflow would write to the current folder on sqlite; a server has its own default.
    return str(fewstep_home() / "mlartifacts") if settings.sqlite_path() is not None else None


def _create_experiment(client: MlflowClient, name: str, location: str | None) -> str:
    from mlflow.exceptions import MlflowException

    try:
        return client.create_experiment(name, artifact_location=location)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        made_by_another = client.get_experiment_by_name(name)
        if made_by_another is None:
            raise
        return str(made_by_another.experiment_id)


def _encoded(image: Image, form: str) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=form)
    return stream.getvalue()


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container whose user id has no name
        return "unknown"
