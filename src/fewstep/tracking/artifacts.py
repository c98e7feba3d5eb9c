"""Files of runs and models: through our storage where they lie in S3, through MLflow where it keeps them itself."""

from __future__ import annotations

import tempfile
from pathlib import Path

from fewstep.errors import TrackingError
from fewstep.storage import Storage, join
from fewstep.tracking.connection import failures
from fewstep.tracking.settings import TrackingSettings


class Artifacts:
    """Writes and reads files below an artifact location such as ``s3://bucket/mlflow/…`` or ``mlflow-artifacts:/…``."""

    def __init__(self, settings: TrackingSettings, storage: Storage | None) -> None:
        self._settings = settings
        self._storage = storage

    def write_file(self, location: str, name: str, data: bytes) -> None:
        """Writes `data` as the file `name` (``folder/file.ext``) below `location`. StorageError or TrackingError."""
        if location.startswith("s3://"):
            self._store(location).write_bytes(join(location, name), data)
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            self.write_folder(location, folder)

    def write_folder(self, location: str, folder: str | Path) -> None:
        """Writes all files of the local `folder` below `location`. StorageError or TrackingError."""
        if location.startswith("s3://"):
            self._store(location).upload_folder(folder, location)
            return
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        with failures(f"write {folder} to {location}", self._settings):
            repository = get_artifact_repository(location, tracking_uri=self._settings.tracking_uri())
            repository.log_artifacts(str(folder))

    def read_folder(self, location: str, folder: Path) -> None:
        """Copies everything below `location` into the local `folder`. StorageError or TrackingError."""
        if location.startswith("s3://"):
            self._store(location).download_folder(location, folder)
            return
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        with failures(f"read {location}", self._settings):
            folder.mkdir(parents=True, exist_ok=True)
            repository = get_artifact_repository(location, tracking_uri=self._settings.tracking_uri())
            repository.download_artifacts("", dst_path=str(folder))

    def _store(self, location: str) -> Storage:
        if self._storage is None:
            raise TrackingError(
                f"{location}: MLflow keeps these files in S3, but no object store is open. Give the storage section of "
                "the recipe that reaches this bucket."
            )
        return self._storage
