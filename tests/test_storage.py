"""Storage without a server: addresses, settings, local files, and endpoints that do not answer."""

from __future__ import annotations

import errno
import http.server
import pickle
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from fewstep.errors import StorageError
from fewstep.storage import ObjectNotFoundError, Storage, StorageSettings, join, open_storage
from fewstep.storage.embedded import Credentials
from fewstep.storage.faults import disk_error

LOCAL = Storage(StorageSettings())


@pytest.fixture(autouse=True)
def _no_aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keeps the tests away from a user's own AWS settings, and from asking EC2 for a role."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")


@pytest.mark.parametrize(
    ("parts", "joined"),
    [
        (("s3://bucket", "a", "b.tar"), "s3://bucket/a/b.tar"),
        (("s3://bucket/a/", "/b/"), "s3://bucket/a/b"),
        (("s3://bucket", ""), "s3://bucket"),
        (("/folder/", "a"), "/folder/a"),
        (("/", "a"), "/a"),
        (("folder",), "folder"),
    ],
)
def test_join(parts: tuple[str, ...], joined: str) -> None:
    assert join(*parts) == joined


def test_settings_check_themselves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"set storage\.kind to s3"):
        StorageSettings(endpoint_url="http://host:9000")
    with pytest.raises(ValidationError, match="must begin with http"):
        StorageSettings(kind="s3", endpoint_url="host:9000")
    with pytest.raises(ValidationError, match="buckett"):
        StorageSettings(buckett="x")  # type: ignore[call-arg]
    monkeypatch.setenv("FEWSTEP_HOME", str(tmp_path))
    assert StorageSettings().home == tmp_path / "s3"
    assert Storage(StorageSettings(prefix="/a/b/")).root == "s3://fewstep/a/b"


