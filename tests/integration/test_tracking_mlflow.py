"""Runs, students and aliases in a real MLflow, with the files in a real S3 server."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from fewstep.errors import ModelError, StorageError, TrackingError
from fewstep.storage import Storage, StorageSettings, join
from fewstep.tracking.fetch import fetch_model
from fewstep.tracking.registry import Registry
from fewstep.tracking.settings import TrackingSettings
from fewstep.tracking.tracker import Tracker

_numbers = itertools.count()


@pytest.fixture(scope="module")
def database_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


@pytest.fixture
def tracker(database_uri: str, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tracker:
    monkeypatch.setenv("FEWSTEP_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    settings = TrackingSettings(uri=database_uri, experiment=f"s3-{next(_numbers)}", flush_every_s=0.1)
    return Tracker.open(settings, storage)


@pytest.fixture
def student(tmp_path: Path) -> Path:
    folder = tmp_path / "student"
    (folder / "unet").mkdir(parents=True)
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    (folder / "fewstep.json").write_text('{"num_inference_steps": 4}')
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(os.urandom(300_000))
    return folder


def _tags(**changes: str) -> dict[str, str]:
    return {"num_inference_steps": "4", "teacher": "t", "data_digest": "d", "fingerprint": "f1"} | changes


def _register(tracker: Tracker, folder: Path, name: str, **changes: str) -> int:
    with tracker.run("register", key=f"register-{name}") as run:
        return Registry(tracker).log_student(
            run, folder, name=name, params={"guidance": {"w_max": 4.0}}, tags=_tags(**changes), metrics={"kid": 0.25}
        )


def _files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_student_goes_through_the_registry_unchanged(tracker: Tracker, storage: Storage, student: Path, tmp_path: Path):
    registry = Registry(tracker)
    version = _register(tracker, student, "round-trip")
    assert registry.promote("round-trip", version, passed=True, reason="kid 0.25 <= 0.30") == "champion"
    folder = fetch_model("models:/round-trip@champion", storage=storage, tracking=tracker)
    assert _files(folder) == _files(student)
    model = registry.get("models:/round-trip/1")
    assert (model.version, model.aliases, model.num_inference_steps) == (1, ("champion",), 4)
    assert model.tags["fewstep.teacher"] == "t"
    assert model.tags["fewstep.data_digest"] == "d"
    assert model.tags["fewstep.gate_reason"] == "kid 0.25 <= 0.30"
    assert model.source.startswith(storage.root)
    logged = tracker.client.get_logged_model(model.tags["fewstep.model_id"])
    assert str(logged.status) == "READY"
    assert logged.params == {"guidance.w_max": "4.0"}
    assert [(metric.key, metric.value) for metric in logged.metrics] == [("kid", 0.25)]
    assert logged.source_run_id == model.run_id
    assert not (tmp_path / "mlflow.db").exists(), "something used MLflow's own default database"
    assert not (tmp_path / "mlruns").exists()


def test_second_fetch_needs_no_object_store(tracker: Tracker, student: Path):
    _register(tracker, student, "cached")
    first = fetch_model("models:/cached/1", tracking=tracker)
    without_store = Tracker.open(tracker.settings)
    assert fetch_model("models:/cached/1", tracking=without_store) == first
    _register(tracker, student, "cached", fingerprint="f2")
    with pytest.raises(TrackingError, match="no object store is open"):
        fetch_model("models:/cached/2", tracking=without_store)


def test_same_fingerprint_is_registered_once(tracker: Tracker, student: Path):
    assert _register(tracker, student, "once") == 1
    assert _register(tracker, student, "once") == 1
    assert _register(tracker, student, "once", num_inference_steps="2") == 2
    assert _register(tracker, student, "once", fingerprint="f2") == 3
    assert [model.version for model in Registry(tracker).versions("once")] == [3, 2, 1]
    assert "once" in Registry(tracker).names()


def test_version_keeps_the_code_that_it_was_registered_by(
    tracker: Tracker, student: Path, monkeypatch: pytest.MonkeyPatch
):
    registry = Registry(tracker)
    monkeypatch.setenv("FEWSTEP_GIT_COMMIT", "a")
    assert _register(tracker, student, "code", evaluation="e1") == 1
    tracker.client.set_model_version_tag("code", "1", "fewstep.torch", "1.0")  # as if it was made with that one
    first = registry.get("models:/code/1").tags
    assert first["fewstep.git_commit"] == first["mlflow.source.git.commit"] == "a"
    monkeypatch.setenv("FEWSTEP_GIT_COMMIT", "b")
    assert _register(tracker, student, "code", evaluation="e2") == 1
    assert registry.get("models:/code/1").tags == {**first, "fewstep.evaluation": "e2"}
    assert _register(tracker, student, "code", fingerprint="f2") == 2
    assert registry.get("models:/code/2").tags["fewstep.git_commit"] == "b"
    with tracker.run("register", key="register-code") as run:
        trained_by = {"fewstep.git_commit": "a"}  # weights of before, registered anew by other code
        third = registry.log_student(
            run, student, name="code", params={}, tags=_tags(fingerprint="f3"), metrics={}, code=trained_by
        )
    assert registry.get(f"models:/code/{third}").tags["fewstep.git_commit"] == "a"


def test_champion_changes_only_through_the_gate(tracker: Tracker, student: Path):
    registry = Registry(tracker)
    assert registry.get_champion("gate") is None
    versions = [_register(tracker, student, "gate", fingerprint=name) for name in ("a", "b", "c")]
    assert registry.promote("gate", versions[0], passed=True, reason="good") == "champion"
    assert registry.promote("gate", versions[1], passed=False, reason="kid 0.5 > 0.3") == "candidate"
    champion = registry.get_champion("gate")
    assert champion is not None
    assert champion.version == 1
    assert registry.get("models:/gate@candidate").tags["fewstep.gate_reason"] == "kid 0.5 > 0.3"
    registry.promote("gate", versions[1], passed=True, reason="the gate was widened")
    assert registry.get("models:/gate/2").aliases == ("champion",)
    assert registry.find("models:/gate@candidate") is None
    assert registry.get("models:/gate/1").aliases == ()
    assert registry.promote("gate", versions[1], passed=False, reason="the gate was narrowed") == "candidate"
    assert registry.get_champion("gate") is None
    assert registry.get("models:/gate/2").aliases == ("candidate",)


def test_upload_that_fails_leaves_no_version(tracker: Tracker, student: Path, storage: Storage):
    gone = Storage(
        StorageSettings(
            kind="s3", endpoint_url="http://127.0.0.1:9", bucket="tests", retry_attempts=1, retry_total_s=1
        ),
        credentials=storage._credentials,
    )
    broken = Tracker(tracker.client, tracker.experiment_id, settings=tracker.settings, storage=gone)
    with pytest.raises(StorageError, match=r"127\.0\.0\.1:9"):
        _register(broken, student, "broken")
    assert Registry(tracker).versions("broken") == []
    models = tracker.client.search_logged_models([tracker.experiment_id])
    assert [str(model.status) for model in models] == ["FAILED"]
    assert _register(tracker, student, "broken") == 1


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("models:/here@champion", r"has no such version of 'here'\. It has version 1\."),
        ("models:/here/7", r"no such version"),
        ("models:/elsewhere/1", r"has no model 'elsewhere'\. It has .*'here'"),
        ("models:/here", r"models:/NAME@ALIAS or models:/NAME/VERSION"),
        ("models:/he're/1", r"must begin with a letter"),
    ],
)
def test_model_that_is_not_there_is_named_with_what_is(tracker: Tracker, student: Path, uri: str, says: str):
    _register(tracker, student, "here")
    with pytest.raises(TrackingError, match=says):
        fetch_model(uri, tracking=tracker)


def test_version_must_say_what_made_it(tracker: Tracker, student: Path, tmp_path: Path):
    with tracker.run("register", key="r") as run:
        registry = Registry(tracker)
        with pytest.raises(TrackingError, match="tags teacher, fingerprint are missing"):
            registry.log_student(
                run, student, name="x", params={}, tags={"num_inference_steps": "4", "data_digest": "d"}, metrics={}
            )
        with pytest.raises(TrackingError, match=r"no model_index\.json"):
            registry.log_student(run, tmp_path, name="x", params={}, tags=_tags(), metrics={})


def test_files_and_pictures_of_a_run_lie_in_the_store(tracker: Tracker, storage: Storage, tmp_path: Path):
    (tmp_path / "report.json").write_text("{}")
    with tracker.run("evaluate", key="files") as run:
        run.log_image(Image.new("RGB", (64, 64), "blue"), "grid", 2)
        run.log_artifact(tmp_path / "report.json", "report")
    assert run.lost == 0
    assert run.artifact_uri.startswith(join(storage.root, "mlflow"))
    names = sorted(info.uri.removeprefix(run.artifact_uri + "/") for info in storage.list(run.artifact_uri))
    assert [name.split("+")[0] for name in names] == ["images/grid", "images/grid", "report/report.json"]


def test_model_in_the_store_is_fetched_once_and_again_when_it_changes(
    storage: Storage, student: Path, bucket_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("FEWSTEP_HOME", str(tmp_path / "home"))
    uri = join(bucket_uri, "student")
    with pytest.raises(ModelError, match="there is nothing under this address"):
        fetch_model(uri, storage=storage)
    storage.upload_folder(student, uri)
    first = fetch_model(uri, storage=storage)
    assert _files(first) == _files(student)
    stamp = (first / "model_index.json").stat().st_mtime_ns
    assert fetch_model(uri, storage=storage) == first
    assert (first / "model_index.json").stat().st_mtime_ns == stamp
    (student / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(os.urandom(300_000))  # the same size
    storage.upload_folder(student, uri)
    assert _files(fetch_model(uri, storage=storage)) == _files(student)
    with pytest.raises(ModelError, match="no object store is open"):
        fetch_model(uri)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class _Server:
    def __init__(self, folder: Path, database_uri: str) -> None:
        self.uri = f"http://127.0.0.1:{_free_port()}"
        command = [
            sys.executable, "-m", "mlflow", "server", "--backend-store-uri", database_uri, "--host", "127.0.0.1",
            "--port", self.uri.rsplit(":", 1)[1], "--workers", "1", "--artifacts-destination", str(folder / "files"),
        ]  # fmt: skip
        # The job runner is a dozen more processes, which fewstep does not use.
        environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        self._log = folder / "server.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def wait(self) -> None:
        deadline_s = time.monotonic() + 120
        while time.monotonic() < deadline_s:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise AssertionError(self._log.read_text()[-2000:])

    def signal(self, number: int) -> None:
        os.killpg(self._process.pid, number)

    def end(self) -> None:
        self.signal(signal.SIGKILL)
        self._process.wait(30)


@pytest.fixture
def server(tmp_path: Path, database_uri: str) -> Iterator[_Server]:
    server = _Server(tmp_path, database_uri)
    try:
        server.wait()
        yield server
    finally:
        server.end()


@pytest.mark.slow
def test_server_that_hangs_and_comes_back(
    server: _Server, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setenv("FEWSTEP_HOME", str(tmp_path / "home"))
    settings = TrackingSettings(uri=server.uri, experiment="server", retries=0, timeout_s=5, flush_every_s=0.1)
    tracker = Tracker.open(settings)
    with tracker.run("train", key="outage") as run:
        run.log_metrics({"loss": 3.0}, 0)
        server.signal(signal.SIGSTOP)
        run.log_metrics({"loss": 2.0}, 1)
        run.log_image(Image.new("RGB", (8, 8)), "grid", 1)
        assert run.lost == 1
        server.signal(signal.SIGCONT)
        run.log_metrics({"loss": 1.0}, 2)
        version = Registry(tracker).log_student(run, student, name="served", params={}, tags=_tags(), metrics={})
    assert "The work goes on without this record" in caplog.text
    assert [metric.value for metric in tracker.client.get_metric_history(run.id, "loss")] == [3.0, 2.0, 1.0]
    assert tracker.client.get_run(run.id).info.status == "FINISHED"
    # Files that the server keeps itself (mlflow-artifacts:) need no object store.
    assert _files(fetch_model(f"models:/served/{version}", tracking=settings)) == _files(student)
