"""The HTTP routes, as a FastAPI app over any backend that draws pictures."""

from __future__ import annotations

import asyncio
import base64
import secrets
import time
from collections.abc import Sequence
from typing import Any, Protocol

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from PIL import Image

from fewstep.serve.catalog import (
    Catalog,
    GeneratedImage,
    ImageRequest,
    NotLoadedError,
    StudentCard,
    find_models,
    resolve,
)
from fewstep.serve.encode import Provenance, encode_image
from fewstep.serve.errors import InvalidRequestError, error_response, install_error_handlers, overloaded
from fewstep.serve.settings import ServeSettings
from fewstep.serve.watch import RequestWatch, TimedRequests
from fewstep.serve.wire import (
    SEED_BOUND,
    ErrorBody,
    Health,
    ImageData,
    ImageGenerationRequest,
    ImagesResponse,
    InputTokensDetails,
    Model,
    ModelList,
    OutputFormat,
    Usage,
)

_GENERATIONS = "/v1/images/generations"


class QueueFullError(Exception):
    """The engines have as much waiting work as they may have."""


class EngineUnavailableError(Exception):
    """No engine can answer now: it is loading, or was lost and is being replaced. Its text, if any, says more."""


class Backend(Protocol):
    """What the routes need: engines somewhere."""

    async def catalog(self, *, fresh: bool = False) -> Catalog:
        """Return what is served, `fresh` or a few seconds old. EngineUnavailableError before an engine has come up."""

    async def generate(self, request: ImageRequest) -> GeneratedImage:
        """Return one picture. Raises InvalidRequestError, NotLoadedError, QueueFullError or EngineUnavailableError."""

    async def ready(self) -> bool:
        """Return whether an engine has its models loaded."""


def create_api(backend: Backend, settings: ServeSettings, watch: RequestWatch | None = None) -> FastAPI:
    """Return the app: POST /v1/images/generations, GET /v1/models, /v1/models/{id}, /healthz, and /docs.

    Args:
        backend: what draws.
        settings: the service.
        watch: told of every request for pictures.
    """
    watch = watch or RequestWatch()
    app = FastAPI(title="fewstep", description="Few-step text-to-image students over the OpenAI Images API.")
    install_error_handlers(app)
    app.add_middleware(TimedRequests, watch=watch, path=_GENERATIONS)
    # Counted here, request by request: Serve's own limit is per picture and would let half of a request in.
    in_flight_images = 0
    failures: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorBody, "description": text}
        for status, text in {
            400: "A field is missing, unknown or has a value that the model was not made for.",
            404: "The model is not served here.",
            429: "The queue is full; retry after the time in retry-after.",
            503: "No engine is loaded yet, or the model has no version yet.",
            504: "Not drawn within the server's time limit.",
        }.items()
    }

    def count(images: int) -> None:
        nonlocal in_flight_images
        in_flight_images += images
        watch.queued(in_flight_images)

    @app.post(_GENERATIONS, response_model=ImagesResponse, responses=failures)
    async def generate_images(body: ImageGenerationRequest, http: Request) -> Response:
        asked: dict[str, Any] = {
            "model": body.model,
            "num_inference_steps": body.num_inference_steps,
            "guidance_scale": body.guidance_scale,
            "extrapolate": bool(body.extrapolate),
        }
        try:
            student, _ = resolve(await backend.catalog(), **asked)
        except (InvalidRequestError, NotLoadedError):
            # Perhaps the right answer a moment ago.
            student, _ = resolve(await backend.catalog(fresh=True), **asked)
        http.state.model = student.id
        check_size(body.size, student)
        output_format, quality = check_output(body)
        n = body.n or 1
        if in_flight_images + n > settings.max_queued_images:
            return overloaded(
                f"{in_flight_images} pictures are waiting or running and {n} more would exceed the limit of "
                f"{settings.max_queued_images}: try again in a moment."
            )
        seed = secrets.randbelow(SEED_BOUND) if body.seed is None else body.seed
        # What was asked, and not the student that was found for it: the engine may have gone on to another version.
        requests = [ImageRequest(prompt=body.prompt, seed=(seed + k) % SEED_BOUND, **asked) for k in range(n)]
        count(n)
        try:
            async with asyncio.timeout(settings.request_timeout_s):
                images = await _generate_all(backend, requests)
        except TimeoutError:
            return error_response(
                504,
                f"Not drawn within {settings.request_timeout_s:g} seconds: ask for fewer pictures, or later.",
                code="timeout",
            )
        finally:
            count(-n)
        # Compression and base64 take longer than all the rest of the route; other requests must go on meanwhile.
        content = await asyncio.to_thread(_answer, body, images, output_format, quality)
        return Response(content, media_type="application/json")

    @app.get("/v1/models", response_model=ModelList, responses={503: failures[503]})
    async def list_models() -> ModelList:
        return ModelList(data=_models(find_models(await backend.catalog(fresh=True), None)))

    @app.get("/v1/models/{model_id:path}", response_model=Model, responses={k: failures[k] for k in (404, 503)})
    async def retrieve_model(model_id: str) -> Model:
        return _models(find_models(await backend.catalog(fresh=True), model_id))[0]

    @app.get("/healthz", response_model=Health, response_model_exclude_none=True, responses={503: failures[503]})
    async def healthz() -> Health:
        if not await backend.ready():
            raise EngineUnavailableError
        catalog = await backend.catalog()
        models = dict.fromkeys(card.id for card in find_models(catalog, None))
        return Health(models=list(models), waiting=list(catalog.waiting) or None)

    @app.exception_handler(QueueFullError)
    async def on_queue_full(*_: Any) -> JSONResponse:
        return overloaded("The engines' queue is full: try again in a moment.")

    @app.exception_handler(NotLoadedError)
    @app.exception_handler(EngineUnavailableError)
    async def on_unavailable(_: Request, error: Exception) -> JSONResponse:
        message = str(error) or "No engine has its models loaded yet: try again in a moment."
        return error_response(503, message, code="not_ready", headers={"retry-after": "2"})

    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def _openapi(app: FastAPI) -> dict[str, Any]:
    """Return the OpenAPI document without the 422 that FastAPI adds and that is never answered here."""
    if app.openapi_schema is None:
        document = FastAPI.openapi(app)
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(name, None)
    assert app.openapi_schema is not None
    return app.openapi_schema