def test_local_objects(tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/a/b.json"
    assert not LOCAL.exists(uri)
    assert LOCAL.write_bytes(uri, b"{}", if_absent=True)
    assert not LOCAL.write_bytes(uri, b"[]", if_absent=True)
    assert LOCAL.read_json(str(tmp_path / "a" / "b.json")) == {}
    LOCAL.write_json(uri, {"b": 1, "a": [2]})
    with LOCAL.open(uri) as stream:
        assert stream.read(1) == b"{"
    assert LOCAL.read_json(uri) == {"a": [2], "b": 1}
    LOCAL.write_bytes(str(tmp_path / "c"), b"12345")
    assert [(info.uri, info.size_bytes) for info in LOCAL.list(str(tmp_path))] == [
        (f"{tmp_path}/a/b.json", (tmp_path / "a" / "b.json").stat().st_size),
        (f"{tmp_path}/c", 5),
    ]
    LOCAL.delete(str(tmp_path / "a"))
    assert LOCAL.exists(uri)
    LOCAL.delete(str(tmp_path / "a"), recursive=True)
    assert not (tmp_path / "a").exists()
    LOCAL.delete(uri)
    with pytest.raises(ObjectNotFoundError, match=r"b\.json: no such file"):
        LOCAL.read_bytes(uri)


def test_local_folders(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "sub" / "__pycache__").mkdir(parents=True)
    for name in ("a", "sub/b", ".DS_Store", "sub/__pycache__/c.pyc", "d.tmp"):
        (source / name).write_text(name)
    LOCAL.upload_folder(source, str(tmp_path / "stored"))
    LOCAL.download_folder(str(tmp_path / "stored"), tmp_path / "back")
    assert sorted(str(p.relative_to(tmp_path)) for p in (tmp_path / "back").rglob("*") if p.is_file()) == [
        "back/a",
        "back/sub/b",
    ]
    with pytest.raises(StorageError, match="missing or empty"):
        LOCAL.upload_folder(tmp_path / "nothing", str(tmp_path / "x"))
    with pytest.raises(ObjectNotFoundError, match="nothing under this address"):
        LOCAL.download_folder(str(tmp_path / "nothing"), tmp_path / "x")


def test_failed_download_leaves_the_old_folder(tmp_path: Path) -> None:
    (tmp_path / "stored").mkdir()
    (tmp_path / "stored" / "a").write_text("new")
    (tmp_path / "stored" / "b").symlink_to(tmp_path / "loop")
    (tmp_path / "back").mkdir()
    (tmp_path / "back" / "a").write_text("old")
    (tmp_path / "loop").mkdir(mode=0)
    LOCAL.download_folder(str(tmp_path / "stored"), tmp_path / "back")
    assert (tmp_path / "back" / "a").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("uri", ["gs://bucket/key", "s3://", "http://host/x"])
def test_unknown_addresses_are_said(uri: str) -> None:
    with pytest.raises(StorageError, match="s3://BUCKET/KEY"):
        LOCAL.read_bytes(uri)


def test_a_full_local_disk_is_said() -> None:
    """/dev/full answers every write with ENOSPC, as a full disk does."""
    from fewstep.storage.local_files import disk_errors

    path = Path("/dev/full")
    with (
        pytest.raises(StorageError, match=r"write /dev/full: the disk is full.*MB free"),
        disk_errors(f"write {path}", path),
        path.open("wb") as file,
    ):
        file.write(b"x")


def test_a_full_disk_is_known_by_what_any_library_says_of_it(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for folder in (source, target):
        folder.mkdir()
    (source / "weights").write_bytes(b"x" * 100_000)
    (target / "weights").symlink_to("/dev/full")
    with pytest.raises(shutil.Error) as caught:
        shutil.copytree(source, target, dirs_exist_ok=True)  # an OSError without a number
    said = disk_error(caught.value, what="export", folders=[tmp_path])
    assert re.search(rf"^export: the disk is full .*{target}/weights.*{tmp_path} has \d+ MB free.*run again", str(said))
    # Of many folders only those that are full are named; /proc never has room.
    said = disk_error(caught.value, what="export", folders=[tmp_path, Path("/proc/self")])
    assert str(said).endswith(": /proc/self has 0 MB free. Free some and run again.")
    named = OSError(errno.ENOSPC, "No space left on device", str(source / "weights"), None, str(tmp_path / "x"))
    assert str(disk_error(named, what="export", folders=[])).startswith(f"export: write {tmp_path}/x: the disk is full")
    assert disk_error(ZeroDivisionError(), what="export", folders=[tmp_path]) is None


def test_a_path_that_may_not_be_used_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "folder"):
        with pytest.raises(OSError, match=r"exists|directory") as caught:
            path.mkdir()
        said = disk_error(caught.value, what="sample", folders=[path])
        assert str(said) == f"sample: {path} cannot be made: a file is where a folder is needed. Name another place."
    refused = PermissionError(errno.EACCES, "Permission denied", "/srv/x")  # never raised for root, who may do all
    said = disk_error(refused, what="sample", folders=[])
    assert "sample: /srv/x cannot be used: Permission denied. Give this user the right" in str(said)
    with pytest.raises(FileExistsError) as ours:
        tmp_path.mkdir()
    assert disk_error(ours.value, what="sample", folders=[]) is None  # a fault of ours keeps its stack


def test_too_little_room_for_the_embedded_server_is_said(tmp_path: Path) -> None:
    settings = StorageSettings(home=tmp_path / "s3", min_free_mb=10**9)
    with pytest.raises(StorageError, match=rf"{tmp_path}/s3 is full: \d+ MB free.*min_free_mb"), open_storage(settings):
        pass


def test_home_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(StorageError, match=r"storage\.home .*cannot be written"),
        open_storage(StorageSettings(home=tmp_path / "file" / "s3")),
    ):
        pass


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.usefixtures("keys")
def test_unreachable_endpoint_is_tried_again_then_said(caplog: pytest.LogCaptureFixture) -> None:
    url = f"http://127.0.0.1:{unused_port()}"
    settings = StorageSettings(kind="s3", endpoint_url=url, retry_attempts=4, retry_base_s=0.1)
    start = time.monotonic()
    with (
        pytest.raises(StorageError, match=rf"{url} did not answer properly in 4 attempts over \d\.\d s.*endpoint_url"),
        open_storage(settings),
    ):
        pass
    elapsed = time.monotonic() - start
    assert 0.35 <= elapsed < 10  # at least half of 0.1 + 0.2 + 0.4
    assert len([record for record in caplog.records if "attempt" in record.getMessage()]) == 3


