"""A store behind an HTTP proxy that may treat each request as it likes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from typing import Self

import aiohttp
from aiohttp import web
from yarl import URL

#: Headers of one connection, and not of the message.
_HOP = {
    "connection", "content-length", "expect", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"
}  # fmt: skip


class Proxy:
    """Passes requests on to a store; use as a context manager. `url` is the endpoint.

    Args:
        endpoint_url: of the store.
    """

    def __init__(self, endpoint_url: str) -> None:
        self._behind = endpoint_url
        self.url = ""

    def refusal(self, request: web.Request) -> web.Response | None:
        """Return the answer to a request that is not passed on; None: it is."""
        return None

    async def give(self, request: web.Request, answer: web.Response) -> web.StreamResponse:
        """Return what is sent of the store's answer."""
        return answer

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fewstep-proxy", daemon=True)
        self._thread.start()
        self.url = asyncio.run_coroutine_threadsafe(self._open(), self._loop).result(60)
        return self

    def __exit__(self, *error: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(60)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _open(self) -> str:
        self._session = aiohttp.ClientSession(auto_decompress=False)
        application = web.Application(client_max_size=2**30)
        application.router.add_route("*", "/{path:.*}", self._pass_on)
        self._runner = web.AppRunner(application, auto_decompress=False)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def _close(self) -> None:
        await self._session.close()
        await self._runner.cleanup()

    async def _pass_on(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        refused = self.refusal(request)
        if refused is not None:
            return refused
        headers = _end_to_end(request.headers)  # with the Host that the client named: it is signed
        url = URL(self._behind + request.raw_path, encoded=True)
        async with self._session.request(
            request.method, url, data=body or None, headers=headers, allow_redirects=False
        ) as answer:
            headers = _end_to_end(answer.headers)
            if request.method == "HEAD":
                headers["Content-Length"] = answer.headers.get("Content-Length", "0")
            content = await answer.read()
            return await self.give(request, web.Response(status=answer.status, headers=headers, body=content or None))


def _end_to_end(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.lower() not in _HOP}
