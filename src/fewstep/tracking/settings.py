"""Where runs, figures and registered models are kept."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field

from fewstep.errors import TrackingError

_SQLITE = "sqlite:///"


def fewstep_home() -> Path:
    """The absolute folder of local state and caches: $FEWSTEP_HOME, or .fewstep in the current folder."""
    return Path(os.environ.get("FEWSTEP_HOME") or ".fewstep").absolute()


class TrackingSettings(BaseModel):
    """Which MLflow keeps the runs, and how patient fewstep is with it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    uri: str | None = Field(
        None,
        description="MLflow tracking URI (http://host:5000, sqlite:///path.db). None: $MLFLOW_TRACKING_URI, or else "
        "sqlite at $FEWSTEP_HOME/mlflow.db.",
    )
    experiment: str = Field("fewstep", min_length=1, max_length=500, description="MLflow experiment of all runs.")
    timeout_s: float = Field(30.0, gt=0, description="Longest wait in seconds for one answer of an MLflow server.")
    retries: int = Field(3, ge=0, le=10, description="How often one request to an MLflow server is tried again.")
    flush_every_s: float = Field(1.0, gt=0, description="Figures are sent in the background every so many seconds.")
    max_buffered: int = Field(
        200_000,
        ge=1000,
        description="Figures kept while MLflow is out of reach; beyond that the oldest are dropped.",
    )

    def tracking_uri(self) -> str:
        """The URI in force, with an absolute path when it is sqlite. TrackingError for a scheme MLflow cannot use."""
        uri = self.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"{_SQLITE}{fewstep_home() / 'mlflow.db'}"
        scheme = urlsplit(uri).scheme
        if scheme == "sqlite":
            path = uri.removeprefix(_SQLITE)
            if path == uri or not path or path == ":memory:":
                raise TrackingError(f"tracking.uri is {uri!r}: sqlite needs a file. Write sqlite:///folder/mlflow.db.")
            # Ray workers run in other folders, so a relative path would name another file there.
            return f"{_SQLITE}{Path(path).absolute()}"
        if scheme not in ("http", "https", "postgresql", "mysql", "mssql") and "+" not in scheme:
            raise TrackingError(
                f"tracking.uri is {uri!r}: it must begin with http://, https://, sqlite:/// or a database such as "
                "postgresql://. MLflow 3 no longer writes plain folders; sqlite:///mlflow.db is the nearest."
            )
        return uri

    def resolved(self) -> TrackingSettings:
        """The same settings with the URI in force written out, for other processes and machines."""
        return self.model_copy(update={"uri": self.tracking_uri()})

    def sqlite_path(self) -> Path | None:
        """The database file when tracking is on sqlite, else None."""
        uri = self.tracking_uri()
        return Path(uri.removeprefix(_SQLITE)) if uri.startswith(_SQLITE) else None
