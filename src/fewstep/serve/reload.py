"""Follows the registry: a version that an alias has moved to is loaded beside the running one and takes over."""

from __future__ import annotations

import logging
import math
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fewstep.errors import FewstepError, ModelError, StorageError, TrackingError
from fewstep.serve.catalog import registered_name
from fewstep.serve.engine import Engine, Student, load_engine, load_student, placement, try_out
from fewstep.serve.settings import ServeSettings
from fewstep.serve.watch import EngineWatch
from fewstep.storage import Storage
from fewstep.tracking.registry import RegisteredModel, Registry, check_uri
from fewstep.tracking.settings import TrackingSettings
from fewstep.tracking.tracker import Tracker

logger = logging.getLogger("fewstep.serve")

_ALIAS = re.compile(r"models:/[^/@]+@[^/@]+")
#: Longest wait in seconds for the next look at a registry that does not answer.
_MOST_PATIENCE_S = 30.0
#: First and longest pause in seconds after a version could not be loaded because the store or memory was away.
_PAUSE_S, _LONGEST_PAUSE_S = 30.0, 600.0
#: What may be better a moment later; any other failure is the version's own.
_PASSING = (StorageError, TrackingError, torch.OutOfMemoryError)


@dataclass
class _Model:
    """One model of the settings: what is served for it, and what is known of its alias."""

    uri: str
    student: Student | None = None
    is_unset: bool = False  # the alias names no version
    refused: str | None = None  # version that could not be served
    clashed: bool = False  # because of the others that are
    try_again_at_s: float = math.inf
    pause_s: float = _PAUSE_S

    @property
    def name(self) -> str:
        return registered_name(self.uri)

    @property
    def version(self) -> str | None:
        return None if self.student is None else self.student.card.version

    def give_up(self, version: str, *, passing: bool, clashed: bool) -> bool:
        """Note that a version cannot be served; whether that was not known of it yet."""
        is_news = self.refused != version
        self.clashed = clashed
        self.pause_s = _PAUSE_S if is_news else min(2 * self.pause_s, _LONGEST_PAUSE_S)
        self.refused = version
        self.try_again_at_s = time.monotonic() + self.pause_s if passing else math.inf
        return is_news

    def forgive(self) -> None:
        self.refused, self.clashed = None, False


class _ClashError(ModelError):
    """A version that cannot be served beside the others."""


