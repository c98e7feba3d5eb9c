"""The Ray Serve application: an HTTP deployment in front of engine deployments that batch.

`fewstep.serve.app:build` is the import path for a RayService's serveConfigV2.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
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
from fewstep.serve.catalog import GeneratedImage, ImageRequest, StudentCard
from fewstep.serve.errors import InvalidRequestError
from fewstep.serve.settings import ServeSettings
from fewstep.storage import Storage, StorageSettings, store_of_environment
from fewstep.tracking.settings import TrackingSettings, fewstep_home

if TYPE_CHECKING:
    from fewstep.serve.engine import Engine

ENGINE = "Engine"
_CATALOG_TIMEOUT_S = 30.0


@serve.deployment(name=ENGINE)
class EngineReplica:
    """One copy of the models on one device. Pictures of concurrent requests run as one batch."""

    def __init__(self, settings: ServeSettings, storage: Storage | None, tracking: TrackingSettings) -> None:
        # Here and not above: the HTTP process shares this module and has no use for torch.
        from fewstep.serve.engine import load_engine

        self.engine: Engine = load_engine(settings, storage=storage, tracking=tracking)
        # One thread: the device runs one batch at a time, and the event loop stays free to fill the next one.
        self._device_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        self._batch.set_max_batch_size(settings.max_batch_size)  # type: ignore[attr-defined]
        self._batch.set_batch_wait_timeout_s(settings.batch_wait_timeout_s)  # type: ignore[attr-defined]

    async def generate(self, request: ImageRequest) -> GeneratedImage:
        """Return one picture; InvalidRequestError before it can take its batch-mates down with it."""
        self.engine.check(request)
        return await self._batch(request)

    @serve.batch
    async def _batch(self, requests: list[ImageRequest]) -> list[GeneratedImage]:
        return await asyncio.get_running_loop().run_in_executor(self._device_thread, self.engine.generate, requests)

    async def catalog(self) -> list[StudentCard]:
        """Return the loaded students, default first."""
        return list(self.engine.catalog)

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
        self._catalog: list[StudentCard] | None = None

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_api(self, self._settings)

    async def catalog(self) -> Sequence[StudentCard]:
        """Return the loaded students, asked of an engine once: engines of one deployment load the same models."""
        if self._catalog is None:
            # A handle waits for a replica for ever; while models load, the caller must be told.
            if not await self.ready():
                raise EngineUnavailableError
            catalog: list[StudentCard] = await asyncio.wait_for(_call(self._engine.catalog), _CATALOG_TIMEOUT_S)
            self._catalog = catalog
        return self._catalog

    async def generate(self, request: ImageRequest) -> GeneratedImage:
        """Return one picture from whichever engine has room."""
        return await _call(self._engine.generate, request)

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
        if isinstance(error.cause, InvalidRequestError):
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
        num_replicas=settings.num_replicas,
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
