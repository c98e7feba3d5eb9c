"""The Ray Serve application: an HTTP deployment in front of engine deployments that batch.

`fewstep.serve.app:build` is the import path for a RayService's serveConfigV2.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import ray.exceptions
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray import serve
from ray.serve import Application
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ReplicaState

from fewstep.errors import RecipeError
from fewstep.serve.api import EngineUnavailableError, QueueFullError, create_api
from fewstep.serve.catalog import Catalog, GeneratedImage, ImageRequest, NotLoadedError
from fewstep.serve.errors import InvalidRequestError
from fewstep.serve.metrics import EngineMetrics, RequestMetrics
from fewstep.serve.settings import ServeSettings
from fewstep.storage import Storage, StorageSettings, store_of_environment
from fewstep.tracking.settings import TrackingSettings, fewstep_home

if TYPE_CHECKING:
    from fewstep.serve.engine import Engine, Student

logger = logging.getLogger("fewstep.serve")

ENGINE = "Engine"
#: Longest wait in seconds for the first answer of an engine that is up.
_CATALOG_TIMEOUT_S = 30.0
#: Age in seconds at which an engine is asked again what it serves, and the longest wait for that.
_CATALOG_AGE_S, _REFRESH_TIMEOUT_S = 2.0, 0.25
#: The same before a request is refused and for /v1/models.
_FRESH_S, _FRESH_TIMEOUT_S = 0.2, 2.0


@serve.deployment(name=ENGINE)
class EngineReplica:
    """One copy of the models on one device. Pictures of concurrent requests run as one batch."""

    def __init__(self, settings: ServeSettings, storage: Storage | None, tracking: TrackingSettings) -> None:
        # Here and not above: the HTTP process shares this module and has no use for torch.
        from fewstep.serve.reload import open_engine

        self.engine: Engine
        self.engine, follower = open_engine(settings, storage=storage, tracking=tracking, watch=EngineMetrics())
        # One thread: the device runs one batch at a time, and the event loop stays free to fill the next one.
        self._device_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        self._batch.set_max_batch_size(settings.max_batch_size)  # type: ignore[attr-defined]
        self._batch.set_batch_wait_timeout_s(settings.batch_wait_timeout_s)  # type: ignore[attr-defined]
        follower.start()

    async def generate(self, request: ImageRequest) -> GeneratedImage:
        """Return one picture; InvalidRequestError before it can take its batch-mates down with it.

        The student is chosen here, so that a version that takes over before the batch runs fails nothing.
        """
        return await self._batch((self.engine.check(request), request))

    @serve.batch
    async def _batch(self, jobs: list[tuple[Student, ImageRequest]]) -> list[GeneratedImage]:
        return await asyncio.get_running_loop().run_in_executor(self._device_thread, self.engine.draw, jobs)

    async def catalog(self) -> Catalog:
        """Return what is served now."""
        return self.engine.catalog

    async def batch_sizes(self) -> dict[int, int]:
        """Return how many network batches of each size have run."""
        return dict(self.engine.batch_sizes)


@serve.deployment(name="Http")
@serve.ingress()
class HttpReplica:
    """Answers HTTP; checks requests, counts them, encodes pictures; the engines draw."""

    def __init__(self, engine: DeploymentHandle, settings: ServeSettings) -> None:
        self._engine = engine
        self._settings = settings
        self._watch = RequestMetrics()
        self._catalog: Catalog | None = None
        self._catalog_at_s = -math.inf
        self._asking: asyncio.Task[None] | None = None

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_api(self, self._settings, self._watch)

    async def catalog(self, *, fresh: bool = False) -> Catalog:
        """Return what one of the engines serves. They follow the registry each by itself, so it is asked again often.

        Asked by use and not by the clock; where the answer is late, as the engines' queue is full, the last one does.
        """
        if self._catalog is None:
            # A handle waits for a replica for ever; while models load, the caller must be told.
            if not await self.ready():
                raise EngineUnavailableError
            try:
                await asyncio.wait_for(asyncio.shield(self._ask()), _CATALOG_TIMEOUT_S)
            except TimeoutError:
                raise EngineUnavailableError from None
        elif time.monotonic() - self._catalog_at_s > (_FRESH_S if fresh else _CATALOG_AGE_S):
            # Under load one request waits for a moment, and none behind it.
            patience_s = _FRESH_TIMEOUT_S if fresh else _REFRESH_TIMEOUT_S if self._asking is None else 0
            await asyncio.wait({self._ask()}, timeout=patience_s)
        assert self._catalog is not None
        return self._catalog

    def _ask(self) -> asyncio.Task[None]:
        """Return the task that asks an engine for its catalog: the one that runs, or a new one."""
        if self._asking is None:
            self._asking = asyncio.create_task(self._ask_engine())
            self._asking.add_done_callback(self._asked)
        return self._asking

    async def _ask_engine(self) -> None:
        catalog: Catalog = await _call(self._engine.catalog)
        self._catalog, self._catalog_at_s = catalog, time.monotonic()

    def _asked(self, task: asyncio.Task[None]) -> None:
        self._asking = None
        if not task.cancelled() and task.exception() is not None:
            logger.info("no engine could be asked what it serves: %r", task.exception())

    async def generate(self, request: ImageRequest) -> GeneratedImage:
        """Return one picture from whichever engine has room."""
        image: GeneratedImage = await _call(self._engine.generate, request)
        if self._catalog is not None and image.model not in {card.label for card in self._catalog.students}:
            self._catalog_at_s = -math.inf  # another version has taken over
        return image

    async def ready(self) -> bool:
        """Return whether an engine replica has finished loading; does not go through the engines' queue."""
        return await asyncio.to_thread(_engine_is_running, serve.get_replica_context().app_name)


