"""Starting and stopping the service on the current Ray."""

from __future__ import annotations

import logging
import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.exceptions import RayServeException

from fewstep.errors import FewstepError, ModelError
from fewstep.serve.app import build_app
from fewstep.serve.settings import ServeSettings
from fewstep.storage import Storage
from fewstep.tracking.settings import TrackingSettings

logger = logging.getLogger("fewstep.serve")

APPLICATION = "fewstep"
_ANSWER_TIMEOUT_S = 60.0
_SHUTDOWN_TIMEOUT_S = 30.0


class ServeError(FewstepError):
    """The service cannot listen or answer where it was told to."""


@dataclass(frozen=True)
class RunningServer:
    """The service, ready to answer.

    Attributes:
        url: where it answers, without a slash at the end; the `base_url` of OpenAI clients is url + "/v1".
        name: of the Ray Serve application.
    """

    url: str
    name: str
    _started_serve: bool

    def stop(self) -> None:
        """Take the service down, and Ray Serve with it if `run_server` had to start that."""
        if self._started_serve:
            _shut_serve_down()
        else:
            serve.delete(self.name)

    def wait(self) -> None:
        """Block until interrupted (Ctrl-C)."""
        while True:
            time.sleep(3600)


def run_server(
    settings: ServeSettings,
    *,
    storage: Storage | None = None,
    tracking: TrackingSettings | None = None,
    name: str = APPLICATION,
    announce: Callable[[str], None] = print,
) -> RunningServer:
    """Start the service on the current Ray, wait until its models are loaded, tell where it is, and return it.

    Args:
        settings: the service.
        storage: object store that model URIs may name.
        tracking: where the registry is.
        name: of the Ray Serve application, for several on one Ray.
        announce: takes the line that says where the service answers.

    Raises:
        ServeError: the port is taken, or Ray Serve already listens elsewhere.
        ModelError: a model cannot be loaded; nothing is left running.
    """
    settings = settings.model_copy(update={"models": tuple(_absolute(uri) for uri in settings.models)})
    # Serve tells its caller every step of a start; what a user must know is announced below.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    started_serve = not serve.status().proxies
    port = settings.port
    if started_serve:
        port = _free_port(settings.host) if port == 0 else _check_port(settings.host, port)
        serve.start(http_options={"host": settings.host, "port": port})
    elif port == 0:
        raise ServeError("Ray Serve already runs on this Ray, so port 0 (any free port) cannot be had: name its port.")
    reachable = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host
    url = f"http://{reachable}:{port}{settings.route_prefix}".rstrip("/")
    server = RunningServer(url, name, started_serve)
    try:
        application = build_app(settings, storage=storage, tracking=tracking)
        serve.run(application, name=name, route_prefix=settings.route_prefix)
        _wait_until_it_answers(url, needs_models=not settings.wait_for_models)
    except RuntimeError as error:
        reason = _load_failure(name) or str(error)
        server.stop()
        raise ModelError(f"the server did not start with {', '.join(settings.models)}: {reason}") from None
    except BaseException:
        server.stop()
        raise
    announce(f"Serving {', '.join(settings.models)} at {url} (OpenAI base_url: {url}/v1, documentation: {url}/docs)")
    return server


def stop(name: str = APPLICATION) -> None:
    """Take the service down from any process on the same Ray; nothing happens when it does not run."""
    try:
        serve.delete(name)
    except RayServeException:
        logger.info("Ray Serve does not run here: nothing to stop")


def _shut_serve_down() -> None:
    # serve.shutdown alone waits on a task that never ends, as its actor is killed at last, and of that Ray writes a
    # line to the terminal. So the actor is asked without waiting, and serve.shutdown finds it gone.
    named = {"name": "SERVE_CONTROLLER_ACTOR", "namespace": "serve"}
    deadline = time.monotonic() + _SHUTDOWN_TIMEOUT_S
    with suppress(ValueError):  # no actor has the name any more
        controller: Any = ray.get_actor(**named)
        ray.wait([controller.graceful_shutdown.remote(wait=False)], timeout=_SHUTDOWN_TIMEOUT_S)
        while time.monotonic() < deadline:
            ray.get_actor(**named)
            time.sleep(0.1)
    serve.shutdown()


def _absolute(uri: str) -> str:
    # Ray's workers run in other folders.
    folder = Path(uri).expanduser()
    return str(folder.absolute()) if folder.is_dir() else uri


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _check_port(host: str, port: int) -> int:
    with socket.socket() as probe:
        # As the server itself will: otherwise a connection that just closed would count as taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServeError(
                f"cannot listen on {host}:{port} ({error.strerror}): choose another port, or 0 for any."
            ) from None
    return port


def _load_failure(name: str) -> str | None:
    """Return the last fewstep error in what Serve keeps of a failed deployment, without its stack trace."""
    application = serve.status().applications.get(name)
    if application is None:
        return None
    texts = [application.message, *(deployment.message for deployment in application.deployments.values())]
    found = [line for text in texts for line in re.findall(r"^fewstep\.[\w.]+: (.+)", text, re.M)]
    return found[-1] if found else None


def _wait_until_it_answers(url: str, *, needs_models: bool) -> None:
    deadline = time.monotonic() + _ANSWER_TIMEOUT_S
    while True:
        try:
            with urllib.request.urlopen(f"{url}/healthz", timeout=5):
                return
        except (urllib.error.URLError, OSError) as error:
            if not needs_models and isinstance(error, urllib.error.HTTPError) and error.code == 503:
                return
            if time.monotonic() > deadline:
                raise ServeError(
                    f"nothing healthy answers at {url} after {_ANSWER_TIMEOUT_S:g} seconds ({error}): Ray Serve may "
                    "already run on this Ray with another host or port; use those, or stop it with `serve shutdown`."
                ) from None
            time.sleep(0.1)
