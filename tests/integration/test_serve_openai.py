"""The HTTP contract, by the unmodified `openai` client against a real Ray Serve with real (tiny) students."""

from __future__ import annotations

import base64
import io
import itertools
import json
import math
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import ray
from PIL import Image
from ray import serve
from safetensors.torch import load_file, save_file

from fewstep.errors import FewstepError, ModelError
from fewstep.serve.server import APPLICATION, RunningServer, run_server
from fewstep.serve.settings import ServeSettings
from fewstep.storage import Storage
from fewstep.tracking.registry import Registry
from fewstep.tracking.settings import TrackingSettings
from fewstep.tracking.tracker import Tracker
from tiny import tiny_student_folder

MAX_BATCH = 4
WEIGHTS = Path("unet", "diffusion_pytorch_model.safetensors")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def registry(storage: Storage, new_database: Callable[[], str], tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """A student of four steps whose files lie in S3; version 1 is champion, 2 is another and 3 draws nothing finite."""
    tracker = Tracker.open(TrackingSettings(uri=new_database(), experiment="serve"), storage)
    folder = tiny_student_folder(tmp_path_factory.mktemp("registered") / "student", num_inference_steps=4)
    with tracker.run("register", key="register") as run:
        for more in (0.0, 1.0, math.nan):
            weights = load_file(folder / WEIGHTS)
            weights["conv_out.bias"] += more
            save_file(weights, folder / WEIGHTS)
            tags = {"num_inference_steps": "4", "teacher": "tiny", "data_digest": "d", "fingerprint": str(more)}
            Registry(tracker).log_student(run, folder, name="emoji-4", params={}, tags=tags, metrics={})
    Registry(tracker).set_alias("emoji-4", "champion", 1)
    return Registry(tracker)


@pytest.fixture(scope="module")
def server(
    ray_cluster: Any, registry: Registry, storage: Storage, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """The champion, and a student of one step in a folder."""
    root = tmp_path_factory.mktemp("students")
    settings = ServeSettings(
        models=("models:/emoji-4@champion", str(tiny_student_folder(root / "emoji-1", num_inference_steps=1))),
        port=0,
        max_batch_size=MAX_BATCH,
        # Long enough that pictures sent together meet even on a loaded machine.
        batch_wait_timeout_s=0.2,
        max_queued_images=24,
        num_cpus=0.5,
        num_threads=1,
        reload_every_s=0.5,
    )
    lines: list[str] = []
    running = run_server(settings, storage=storage, tracking=registry._tracker.settings, announce=lines.append)
    assert len(lines) == 1
    assert f"{running.url}/v1" in lines[0]
    yield running
    running.stop()
    assert not serve.status().applications


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as made:
        yield made


def png(image: Any) -> bytes:
    return base64.b64decode(image.b64_json)


def raw(url: str, method: str = "GET", data: bytes | None = None) -> tuple[int, Any]:
    request = urllib.request.Request(url, data=data, method=method, headers={"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_a_prompt_alone_is_enough(client: openai.OpenAI) -> None:
    answer = client.images.generate(prompt="a red apple")
    assert answer.data is not None
    assert len(answer.data) == 1
    image = Image.open(io.BytesIO(png(answer.data[0])))
    assert image.format == "PNG"
    assert f"{image.width}x{image.height}" == answer.size
    assert answer.output_format == "png"
    assert answer.quality == "standard"
    assert answer.created > 1_700_000_000
    assert answer.usage is not None
    assert answer.usage.input_tokens == answer.usage.total_tokens > 0
    assert answer.usage.input_tokens_details.image_tokens == 0
    assert answer.model == "emoji-4@1"
    assert answer.num_inference_steps == 4
    assert image.text["Title"] == "AI-generated"
    assert image.text["model"] == "emoji-4@1"


def test_the_same_seed_is_the_same_file_and_another_is_not(client: openai.OpenAI) -> None:
    first, again, other = (
        png(client.images.generate(prompt="a red apple", extra_body={"seed": seed}).data[0])
        for seed in (7, 7, 8)  # type: ignore[index]
    )
    assert first == again != other


def test_n_pictures_have_their_own_seeds_and_each_can_be_had_alone(client: openai.OpenAI) -> None:
    three = client.images.generate(prompt="a red apple", n=3, extra_body={"seed": 40}).data
    assert three is not None
    assert [image.seed for image in three] == [40, 41, 42]
    assert len({png(image) for image in three}) == 3
    alone = client.images.generate(prompt="a red apple", extra_body={"seed": 41}).data
    assert alone is not None
    pixels = [np.asarray(Image.open(io.BytesIO(png(image)))).astype(int) for image in (three[1], alone[0])]
    # Batches of three and of one go through other kernels: at most the last bit of a pixel may differ.
    assert np.abs(pixels[0] - pixels[1]).max() <= 1


def test_without_a_seed_pictures_differ_and_the_seed_is_told(client: openai.OpenAI) -> None:
    first, second = (client.images.generate(prompt="a red apple").data for _ in range(2))
    assert first is not None
    assert second is not None
    assert first[0].seed != second[0].seed


def test_the_step_count_or_the_model_chooses_the_student(client: openai.OpenAI) -> None:
    by_steps = client.images.generate(prompt="a red apple", extra_body={"num_inference_steps": 1, "seed": 1})
    by_name = client.images.generate(prompt="a red apple", model="emoji-1", extra_body={"seed": 1})
    assert by_steps.model == by_name.model == "emoji-1"  # type: ignore[attr-defined]
    assert by_steps.data is not None
    assert by_name.data is not None
    assert png(by_steps.data[0]) == png(by_name.data[0])


def test_guidance_changes_the_picture(client: openai.OpenAI) -> None:
    low, high = (
        client.images.generate(prompt="a red apple", extra_body={"seed": 1, "guidance_scale": g}) for g in (1.0, 5.0)
    )
    assert low.data is not None
    assert high.data is not None
    assert png(low.data[0]) != png(high.data[0])
    assert (low.guidance_scale, high.guidance_scale) == (1.0, 5.0)  # type: ignore[attr-defined]


@pytest.mark.parametrize("output_format", ["webp", "jpeg"])
def test_other_file_formats(client: openai.OpenAI, output_format: Any) -> None:
    answer = client.images.generate(prompt="a red apple", output_format=output_format, output_compression=50)
    assert answer.data is not None
    assert answer.output_format == output_format
    assert Image.open(io.BytesIO(png(answer.data[0]))).format == output_format.upper()


def test_a_long_prompt_is_cut_and_said_to_be(client: openai.OpenAI) -> None:
    answer = client.images.generate(prompt="red apple " * 200)
    assert "cut" in answer.warnings[0]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("arguments", "param", "code", "words"),
    [
        ({"extra_body": {"num_inference_steps": 3}}, "num_inference_steps", "unsupported_value", "use 1, 4"),
        ({"extra_body": {"guidance_scale": 99}}, "guidance_scale", "unsupported_value", "range"),
        ({"extra_body": {"negative_prompt": "blurry"}}, "negative_prompt", "unsupported_parameter", "no effect"),
        ({"extra_body": {"step": 4}}, "step", "unknown_parameter", "Unknown field"),
        ({"prompt": " "}, "prompt", "empty_prompt", "say what to draw"),
        ({"n": 11}, "n", "invalid_value", "10"),
        ({"size": "1024x1024"}, "size", "unsupported_value", "only"),
        ({"response_format": "url"}, "response_format", "unsupported_value", "b64_json"),
        ({"output_compression": 50}, "output_compression", "unsupported_value", "lossless"),
    ],
)
def test_refusals_carry_field_and_code(
    client: openai.OpenAI, arguments: dict[str, Any], param: str, code: str, words: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=words) as caught:
        client.images.generate(**({"prompt": "a red apple"} | arguments))
    assert (caught.value.param, caught.value.code, caught.value.type) == (param, code, "invalid_request_error")


def test_streaming_says_what_to_do_for_now(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="not supported yet") as caught:
        list(client.images.generate(prompt="a red apple", stream=True))
    assert caught.value.param == "stream"


def test_an_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="emoji-4, emoji-1") as caught:
        client.images.generate(prompt="a red apple", model="dall-e-3")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_models_are_listed_and_told_apart(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["emoji-4", "emoji-1"]
    assert client.models.retrieve("emoji-4@1").version == "1"  # type: ignore[attr-defined]
    model = client.models.retrieve("emoji-1")
    assert model.object == "model"
    assert model.num_inference_steps == [1]
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("dall-e-3")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("path", "method", "data", "status", "code"),
    [
        ("/v1/images/variations", "POST", b"{}", 404, "unknown_url"),
        ("/nothing/here", "GET", None, 404, "unknown_url"),
        ("/v1/images/generations", "GET", None, 405, "method_not_allowed"),
        ("/v1/images/generations", "POST", b"{not json", 400, "invalid_json"),
        ("/v1/images/generations", "POST", b"[1]", 400, "invalid_type"),
        ("/v1/images/generations", "POST", b'{"prompt": "' + b"a" * 1_100_000 + b'"}', 413, "request_too_large"),
    ],
)
def test_every_failure_has_openais_error_body(
    server: RunningServer, path: str, method: str, data: bytes | None, status: int, code: str
) -> None:
    got_status, body = raw(server.url + path, method, data)
    assert (got_status, body["error"]["code"]) == (status, code)
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}


def test_healthz_is_ready_with_the_models(server: RunningServer) -> None:
    assert raw(f"{server.url}/healthz") == (200, {"status": "ready", "models": ["emoji-4", "emoji-1"]})


def test_concurrent_requests_run_as_one_batch(client: openai.OpenAI) -> None:
    engine = serve.get_deployment_handle("Engine", APPLICATION)
    before = engine.batch_sizes.remote().result()
    with ThreadPoolExecutor(8) as pool:
        answers = list(
            pool.map(lambda seed: client.images.generate(prompt=f"apple {seed}", extra_body={"seed": seed}), range(8))
        )
    assert [answer.data[0].seed for answer in answers if answer.data] == list(range(8))  # type: ignore[attr-defined]
    after = engine.batch_sizes.remote().result()
    ran = {size: count - before.get(size, 0) for size, count in after.items() if count > before.get(size, 0)}
    assert sum(size * count for size, count in ran.items()) == 8
    assert max(ran) > 1
    assert sum(ran.values()) < 8


def test_overload_is_refused_with_429_and_the_rest_is_answered(client: openai.OpenAI) -> None:
    def ask(seed: int) -> int | openai.RateLimitError:
        try:
            return len(client.images.generate(prompt="a red apple", n=8, extra_body={"seed": seed}).data or [])
        except openai.RateLimitError as error:
            return error

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(8)))
    refusals = [answer for answer in answers if isinstance(answer, openai.RateLimitError)]
    assert refusals
    assert {(error.code, error.response.headers["retry-after"]) for error in refusals} == {("queue_full", "1")}
    assert {answer for answer in answers if isinstance(answer, int)} == {8}
    assert client.images.generate(prompt="a red apple").data