class Follower:
    """Keeps an engine at the versions that the aliases of its models name.

    Loading and trying out happen in the thread that calls `poll`, beside the thread that draws. What cannot be served
    is refused: the version before stays, an error is logged once, and it is tried again when the alias moves, or after
    a pause where the store, the registry or memory was away.

    Args:
        engine: what draws.
        settings: the service.
        storage, tracking: where models come from.
        watch: told of versions.
    """

    def __init__(
        self,
        engine: Engine,
        settings: ServeSettings,
        *,
        storage: Storage | None,
        tracking: TrackingSettings,
        watch: EngineWatch | None = None,
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._storage = storage
        self._tracking = tracking
        self._watch = watch or EngineWatch()
        self._registry: Registry | None = None
        self._away_since_s: float | None = None
        self._failures = 0
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._models = [_Model(uri) for uri in settings.models]
        self._followed = [model for model in self._models if _ALIAS.fullmatch(model.uri)]
        for model in self._followed:
            check_uri(model.uri)  # or a bad name would count as a registry that is away
        # A waiting service loads through `poll`; otherwise the engine has all models, in the order of the settings.
        loaded = iter(engine.students)
        for model in self._models:
            if not (settings.wait_for_models and model in self._followed):
                model.student = next(loaded)
                self._tell(model)

    def fill(self) -> None:
        """Load what has no student yet; return when every model is served or has no version in the registry.

        Blocks while the registry is away or an alias names a version that cannot be served: a replica that began
        without models beside others that have them would draw all requests to itself, to fail.
        """
        while True:
            pause_s = self.poll()
            if all(model.student is not None or model.is_unset for model in self._models):
                return
            time.sleep(pause_s)

    def start(self) -> None:
        """Poll in a thread of its own, every `reload_every_s` seconds; without aliases there is nothing to do."""
        if self._followed and self._settings.reload_every_s > 0:
            self._thread = threading.Thread(target=self._run, name="reload", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the thread after what it is doing."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        pause_s = self._settings.reload_every_s
        while not self._stopped.wait(pause_s):
            try:
                pause_s = self.poll()
            except Exception:  # the thread must not end; this is a fault of ours
                logger.exception("following the registry failed; it goes on")
                pause_s = _MOST_PATIENCE_S

    def poll(self) -> float:
        """Look once where each alias points, and bring in what has changed; seconds until the next look.

        One call of the registry for each model.
        """
        try:
            if self._registry is None:
                self._registry = Registry(Tracker.open(self._tracking, self._storage))
            found = [(model, self._registry.find(model.uri)) for model in self._followed]
        except TrackingError as error:
            return self._without_registry(error)
        if self._away_since_s is not None:
            logger.info("the registry answers again after %.0f s", time.monotonic() - self._away_since_s)
            self._away_since_s, self._failures = None, 0
        for model, registered in found:
            if registered is None:
                self._without_version(model)
            else:
                self._follow(model, registered)
        return self._settings.reload_every_s

    def _without_registry(self, error: TrackingError) -> float:
        if self._away_since_s is None:
            self._away_since_s = time.monotonic()
            logger.warning("The registry cannot be asked for aliases; what is served stays until it can. %s", error)
        self._failures += 1
        every_s = self._settings.reload_every_s
        return max(every_s, min(every_s * 2 ** min(self._failures, 10), _MOST_PATIENCE_S))

    def _without_version(self, model: _Model) -> None:
        model.forgive()
        if model.is_unset:
            return
        model.is_unset = True
        if model.student is None:
            logger.warning("There is no version of %s yet: it is served as soon as one is promoted.", model.uri)
            self._tell(model)
            self._install()
        else:
            logger.warning("%s names no version any more; %s stays.", model.uri, model.student.card.label)

    def _follow(self, model: _Model, registered: RegisteredModel) -> None:
        model.is_unset = False
        version = str(registered.version)
        if version == model.version:
            model.forgive()
            return
        if version == model.refused and time.monotonic() < model.try_again_at_s:
            return
        began_s, before = time.monotonic(), model.version
        try:
            self._replace(model, registered)
        except Exception as error:
            self._refuse(model, version, error)
            return
        took_s = time.monotonic() - began_s
        told = "is served" if before is None else f"took over from version {before}"
        logger.info("%s: version %s %s, %.1f s after it was noticed", model.uri, version, told, took_s)
        if before is not None:
            self._watch.reloaded(model.name)
        self._tell(model)
        for other in self._models:
            if other.clashed:  # with the version that has gone, perhaps
                other.forgive()

    def _replace(self, model: _Model, registered: RegisteredModel) -> None:
        device, dtype = placement(self._settings)
        # In float32 first: libraries set torch's default precision for the whole process while they read a model in
        # another, and the pictures that are being drawn meanwhile must not change.
        student = load_student(registered.uri, storage=self._storage, tracking=self._tracking, dtype=torch.float32)
        student.parts.to("cpu", dtype)
        self._engine.adopt(student, device)
        try_out(student, max_batch_size=self._settings.max_batch_size)
        before, model.student = model.student, student
        try:
            self._install()
        except ModelError as error:
            model.student = before
            raise _ClashError(str(error)) from error

    def _install(self) -> None:
        self._engine.install(
            [model.student for model in self._models if model.student is not None],
            waiting=[model.uri for model in self._models if model.student is None],
        )

    def _refuse(self, model: _Model, version: str, error: Exception) -> None:
        passing = isinstance(error, _PASSING)
        is_news = model.give_up(version, passing=passing, clashed=isinstance(error, _ClashError))
        self._watch.refused(model.name)
        stays = "nothing is served for it" if model.student is None else f"{model.student.card.label} stays"
        again = f"in {model.pause_s:.0f} s" if passing else "when an alias moves"
        say: Callable[..., None] = logger.error if is_news else logger.info
        say(
            "%s: version %s is refused and %s; it is tried again %s. %s",
            model.uri,
            version,
            stays,
            again,
            error if isinstance(error, FewstepError) else f"{type(error).__name__}: {error}",
        )

    def _tell(self, model: _Model) -> None:
        version = model.version or ("0" if model.student is None else None)
        if version is not None:  # a folder has none
            name = model.name if model.student is None else model.student.card.id  # a models:/NAME/3 is NAME there
            self._watch.serves(model.uri, model=name, version=int(version))


def open_engine(
    settings: ServeSettings, *, storage: Storage | None, tracking: TrackingSettings, watch: EngineWatch | None = None
) -> tuple[Engine, Follower]:
    """Return an engine with the models of the settings, and what keeps it at their aliases (not started yet).

    Raises:
        ModelError, StorageError, TrackingError: as `load_engine`; with `wait_for_models`, for models other than
            models:/NAME@ALIAS only.
    """
    uris = [uri for uri in settings.models if not (settings.wait_for_models and _ALIAS.fullmatch(uri))]
    engine = load_engine(settings, storage=storage, tracking=tracking, uris=uris, watch=watch)
    follower = Follower(engine, settings, storage=storage, tracking=tracking, watch=watch)
    if settings.wait_for_models:
        follower.fill()
    return engine, follower
