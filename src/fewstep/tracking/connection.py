"""One quiet MLflow client, and MLflow's failures in words."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sqlite3
from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from filelock import FileLock

from fewstep.errors import TrackingError
from fewstep.tracking.settings import TrackingSettings

if TYPE_CHECKING:
    from mlflow import MlflowClient

_PERMANENT = frozenset(
    {"INVALID_PARAMETER_VALUE", "INVALID_STATE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS"}
)

_set_by_us: dict[str, str] = {}


def connect(settings: TrackingSettings) -> MlflowClient:
    """A client of the MLflow that `settings` names; a new sqlite file gets its tables first.

    TrackingError when the folder of the file cannot be made, or when what is installed reaches servers alone. A server
    is not asked yet.
    """
    _quieten(settings)
    from mlflow import MlflowClient

    uri = settings.tracking_uri()
    path = settings.sqlite_path()
    if urlsplit(uri).scheme not in ("http", "https") and find_spec("sqlalchemy") is None:
        raise TrackingError(
            f"tracking.uri is {without_password(uri)!r}, a database, which needs the package mlflow; here is only "
            "mlflow-skinny, as in the serving image, which asks a server. Set tracking.uri or $MLFLOW_TRACKING_URI to "
            "http://HOST:PORT, or pip install mlflow."
        )
    if path is None:
        return MlflowClient(tracking_uri=uri, registry_uri=uri)
    with failures("open MLflow's database", settings):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Two processes that make the tables at the same time would each find half of the other's.
        with FileLock(f"{path}.lock"):
            is_new = not path.exists() or path.stat().st_size == 0
            # MLflow tries a file that cannot be opened again for minutes before it says so.
            with contextlib.closing(sqlite3.connect(path, timeout=20.0)) as probe:
                probe.execute("PRAGMA schema_version")
            client = MlflowClient(tracking_uri=uri, registry_uri=uri)
            if is_new:
                client.search_experiments(max_results=1)
            return client


@contextlib.contextmanager
def failures(what: str, settings: TrackingSettings) -> Iterator[None]:
    """Turns MLflow's and the connection's failures inside the block into a TrackingError that says `what` failed."""
    from mlflow.exceptions import MlflowException

    kinds: tuple[type[Exception], ...] = (MlflowException, sqlite3.Error, OSError, *_database_failures())
    try:
        yield
    except kinds as error:
        raise TrackingError(f"{what}: {_first_line(error)} {_advice(error, settings)}") from error


def is_permanent(error: BaseException) -> bool:
    """True when MLflow refused what was sent, so that sending it again cannot help."""
    cause = error.__cause__ if isinstance(error, TrackingError) else error
    return getattr(cause, "error_code", None) in _PERMANENT


def is_missing(error: BaseException) -> bool:
    """True when MLflow answered that there is no such thing."""
    return getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST"


def without_password(uri: str) -> str:
    """`uri` as it may appear in messages."""
    # Up to the last @: a database's password may have slashes, which end an address's host elsewhere.
    return re.sub(r"(://[^/:@\s]*):\S*@", r"\1:***@", uri)


def _database_failures() -> tuple[type[Exception], ...]:
    # The serving image holds mlflow-skinny, which comes without sqlalchemy.
    if find_spec("sqlalchemy") is None:
        return ()
    from sqlalchemy.exc import SQLAlchemyError

    return (SQLAlchemyError,)


def _quieten(settings: TrackingSettings) -> None:
    # MLflow reads these from the environment only; telemetry is read when it is imported.
    defaults = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(max(1, round(settings.timeout_s))),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(settings.retries),
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "GIT_PYTHON_REFRESH": "quiet",
    }
    for name, value in defaults.items():
        if os.environ.get(name) in (None, _set_by_us.get(name)):  # what the user set stays
            os.environ[name] = _set_by_us[name] = value
    # Its failures reach the user as ours, in words, not as a second stack trace.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    logging.getLogger("alembic").setLevel(logging.WARNING)


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    line = text.splitlines()[0]
    return line if line.endswith(".") else line + "."


def _advice(error: BaseException, settings: TrackingSettings) -> str:
    uri = without_password(settings.tracking_uri())
    if is_permanent(error):
        return f"({uri})"
    if settings.sqlite_path() is not None:
        return f"({uri}) Check that the file can be written and that its disk is not full."
    return f"Is MLflow running at {uri}? Check tracking.uri, or $MLFLOW_TRACKING_URI when tracking.uri is not set."
