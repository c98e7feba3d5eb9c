"""The routes over an engine in this process: what happens when something breaks, takes too long or is not there."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.errors import RecipeError
from fewstep.models import load_parts, read_student_info
from fewstep.serve.api import EngineUnavailableError, create_api
from fewstep.serve.app import build
from fewstep.serve.catalog import Catalog, GeneratedImage, ImageRequest
from fewstep.serve.engine import Engine, Student, make_card
from fewstep.serve.settings import ServeSettings
from fewstep.serve.watch import RequestWatch
from tiny import tiny_student_folder


class LocalBackend:
    """An engine in this process; `delay_s` makes it slow, `loaded` says whether it is there yet."""

    def __init__(self, engine: Engine, *, delay_s: float = 0.0, loaded: bool = True) -> None:
        self.engine, self.delay_s, self.loaded = engine, delay_s, loaded
        self.drawn = 0

    async def catalog(self, *, fresh: bool = False) -> Catalog:
        if not self.loaded:
            raise EngineUnavailableError
        return self.engine.catalog

    async def generate(self, request: ImageRequest) -> GeneratedImage:
        await asyncio.sleep(self.delay_s)
        self.drawn += 1
        return self.engine.generate([request])[0]

    async def ready(self) -> bool:
        return self.loaded


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    torch.set_num_threads(1)
    folder = tiny_student_folder(tmp_path / "emoji", num_inference_steps=1)
    parts, info = load_parts(folder), read_student_info(folder)
    assert info is not None
    return Engine([Student(make_card("emoji", parts, info), parts, info)])


async def call(app: Any, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, dict[str, str], Any]:
    sent: list[dict[str, Any]] = []
    content = b"" if body is None else json.dumps(body).encode()

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": content, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
        "headers": [(b"content-type", b"application/json")], "http_version": "1.1", "scheme": "http",
        "server": ("test", 80), "client": ("test", 1),
    }  # fmt: skip
    await app(scope, receive, send)
    headers = {key.decode(): value.decode() for key, value in sent[0]["headers"]}
    return sent[0]["status"], headers, json.loads(b"".join(message.get("body", b"") for message in sent[1:]))


def post(backend: LocalBackend, body: dict[str, Any], **settings: Any) -> tuple[int, dict[str, str], Any]:
    app = create_api(backend, ServeSettings(**settings))
    return asyncio.run(call(app, "POST", "/v1/images/generations", body))


def test_a_crash_is_a_500_without_its_trace(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    engine.students[0].parts.unet.conv_in = torch.nn.Conv2d(3, 16, 3)
    status, headers, body = post(LocalBackend(engine), {"prompt": "a red apple"})
    assert (status, headers["x-should-retry"]) == (500, "false")
    assert body["error"]["code"] == "internal_error"
    assert "channels" not in body["error"]["message"]
    assert "channels" in caplog.text
    assert "a red apple" not in caplog.text


def test_a_slow_engine_is_a_504_and_its_other_pictures_are_not_drawn(engine: Engine) -> None:
    backend = LocalBackend(engine, delay_s=30)
    status, headers, body = post(backend, {"prompt": "a red apple", "n": 3}, request_timeout_s=0.05)
    assert (status, headers["x-should-retry"], body["error"]["code"]) == (504, "false", "timeout")
    assert backend.drawn == 0


def test_without_an_engine_everything_says_not_ready(engine: Engine) -> None:
    app = create_api(LocalBackend(engine, loaded=False), ServeSettings())
    for method, path, body in [
        ("GET", "/healthz", None), ("GET", "/v1/models", None), ("POST", "/v1/images/generations", {"prompt": "a"})
    ]:  # fmt: skip
        status, headers, answer = asyncio.run(call(app, method, path, body))
        assert (status, answer["error"]["code"], headers["retry-after"]) == (503, "not_ready", "2")


def test_before_the_first_version_the_answer_says_what_is_waited_for(engine: Engine) -> None:
    engine.install([], waiting=["models:/emoji@champion"])
    app = create_api(LocalBackend(engine), ServeSettings())
    for method, path, body in [
        ("GET", "/healthz", None), ("GET", "/v1/models", None), ("POST", "/v1/images/generations", {"prompt": "a"})
    ]:  # fmt: skip
        status, headers, answer = asyncio.run(call(app, method, path, body))
        assert (status, answer["error"]["code"], headers["retry-after"]) == (503, "not_ready", "2")
        assert answer["error"]["message"].startswith("There is no version of models:/emoji@champion yet")


class TwoVersions(LocalBackend):
    """An engine that goes over to another version after its first picture, and is known by an old catalog."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        (first,) = engine.students
        self.old = engine.catalog
        self.next = replace(first, card=replace(first.card, version="2", id="emoji"))
        self.asked = 0

    async def catalog(self, *, fresh: bool = False) -> Catalog:
        self.asked += fresh
        return self.engine.catalog if fresh else self.old

    async def generate(self, request: ImageRequest) -> GeneratedImage:
        image = await super().generate(request)
        self.engine.install([self.next])
        return image


def test_pictures_of_two_versions_in_one_answer_are_told_apart(engine: Engine) -> None:
    backend = TwoVersions(engine)
    status, _, body = post(backend, {"prompt": "a red apple", "n": 2})
    assert status == 200
    assert [image["model"] for image in body["data"]] == ["emoji", "emoji@2"]
    assert "Another version took over" in body["warnings"][0]
    status, _, body = post(backend, {"prompt": "a red apple", "n": 2})
    assert (status, body["model"], "warnings" in body, "model" in body["data"][0]) == (200, "emoji@2", False, False)


