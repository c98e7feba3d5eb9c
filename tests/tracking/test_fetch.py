import http.server
import json
import os
import shutil
import threading
import time
import uuid
from pathlib import Path

import pytest

from fewstep.errors import ModelError, StorageError
from fewstep.tracking.cache import cached_folder
from fewstep.tracking.fetch import fetch_model, packaged_model


@pytest.fixture(autouse=True)
def _home(monkeypatch, tmp_path):
    monkeypatch.setenv("FEWSTEP_HOME", str(tmp_path / "home"))


def _model(folder: Path, **files: str) -> Path:
    for name, text in {"model_index.json": "{}", **files}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_folder_is_taken_as_it_is(tmp_path):
    folder = _model(tmp_path / "teacher")
    assert fetch_model(str(folder)) == folder


def test_folder_without_a_model_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"empty has neither model_index\.json"):
        fetch_model(str(tmp_path / "empty"))


@pytest.mark.parametrize("uri", ["./no/such/folder", "/no/such", "http://host/model", "stable-diffusion"])
def test_name_that_leads_nowhere_lists_the_forms(uri):
    with pytest.raises(ModelError, match=r"no such folder.*s3://BUCKET/FOLDER.*hub id ORG/NAME"):
        fetch_model(uri)


def test_file_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_text("")
    with pytest.raises(ModelError, match="it is a file"):
        fetch_model(str(path))


def test_mistyped_path_is_not_asked_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(ModelError, match="runs/studnt: there is no such folder"):
        fetch_model("runs/studnt")


def test_hub_without_a_network_says_so_and_what_to_do(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"some-org/some-model.*HF_HUB_OFFLINE is set.*local cache.*name the folder"):
        fetch_model("some-org/some-model")


