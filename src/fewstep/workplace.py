"""The object store and MLflow that commands work on: opened, started if embedded, and stopped again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fewstep.recipe import Recipe
from fewstep.storage import Storage, StorageSettings, open_storage
from fewstep.tracking.fetch import fetch_model
from fewstep.tracking.settings import TrackingSettings
from fewstep.tracking.tracker import Tracker


@dataclass(frozen=True)
class Workplace:
    """The object store and MLflow, open."""

    storage: Storage
    tracker: Tracker


@contextmanager
def open_workplace(recipe: Recipe | None = None) -> Iterator[Workplace]:
    """Open the store and MLflow of a recipe (without one the embedded ones), starting what is embedded; what was
    started is stopped at the end.

    Raises:
        StorageError: the store cannot be reached, the bucket is missing or the credentials are wrong.
        TrackingError: MLflow cannot be reached.
    """
    with open_storage(recipe.storage if recipe else StorageSettings()) as storage:
        storage.check()
        yield Workplace(storage, Tracker.open(recipe.tracking if recipe else TrackingSettings(), storage))


@contextmanager
def open_model(uri: str, recipe: Recipe | None = None) -> Iterator[Path]:
    """Give a local folder of a MODEL; store and MLflow are opened only when the URI needs them.

    Raises:
        ModelError: there is no such model.
    """
    if uri.startswith(("s3://", "models:")):
        with open_workplace(recipe) as workplace:
            yield fetch_model(uri, storage=workplace.storage, tracking=workplace.tracker)
    else:
        yield fetch_model(uri)