def test_a_request_is_not_refused_by_an_old_catalog(engine: Engine) -> None:
    backend = TwoVersions(engine)
    engine.install([backend.next])
    status, _, body = post(backend, {"prompt": "a red apple", "model": "emoji@2"})
    assert (status, body["model"], backend.asked) == (200, "emoji@2", 1)


class Seen(RequestWatch):
    def __init__(self) -> None:
        self.answers: list[tuple[str, str]] = []
        self.queue: list[int] = []

    def answered(self, *, model: str, code: str, seconds: float) -> None:
        assert seconds > 0
        self.answers.append((model, code))

    def queued(self, images: int) -> None:
        self.queue.append(images)


def test_requests_are_counted_by_model_and_status(engine: Engine) -> None:
    seen = Seen()
    app = create_api(LocalBackend(engine), ServeSettings(), seen)
    for body in ({"prompt": "a", "n": 3}, {"prompt": "a", "size": "9x9"}, {"prompt": "a", "model": "x"}, {}):
        asyncio.run(call(app, "POST", "/v1/images/generations", body))
    asyncio.run(call(app, "GET", "/healthz"))
    assert seen.answers == [("emoji", "200"), ("emoji", "400"), ("", "404"), ("", "400")]
    assert seen.queue == [3, 0]
    engine.students[0].parts.unet.conv_in = torch.nn.Conv2d(3, 16, 3)
    asyncio.run(call(app, "POST", "/v1/images/generations", {"prompt": "a"}))
    assert seen.answers[-1] == ("emoji", "500")
    assert seen.queue[-1] == 0


def test_a_request_beyond_the_queue_is_refused_whole_and_room_comes_back(engine: Engine) -> None:
    backend = LocalBackend(engine, delay_s=0.05)
    app = create_api(backend, ServeSettings(max_queued_images=10))

    async def burst() -> list[int]:
        body = {"prompt": "a red apple", "n": 6}
        answers = await asyncio.gather(*(call(app, "POST", "/v1/images/generations", body) for _ in range(2)))
        later = await call(app, "POST", "/v1/images/generations", body)
        return [status for status, _, _ in [*answers, later]]

    assert asyncio.run(burst()) == [200, 429, 200]
    assert backend.drawn == 12


def test_a_negative_prompt_is_a_400_that_says_it_has_no_effect(engine: Engine) -> None:
    status, _, body = post(LocalBackend(engine), {"prompt": "a red apple", "negative_prompt": "blurry"})
    assert (status, body["error"]["param"], body["error"]["code"]) == (400, "negative_prompt", "unsupported_parameter")
    assert "no effect" in body["error"]["message"]


def test_guidance_beyond_the_trained_range_only_on_purpose(engine: Engine) -> None:
    asked = {"prompt": "a red apple", "seed": 7, "guidance_scale": 9.0}
    status, _, body = post(LocalBackend(engine), asked)
    assert (status, body["error"]["param"]) == (400, "guidance_scale")
    assert "outside 1 … 7" in body["error"]["message"]
    status, _, far = post(LocalBackend(engine), {**asked, "extrapolate": True})
    assert (status, far["guidance_scale"]) == (200, 9.0)
    _, _, near = post(LocalBackend(engine), {**asked, "guidance_scale": 7.0})
    assert near["data"] != far["data"]


def test_seeds_wrap_at_their_bound(engine: Engine) -> None:
    status, _, body = post(LocalBackend(engine), {"prompt": "a red apple", "n": 2, "seed": 2**32 - 1})
    assert status == 200
    assert [image["seed"] for image in body["data"]] == [2**32 - 1, 0]


def test_the_openapi_document_names_no_error_of_fastapi(engine: Engine) -> None:
    _, _, document = asyncio.run(call(create_api(LocalBackend(engine), ServeSettings()), "GET", "/openapi.json"))
    responses = document["paths"]["/v1/images/generations"]["post"]["responses"]
    assert set(responses) == {"200", "400", "404", "429", "503", "504"}
    assert "HTTPValidationError" not in document["components"]["schemas"]


def test_build_takes_the_arguments_of_a_ray_service_and_refuses_typos() -> None:
    application = build(
        {"serve": {"models": ["asset:x"], "num_cpus": 0.5}, "storage": {"kind": "s3", "bucket": "models"}}
    )
    assert type(application).__name__ == "Application"
    scaled = build({"serve": {"autoscaling": {"max_replicas": 3}, "max_batch_size": 6}})
    engine = scaled._bound_deployment.init_args[0]._bound_deployment
    scaling = engine._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (1, 3, 6)
    with pytest.raises(RecipeError, match="model\n"):
        build({"serve": {"model": "asset:x"}})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_batch_size": 100}, "batches could never fill"),
        ({"models": ("a", "a")}, "names a model twice"),
        ({"autoscaling": {"max_replicas": 2}, "num_replicas": 2}, "num_replicas=2 and autoscaling are both set"),
        ({"autoscaling": {"min_replicas": 3, "max_replicas": 2}}, "max_replicas=2 is below min_replicas=3"),
        ({"wait_for_models": True, "reload_every_s": 0}, "wait_for_models needs reload_every_s above 0"),
        ({"max_queued_images": 9}, "greater than or equal to 10"),
    ],
)
def test_settings_that_cannot_work_say_so(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ServeSettings(**fields)
