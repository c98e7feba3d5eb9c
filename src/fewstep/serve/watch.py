"""What can be watched of the service: each request, each batch, each version. Knows nothing of Ray."""

from __future__ import annotations

import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fewstep.serve.catalog import StudentCard


class EngineWatch:
    """Told of what an engine does; this one does nothing with it."""

    def drew(self, card: StudentCard, *, batch_size: int, seconds: float) -> None:
        """Take note of one batch of one student, prompts to pixels; padding is not counted."""

    def serves(self, uri: str, *, model: str, version: int) -> None:
        """Take note of the version that stands for a model of the settings; 0 while there is none."""

    def reloaded(self, model: str) -> None:
        """Take note that another version has taken over."""

    def refused(self, model: str) -> None:
        """Take note that the version an alias names cannot be served."""


class RequestWatch:
    """Told of what the HTTP routes do; this one does nothing with it."""

    def answered(self, *, model: str, code: str, seconds: float) -> None:
        """Take note of one request for pictures: model id ("" when refused before one was found) and HTTP status."""

    def queued(self, images: int) -> None:
        """Take note of how many pictures wait or run."""


class TimedRequests:
    """ASGI layer that tells a watch how long each POST to a path took and how it ended."""

    def __init__(self, app: ASGIApp, watch: RequestWatch, path: str) -> None:
        self.app = app
        self.watch = watch
        self.path = path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].endswith(self.path):
            await self.app(scope, receive, send)
            return
        # The route writes the model's name here.
        state = scope.setdefault("state", {})
        code, began_s = "cancelled", time.perf_counter()

        async def watched_send(message: Message) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = str(message["status"])
            await send(message)

        try:
            await self.app(scope, receive, watched_send)
        finally:
            self.watch.answered(model=state.get("model", ""), code=code, seconds=time.perf_counter() - began_s)
