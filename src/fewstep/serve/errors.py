"""OpenAI's error body for everything that is not a success.

The `openai` client builds its exceptions from {"error": {"message", "type", "param", "code"}}; FastAPI's own
{"detail"} would leave `param` and `code` empty there.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fewstep.errors import SamplingError
from fewstep.serve.wire import ErrorBody, ErrorDetail, ImageGenerationRequest

logger = logging.getLogger("fewstep.serve")

#: A request body that is larger is refused unread; the longest allowed prompt takes at most 192 kB of JSON.
MAX_BODY_BYTES = 1_000_000
EXAMPLE = '{"prompt": "a red apple"}'


class InvalidRequestError(SamplingError):
    """A request that the model cannot answer, with the field that is to blame.

    Args:
        message: what is wrong, the rule, the fix.
        param: name of the request's field.
        code: short machine-readable reason.
        status: HTTP status.
    """

    def __init__(self, message: str, *, param: str | None, code: str = "invalid_value", status: int = 400) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions are pickled by their args alone; this one crosses from the engine's process to the HTTP process.
        return _restore_invalid_request, (str(self), self.param, self.code, self.status)


def _restore_invalid_request(message: str, param: str | None, code: str, status: int) -> InvalidRequestError:
    return InvalidRequestError(message, param=param, code=code, status=status)


def error_response(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """Return the JSON answer of a failure; the error type follows from the status.

    A 5xx carries `x-should-retry: false`, because the same request would fail again and the client would make the
    device do the work three times.
    """
    error_type = "rate_limit_error" if status == 429 else "server_error" if status >= 500 else "invalid_request_error"
    body = ErrorBody(error=ErrorDetail(message=message, type=error_type, param=param, code=code))
    extra = dict(headers or {})
    if status >= 500 and "retry-after" not in extra:
        extra["x-should-retry"] = "false"
    return JSONResponse(body.model_dump(), status_code=status, headers=extra)


def overloaded(message: str, *, retry_after_s: int = 1) -> JSONResponse:
    """Return the 429 answer: the queue is full, come back in `retry_after_s` seconds."""
    return error_response(429, message, code="queue_full", headers={"retry-after": str(retry_after_s)})


def describe_validation_error(errors: Sequence[Mapping[str, Any]]) -> tuple[str, str | None, str]:
    """Return (message, param, code) for the first of pydantic's errors about a request body."""
    error = errors[0]
    location = [str(part) for part in error["loc"] if part != "body"]
    param = ".".join(location) or None
    kind = error["type"]
    if kind == "json_invalid":
        return f"The body is not valid JSON: send an object such as {EXAMPLE}.", None, "invalid_json"
    if kind == "missing":
        name = param or "body"
        message = f"The field '{name}' is required: send JSON such as {EXAMPLE}."
        return message, param, "missing_required_parameter"
    if kind == "extra_forbidden":
        known = sorted(ImageGenerationRequest.model_fields)
        close = difflib.get_close_matches(param or "", known, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"known fields are {', '.join(known)}."
        return f"Unknown field '{param}': {hint}", param, "unknown_parameter"
    if error.get("ctx", {}).get("request_rule"):
        return str(error["msg"]), param, kind
    value = repr(error.get("input"))
    shown = value if len(value) <= 80 else value[:77] + "…"
    where = f"'{param}'" if param else "The body"
    code = "invalid_type" if kind.endswith(("_type", "_parsing")) else "invalid_value"
    return f"{where} is {shown}: {error['msg']}.", param, code


class SafetyNet:
    """ASGI layer that answers a crash with a plain 500 body and refuses bodies beyond `MAX_BODY_BYTES`.

    Starlette's own handler for Exception raises again after answering, which Ray Serve would answer a second time.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def watched_send(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        body = await _read_body(receive)
        if body is None:
            response = error_response(
                413, f"The body is larger than {MAX_BODY_BYTES} bytes: send a shorter prompt.", code="request_too_large"
            )
            await response(scope, receive, send)
            return
        unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replayed_receive() -> Message:
            return unread.pop() if unread else await receive()

        try:
            await self.app(scope, replayed_receive, watched_send)
        except Exception:
            # The trace goes to the log, never to the client.
            logger.exception("unhandled error while answering %s %s", scope["method"], scope["path"])
            if started:
                raise
            response = error_response(
                500, "The server failed while answering; its log has the trace.", code="internal_error"
            )
            await response(scope, receive, send)


async def _read_body(receive: Receive) -> bytes | None:
    """Return the request's body, or None as soon as it proves to be beyond `MAX_BODY_BYTES`."""
    parts: list[bytes] = []
    size_bytes = 0
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        size_bytes += len(parts[-1])
        if size_bytes > MAX_BODY_BYTES:
            return None
        if not message.get("more_body", False):
            return b"".join(parts)


def install_error_handlers(app: FastAPI) -> None:
    """Make every non-2xx answer of the app carry OpenAI's error body, unknown routes and crashes included."""

    @app.exception_handler(RequestValidationError)
    async def on_validation(_: Request, error: RequestValidationError) -> JSONResponse:
        message, param, code = describe_validation_error(error.errors())
        return error_response(400, message, param=param, code=code)

    @app.exception_handler(InvalidRequestError)
    async def on_invalid(_: Request, error: InvalidRequestError) -> JSONResponse:
        return error_response(error.status, str(error), param=error.param, code=error.code)

    @app.exception_handler(HTTPException)
    async def on_http(request: Request, error: HTTPException) -> JSONResponse:
        where = f"{request.method} {request.url.path}"
        if error.status_code == 404:
            message, code = f"Unknown route: {where}. The routes are listed at /docs.", "unknown_url"
        elif error.status_code == 405:
            allowed = (error.headers or {}).get("allow", "another method")
            message, code = f"{where} is not allowed: use {allowed}.", "method_not_allowed"
        else:
            message, code = str(error.detail), "http_error"
        return error_response(error.status_code, message, code=code, headers=error.headers)

    app.add_middleware(SafetyNet)