def check_size(size: str | None, student: StudentCard) -> None:
    """Check that the requested size is the student's native one (or "auto").

    Raises:
        InvalidRequestError: it is another; the message lists what is allowed.
    """
    if size not in (None, "auto", student.size):
        raise InvalidRequestError(
            f"size={size[:40]!r} is not available: {student.id} draws {student.size} only; "
            "send that, 'auto' or nothing.",
            param="size",
            code="unsupported_value",
        )


def check_output(body: ImageGenerationRequest) -> tuple[OutputFormat, int]:
    """Return (file format, quality 0 to 100) of the request.

    Raises:
        InvalidRequestError: compression is asked of PNG, which has no levels of loss.
    """
    output_format: OutputFormat = body.output_format or "png"  # type: ignore[assignment]
    if output_format == "png" and body.output_compression not in (None, 100):
        raise InvalidRequestError(
            f"output_compression={body.output_compression} does not apply to png, which is lossless: "
            "set output_format to 'webp' or 'jpeg', or leave output_compression out.",
            param="output_compression",
            code="unsupported_value",
        )
    return output_format, 100 if body.output_compression is None else body.output_compression


async def _generate_all(backend: Backend, requests: Sequence[ImageRequest]) -> list[GeneratedImage]:
    """Return the pictures of one request; the first failure cancels the rest and is raised by itself."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(backend.generate(request)) for request in requests]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


def _answer(
    body: ImageGenerationRequest,
    images: Sequence[GeneratedImage],
    output_format: OutputFormat,
    quality: int,
) -> bytes:
    data = []
    first = images[0]
    is_mixed = any(generated.model != first.model for generated in images)
    for generated in images:
        provenance = Provenance(
            prompt=body.prompt,
            seed=generated.seed,
            num_inference_steps=generated.num_inference_steps,
            guidance_scale=generated.guidance_scale,
            model=generated.model,
        )
        encoded = encode_image(
            Image.fromarray(generated.pixels), provenance, output_format=output_format, quality=quality
        )
        data.append(
            ImageData(
                b64_json=base64.b64encode(encoded).decode("ascii"),
                seed=generated.seed,
                model=generated.model if is_mixed else None,
            )
        )
    warnings = []
    if is_mixed:
        warnings.append(
            "Another version took over while this request was drawn: 'model' of each picture says by which it is. To "
            "have all by one, name it as id@version."
        )
    height, width = first.pixels.shape[:2]
    if first.prompt_tokens_cut:
        warnings.append(
            f"The prompt was cut after {first.prompt_tokens} tokens, the most that the text encoder takes; "
            f"the last {first.prompt_tokens_cut} had no effect."
        )
    response = ImagesResponse(
        created=int(time.time()),
        data=data,
        output_format=output_format,
        quality=body.quality if body.quality not in (None, "auto") else "standard",
        size=f"{width}x{height}",
        model=first.model,
        num_inference_steps=first.num_inference_steps,
        guidance_scale=first.guidance_scale,
        usage=Usage(
            input_tokens=first.prompt_tokens,
            input_tokens_details=InputTokensDetails(text_tokens=first.prompt_tokens),
            total_tokens=first.prompt_tokens,
        ),
        warnings=warnings or None,
    )
    return response.model_dump_json(exclude_none=True).encode()


def _models(cards: Sequence[StudentCard]) -> list[Model]:
    """Return one entry per model id; students of one id are its step counts."""
    by_id: dict[str, list[StudentCard]] = {}
    for card in cards:
        by_id.setdefault(card.id, []).append(card)
    return [
        Model(
            id=model_id,
            created=students[0].loaded_at_s,
            version=students[0].version,
            size=students[0].size,
            num_inference_steps=[student.num_inference_steps for student in students],
            guidance_scale_range=students[0].guidance_scale_range,
            guidance_scale_default=students[0].guidance_scale_default,
        )
        for model_id, students in by_id.items()
    ]
