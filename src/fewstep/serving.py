"""Serving on this machine: store, MLflow, Ray and the service, started together and stopped together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from fewstep.errors import ModelError
from fewstep.recipe import Recipe
from fewstep.serve.server import RunningServer, run_server
from fewstep.serve.settings import ServeSettings
from fewstep.tracking.fetch import ASSETS
from fewstep.tracking.registry import Registry
from fewstep.tracking.settings import TrackingSettings, fewstep_home
from fewstep.tracking.tracker import Tracker
from fewstep.train.cluster import local_ray
from fewstep.train.settings import ClusterSettings
from fewstep.workplace import open_workplace

#: Packaged students in the order of preference; the first that is there is the default of `fewstep serve`.
_PACKAGED = ("emoji-student-4", "emoji-student-2", "emoji-student-1", "emoji-student-8")
_DEMO_NAME = "fewstep-demo"


def default_models(recipe: Recipe | None = None) -> tuple[str, ...]:
    """Return what is served when no model is named: the recipe's (or the demo's) champion and its siblings for other
    step counts, as far as there are any, else the students that ship with fewstep.

    Raises:
        ModelError: there is neither.
    """
    tracking = recipe.tracking if recipe else TrackingSettings()
    database = tracking.sqlite_path()
    if database is not None and not database.exists():
        return _shipped_students()
    name = recipe.register_.name if recipe else _DEMO_NAME
    registry = Registry(Tracker.open(tracking))
    names = [name, *sorted(other for other in registry.names() if other.startswith(f"{name}-"))]
    champions = [f"models:/{each}@champion" for each in names if registry.get_champion(each) is not None]
    # The demo's short training may leave only a sibling good enough: then the shipped students show more.
    of_the_demo = recipe is None and f"models:/{name}@champion" not in champions
    return _shipped_students() if of_the_demo or not champions else tuple(champions)


def _shipped_students() -> tuple[str, ...]:
    found = tuple(f"asset:{name}" for name in _PACKAGED if (ASSETS / name).is_dir())
    if not found:
        raise ModelError(
            f"there is no student to serve: {fewstep_home()} has no registered champion. Run `make demo` first, or "
            "name a MODEL, for example models:/NAME@candidate"
        )
    return found


@contextmanager
def served(
    models: Sequence[str],
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    recipe: Recipe | None = None,
    announce: Callable[[str], None] = print,
) -> Iterator[RunningServer]:
    """Serve the models for the length of the block; everything that was started is stopped at its end.

    Raises:
        ModelError: a model cannot be loaded.
        ServeError: the port is taken.
    """
    with ExitStack() as stack:
        storage, tracking = None, None
        if any(uri.startswith(("s3://", "models:")) for uri in models):
            workplace = stack.enter_context(open_workplace(recipe))
            storage, tracking = workplace.storage, workplace.tracker.settings
        stack.enter_context(local_ray(recipe.cluster if recipe else ClusterSettings()))
        settings = ServeSettings(models=tuple(models), host=host, port=port)
        server = run_server(settings, storage=storage, tracking=tracking, announce=announce)
        stack.callback(server.stop)
        yield server