@pytest.mark.usefixtures("keys")
def test_total_time_bounds_the_tries() -> None:
    settings = StorageSettings(
        kind="s3", endpoint_url=f"http://127.0.0.1:{unused_port()}", retry_attempts=1000, retry_total_s=0.5
    )
    start = time.monotonic()
    with pytest.raises(StorageError, match="did not answer"):
        Storage(settings).read_bytes("s3://bucket/key")
    assert time.monotonic() - start < 5


def test_no_credentials_are_said() -> None:
    settings = StorageSettings(kind="s3", endpoint_url=f"http://127.0.0.1:{unused_port()}")
    with pytest.raises(StorageError, match=r"no credentials.*AWS_ACCESS_KEY_ID"):
        Storage(settings).read_bytes("s3://bucket/key")


class _Answers(http.server.BaseHTTPRequestHandler):
    """A server that answers every request with the status in its path, then counts it."""

    count = 0
    body = b""
    status = 500

    def do_PUT(self) -> None:
        type(self).count += 1
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def answering() -> Iterator[tuple[type[_Answers], Storage]]:
    handler = type("Handler", (_Answers,), {})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    settings = StorageSettings(kind="s3", endpoint_url=url, retry_attempts=3, retry_base_s=0.01)
    yield handler, Storage(settings)
    server.shutdown()
    server.server_close()


def _s3_error(code: str, message: str) -> bytes:
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()


@pytest.mark.usefixtures("keys")
@pytest.mark.parametrize(
    ("status", "code", "message", "tries", "said"),
    [
        (507, "InsufficientStorage", "full", 1, "object store .* is full"),
        (500, "InternalError", "write: no space left on device", 1, "object store .* is full"),
        (500, "InternalError", "a hiccup", 3, "did not answer properly in 3 attempts.*a hiccup"),
        (503, "SlowDown", "slow", 3, "did not answer properly in 3 attempts"),
        (403, "AccessDenied", "no", 1, "denied.*s3:PutObject"),
        (403, "RequestTimeTooSkewed", "clock", 1, "Set the clock"),
        (400, "ExpiredToken", "old", 1, "refuses the credentials .ExpiredToken"),
        (400, "InvalidArgument", "odd", 1, "InvalidArgument.*odd"),
    ],
)
def test_answers_of_a_server_in_words(
    answering: tuple[type[_Answers], Storage], status: int, code: str, message: str, tries: int, said: str
) -> None:
    handler, storage = answering
    handler.status, handler.body = status, _s3_error(code, message)
    with pytest.raises(StorageError, match=said):
        storage.write_bytes("s3://bucket/key", b"x")
    assert handler.count == tries


@pytest.mark.parametrize(
    ("home", "tries", "said"), [("/proc", 1, "is full: .* /proc has 0 MB"), ("/tmp", 3, "a hiccup")]
)
def test_a_plain_500_of_the_embedded_server_on_a_full_disk(
    answering: tuple[type[_Answers], Storage], home: str, tries: int, said: str
) -> None:
    """SeaweedFS does not say that its disk is full; /proc is a disk that never has room."""
    handler, storage = answering
    handler.body = _s3_error("InternalError", "a hiccup")
    settings = storage.settings.model_copy(update={"kind": "embedded", "endpoint_url": None, "home": Path(home)})
    embedded = Storage(settings, endpoint_url=storage.endpoint_url, credentials=Credentials("someone", "secret"))
    with pytest.raises(StorageError, match=said):
        embedded.write_bytes("s3://bucket/key", b"x")
    assert handler.count == tries


def test_pickle_carries_no_client() -> None:
    storage = Storage(StorageSettings(kind="s3", endpoint_url="http://host:9000", bucket="models", prefix="a"))
    again = pickle.loads(pickle.dumps(storage))
    assert (again.root, again.endpoint_url, again.settings) == ("s3://models/a", "http://host:9000", storage.settings)
    assert again.environment() == storage.environment()
    assert "AWS_SECRET_ACCESS_KEY" not in storage.environment()