def _engine_is_running(app_name: str) -> bool:
    application = serve.status().applications.get(app_name)
    if application is None or ENGINE not in application.deployments:
        return False
    return application.deployments[ENGINE].replica_states.get(ReplicaState.RUNNING, 0) > 0


async def _call(method: Any, *args: Any) -> Any:
    """Return the result of a handle call, with Ray's exceptions turned into ours."""
    response = method.remote(*args)
    try:
        return await response
    except asyncio.CancelledError:
        # The client left, or another picture of its request failed: nobody waits for this one.
        response.cancel()
        raise
    except BackPressureError as error:
        # Caught here and not by a handler of the app: Serve installs its own, which answers text/plain.
        raise QueueFullError from error
    except (DeploymentUnavailableError, ray.exceptions.RayActorError) as error:
        raise EngineUnavailableError from error
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, InvalidRequestError | NotLoadedError):
            raise error.cause from None
        raise


class ServeArguments(BaseModel):
    """Arguments of `build`, as in serveConfigV2: the service, and where models come from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    serve: ServeSettings = Field(default_factory=ServeSettings, description="The service itself.")
    storage: StorageSettings | None = Field(
        default=None,
        description="Object store for s3:// and registry models; unset: that of $FEWSTEP_S3_BUCKET, or none.",
    )
    tracking: TrackingSettings = Field(default_factory=TrackingSettings, description="Where the model registry is.")


def build_app(
    settings: ServeSettings, *, storage: Storage | None = None, tracking: TrackingSettings | None = None
) -> Application:
    """Return the Serve application: routes in front, engines behind. Models are loaded in the engine replicas.

    Args:
        settings: the service.
        storage: object store that model URIs may name; its credentials go into the replicas' environment.
        tracking: where the registry is; the default is the local one.
    """
    # Caches and the default registry lie in the caller's home; replicas run in folders of their own.
    environment = {"FEWSTEP_HOME": str(fewstep_home()), **({} if storage is None else storage.environment())}
    tracking = (tracking or TrackingSettings()).resolved()
    engine = EngineReplica.options(  # type: ignore[attr-defined]
        **_copies(settings),
        ray_actor_options={
            "num_cpus": settings.num_cpus,
            "num_gpus": settings.num_gpus,
            "runtime_env": {"env_vars": environment},
        },
        # A replica takes one batch that runs and one that fills; below max_batch_size batches would never fill.
        max_ongoing_requests=2 * settings.max_batch_size,
        max_queued_requests=settings.max_queued_images,
        max_constructor_retry_count=settings.load_attempts,
    ).bind(settings, storage, tracking)
    return HttpReplica.options(  # type: ignore[attr-defined]
        ray_actor_options={"num_cpus": 0},
        # The routes count pictures themselves and answer 429; Serve must not hold requests back before them.
        max_ongoing_requests=20 * settings.max_queued_images,
    ).bind(engine, settings)


def _copies(settings: ServeSettings) -> dict[str, Any]:
    """Return how many engine replicas run, as options of a deployment."""
    if settings.autoscaling is None:
        return {"num_replicas": settings.num_replicas}
    scaling = settings.autoscaling
    return {
        "autoscaling_config": {
            "min_replicas": scaling.min_replicas,
            "max_replicas": scaling.max_replicas,
            "target_ongoing_requests": scaling.target_ongoing_requests or settings.max_batch_size,
        }
    }


def build(args: dict[str, Any]) -> Application:
    """Return the application for serveConfigV2 (`import_path: fewstep.serve.app:build`), from its `args`.

    Args:
        args: `serve`, `storage` and `tracking`, each the fields of its settings class.

    Raises:
        RecipeError: an argument that is unknown or cannot work.
    """
    try:
        arguments = ServeArguments.model_validate(args)
    except ValidationError as error:
        raise RecipeError(f"the serve arguments cannot work: {error}") from error
    store = arguments.storage or store_of_environment()
    storage = None if store is None else Storage(store)
    return build_app(arguments.serve, storage=storage, tracking=arguments.tracking)