def figures() -> str:
    """What Prometheus reads from Ray."""
    port = ray.nodes()[0]["MetricsExportPort"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return answer.read().decode()


def figure(name: str, **tags: str) -> float | None:
    """The sum of a figure over its lines with all these tags; None when there are none."""
    wanted = [f'{tag}="{value}"' for tag, value in tags.items()]
    lines = [line for line in figures().splitlines() if line.startswith(f"ray_fewstep_serve_{name}{{")]
    values = [float(line.rsplit(" ", 1)[1]) for line in lines if all(tag in line for tag in wanted)]
    return sum(values) if values else None


def wait_until(is_so: Callable[[], Any], timeout_s: float = 60.0) -> float:
    """Seconds until something is so."""
    began_s = time.monotonic()
    while not is_so():
        assert time.monotonic() - began_s < timeout_s
        time.sleep(0.1)
    return time.monotonic() - began_s


@pytest.mark.long
def test_the_alias_is_followed_under_load_and_a_broken_version_refused(
    client: openai.OpenAI, registry: Registry
) -> None:
    drawn: list[str] = []
    ended = threading.Event()

    def ask() -> None:
        while not ended.is_set():
            answer = client.images.generate(prompt="a red apple", n=2, model="emoji-4", extra_body={"seed": 3})
            drawn.append(answer.model)  # type: ignore[attr-defined]

    def serves(version: int) -> Callable[[], bool]:
        return lambda: client.models.retrieve("emoji-4").version == str(version)  # type: ignore[attr-defined]

    picture = client.images.generate(prompt="a red apple", model="emoji-4", extra_body={"seed": 3}).data
    with ThreadPoolExecutor(2) as pool:
        asking = [pool.submit(ask) for _ in range(2)]
        try:
            registry.set_alias("emoji-4", "champion", 2)
            took_s = [wait_until(serves(2))]
            with pytest.raises(openai.NotFoundError, match="another version is: name emoji-4@2"):
                client.images.generate(prompt="a red apple", model="emoji-4@1")
            registry.set_alias("emoji-4", "champion", 3)
            wait_until(lambda: figure("reload_failures_total", model="emoji-4"))
            assert serves(2)()
            registry.set_alias("emoji-4", "champion", 1)
            took_s.append(wait_until(serves(1)))
            count = len(drawn)
            wait_until(lambda: len(drawn) > count + 4)
        finally:
            ended.set()
        for task in asking:
            task.result()  # no request has failed
    order = [version for version, _ in itertools.groupby(sorted_out(drawn))]
    assert order == ["emoji-4@1", "emoji-4@2", "emoji-4@1"]
    again = client.images.generate(prompt="a red apple", model="emoji-4", extra_body={"seed": 3}).data
    assert picture is not None
    assert again is not None
    assert png(picture[0]) == png(again[0]), "rolled back to the bit"
    assert max(took_s) < 30
    wait_until(lambda: figure("reloads_total", model="emoji-4") == 2)
    wait_until(lambda: figure("model_version", uri="models:/emoji-4@champion") == 1)
    for name in ("request_seconds_count", "draw_seconds_count", "batch_size_sum"):
        assert figure(name, model="emoji-4")
    assert figure("request_seconds_count", code="429") or figure("request_seconds_count", code="404")
    assert figure("queued_images") is not None


def sorted_out(labels: list[str]) -> list[str]:
    """The labels without those that answers of two threads may have swapped at a change."""
    return [b for a, b, c in zip(labels, labels[1:], labels[2:], strict=False) if b in (a, c)]


@pytest.mark.long
def test_a_model_that_cannot_be_loaded_is_said_once_and_nothing_stays(server: RunningServer, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        run_server(
            ServeSettings(
                models=("missing-folder",), port=int(server.url.rsplit(":", 1)[1]), route_prefix="/broken", num_cpus=0.1
            ),
            name="broken",
            announce=print,
        )
    assert set(serve.status().applications) == {APPLICATION}


def test_port_zero_needs_a_serve_of_its_own(server: RunningServer) -> None:
    with pytest.raises(FewstepError, match="name its port"):
        run_server(ServeSettings(models=("x",), port=0))