def test_hub_model_in_the_local_cache_needs_no_network(monkeypatch, tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--some-org--some-model"
    _model(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert fetch_model("some-org/some-model") == repository / "snapshots" / commit


class _Hub(http.server.BaseHTTPRequestHandler):
    """A hub with one model of one file."""

    def do_GET(self):
        body = b"{}"
        if "/tree/" in self.path:
            body = json.dumps([{"type": "file", "path": "model_index.json", "size": 2, "oid": "e" * 40}]).encode()
        elif self.path.startswith("/api/"):
            body = json.dumps({"id": "some-org/some-model", "sha": "a" * 40}).encode()
        self.send_response(200)
        for name, value in {"Content-Length": len(body), "ETag": '"e"', "X-Repo-Commit": "a" * 40}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub_cache(monkeypatch, tmp_path):
    """The folder that models are fetched to from a hub on this machine."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    constants = {
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
    }
    for name, value in constants.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    yield tmp_path / "hub"
    server.shutdown()
    server.server_close()


def test_hub_model_is_fetched_into_the_local_cache(hub_cache):
    folder = fetch_model("some-org/some-model")
    assert folder == hub_cache / "models--some-org--some-model" / "snapshots" / ("a" * 40)
    assert (folder / "model_index.json").read_text() == "{}"


def test_full_disk_is_not_taken_for_a_hub_out_of_reach(hub_cache, monkeypatch):
    number = uuid.UUID(int=0)
    monkeypatch.setattr(uuid, "uuid4", lambda: number)  # so that the file that is downloaded to can be put on /dev/full
    blobs = hub_cache / "models--some-org--some-model" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"e.{number.hex[:8]}.incomplete").symlink_to("/dev/full")
    with pytest.raises(
        StorageError, match=rf"some-org/some-model.* disk is full.*{hub_cache} has \d+ MB.*HF_HUB_CACHE"
    ):
        fetch_model("some-org/some-model")


def test_hub_cache_that_cannot_be_made_is_said(hub_cache):
    hub_cache.write_text("")
    with pytest.raises(StorageError, match=rf"{hub_cache}.* a file is where a folder is needed.*HF_HUB_CACHE"):
        fetch_model("some-org/some-model")


def test_student_asset_takes_what_it_lacks_from_its_base(tmp_path):
    assets = tmp_path / "assets"
    _model(assets / "teacher", **{"vae/w": "vae", "unet/w": "teacher unet", "unet/config.json": "{}"})
    student = assets / "student"
    (student / "unet").mkdir(parents=True)
    (student / "unet" / "w").write_text("student unet")
    (student / "fewstep.json").write_text("{}")
    (student / "compose.json").write_text(json.dumps({"base": "teacher"}))
    folder = packaged_model("student", assets=assets)
    found = {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}
    assert found == {
        "model_index.json": "{}",
        "vae/w": "vae",
        "unet/w": "student unet",
        "unet/config.json": "{}",
        "fewstep.json": "{}",
    }
    assert packaged_model("student", assets=assets) == folder
    (student / "unet" / "w").write_text("another unet")  # fewstep was upgraded
    assert (packaged_model("student", assets=assets) / "unet" / "w").read_text() == "another unet"
    assert packaged_model("teacher", assets=assets) == assets / "teacher"


def test_assets_in_a_circle_and_unknown_ones_are_said(tmp_path):
    for name, base in (("a", "b"), ("b", "a")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "compose.json").write_text(json.dumps({"base": base}))
    with pytest.raises(ModelError, match="built on"):
        packaged_model("a", assets=tmp_path)
    with pytest.raises(ModelError, match="It ships a, b"):
        packaged_model("../a", assets=tmp_path)


def test_cache_fills_once_for_many_and_never_shows_a_half(tmp_path):
    fills = []

    def fill(folder: Path) -> None:
        fills.append(1)
        _model(folder)

    def fail(folder: Path) -> None:
        _model(folder)
        raise ModelError("cut short")

    with pytest.raises(ModelError, match="cut short"):
        cached_folder(Path("models/x"), fail)
    assert not (tmp_path / "home" / "cache" / "models" / "x").exists()
    threads = [threading.Thread(target=cached_folder, args=(Path("models/x"), fill)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fills) == 1
    assert sorted(path.name for path in (tmp_path / "home" / "cache" / "models").iterdir()) == ["x", "x.lock"]


def _fill(folder: Path) -> None:
    _model(folder)
    (folder / "weights").write_bytes(b"0" * 1_000_000)


def _age(folder: Path, hours: float) -> None:
    then = time.time() - hours * 3600
    os.utime(folder, (then, then))


def test_cache_is_kept_below_its_limit_and_what_was_used_last_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("FEWSTEP_CACHE_GB", "0.0025")
    cache = tmp_path / "home" / "cache"
    old, older, recent = (cached_folder(Path("s3", name), _fill) for name in ("old", "older", "recent"))
    assert all(folder.is_dir() for folder in (old, older, recent)), "used within the hour"
    _age(older, 5)
    _age(old, 3)
    cached_folder(Path("s3", "older"), _fill)  # asked for again: now the newest
    cached_folder(Path("models", "new"), _fill)
    assert {folder.name for folder in cache.glob("*/*") if folder.is_dir()} == {"older", "recent", "new"}
    assert (older / "weights").stat().st_size == 1_000_000


def test_cache_takes_out_what_killed_processes_left(tmp_path, monkeypatch):
    monkeypatch.setenv("FEWSTEP_CACHE_GB", "0.0015")
    cache = tmp_path / "home" / "cache"
    left = cache / "s3" / ".half-abc123"
    _fill(left)
    _age(left, 2)
    cached_folder(Path("s3", "whole"), _fill)
    assert sorted(folder.name for folder in (cache / "s3").iterdir() if folder.is_dir()) == ["whole"]


def test_deleting_never_shows_a_half(tmp_path, monkeypatch):
    monkeypatch.setenv("FEWSTEP_CACHE_GB", "0")
    old = cached_folder(Path("s3", "old"), _fill)
    _age(old, 2)
    real = shutil.rmtree

    def killed(path, *arguments, **options):
        if "deleted" in str(path) and Path(path).exists():
            raise KeyboardInterrupt
        real(path, *arguments, **options)

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        cached_folder(Path("s3", "new"), _fill)
    assert not old.exists()
    monkeypatch.undo()
    monkeypatch.setenv("FEWSTEP_HOME", str(tmp_path / "home"))
    assert (cached_folder(Path("s3", "old"), _fill) / "weights").stat().st_size == 1_000_000


def test_cache_has_room_by_default(tmp_path):
    first = cached_folder(Path("s3", "first"), _fill)
    _age(first, 100)
    cached_folder(Path("s3", "second"), _fill)
    assert first.is_dir()


@pytest.mark.parametrize("limit", ["much", "-1", "nan"])
def test_cache_limit_that_is_no_size_is_said(monkeypatch, limit):
    monkeypatch.setenv("FEWSTEP_CACHE_GB", limit)
    with pytest.raises(StorageError, match=f"FEWSTEP_CACHE_GB='{limit}' must be a size in GB"):
        cached_folder(Path("models/x"), _model)


def test_cache_that_cannot_be_written_is_said(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEWSTEP_HOME", str(tmp_path / "file"))
    with pytest.raises(StorageError, match="set FEWSTEP_HOME"):
        cached_folder(Path("models/x"), _model)
