"""Storage on a real S3 server with credentials enforced."""

from __future__ import annotations

import contextlib
import errno
import http.client
import json
import os
import pickle
import signal
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fewstep.errors import StorageError
from fewstep.storage import ObjectChangedError, ObjectNotFoundError, Storage, StorageSettings, join, open_storage
from fewstep.storage.embedded import Credentials


def outside(storage: Storage, **changes: object) -> StorageSettings:
    """Settings of somebody who uses the server of `storage` as any S3."""
    values = {"kind": "s3", "endpoint_url": storage.endpoint_url, "bucket": "tests", "retry_base_s": 0.05}
    return StorageSettings(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture
def with_keys(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    values = storage.environment()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, values[name])
    return values


def test_objects(storage: Storage, bucket_uri: str) -> None:
    uri = join(bucket_uri, "a/b")
    assert not storage.exists(uri)
    assert storage.write_bytes(uri, b"one", if_absent=True)
    assert not storage.write_bytes(uri, b"two", if_absent=True)
    assert storage.read_bytes(uri) == b"one"
    assert storage.write_bytes(uri, b"")
    assert storage.read_bytes(uri) == b""
    assert storage.exists(uri)
    assert not storage.exists(join(bucket_uri, "a"))
    storage.delete(uri)
    storage.delete(uri)
    with pytest.raises(ObjectNotFoundError, match="a/b: no such object"):
        storage.read_bytes(uri)


def test_one_of_many_creators_wins(storage: Storage, bucket_uri: str) -> None:
    uri = join(bucket_uri, "lock")
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda n: storage.write_bytes(uri, b"%d" % n, if_absent=True), range(8)))
    assert sum(won) == 1
    assert storage.read_bytes(uri) == b"%d" % won.index(True)


@pytest.mark.slow
def test_list_and_delete_page(storage: Storage, bucket_uri: str) -> None:
    names = [f"n{number:04d}" for number in range(1050)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: storage.write_bytes(join(bucket_uri, "many", name), b"xy"), names))
    storage.write_bytes(join(bucket_uri, "many-others"), b"")
    found = list(storage.list(join(bucket_uri, "many")))
    assert [info.uri for info in found] == [join(bucket_uri, "many", name) for name in names]
    assert {info.size_bytes for info in found} == {2}
    storage.delete(join(bucket_uri, "many"), recursive=True)
    assert [info.uri for info in storage.list(bucket_uri)] == [join(bucket_uri, "many-others")]


def test_folders(storage: Storage, bucket_uri: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "unet").mkdir(parents=True)
    (source / "unet" / "weights").write_bytes(os.urandom(9_000_000))  # more than one part
    (source / "config.json").write_text("{}")
    (source / ".cache").write_text("junk")
    uri = join(bucket_uri, "model")
    storage.write_bytes(join(uri, "old"), b"of an earlier upload")
    storage.upload_folder(source, uri)
    assert [info.uri for info in storage.list(uri)] == [join(uri, "config.json"), join(uri, "unet/weights")]
    storage.download_folder(uri, tmp_path / "back")
    assert (tmp_path / "back/unet/weights").read_bytes() == (source / "unet/weights").read_bytes()
    storage.write_bytes(join(uri, ".uploading"), b"")
    with pytest.raises(StorageError, match="upload was cut short"):
        storage.download_folder(uri, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_works_in_another_process_and_after_fork(storage: Storage, bucket_uri: str) -> None:
    storage.write_bytes(join(bucket_uri, "x"), b"here")
    code = "import pickle, sys; s = pickle.load(sys.stdin.buffer); print(s.read_bytes(sys.argv[1]))"
    command = [sys.executable, "-c", code, join(bucket_uri, "x")]
    bare = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    result = subprocess.run(command, input=pickle.dumps(storage), capture_output=True, check=True, env=bare)
    assert result.stdout == b"b'here'\n"
    first = storage._client()
    storage._pid = -1  # what a forked child sees
    assert storage._client() is not first


def test_arrow_filesystem(storage: Storage, bucket_uri: str) -> None:
    filesystem, path = pickle.loads(pickle.dumps(storage.arrow_filesystem()))
    assert path == "tests"
    folder = bucket_uri.removeprefix("s3://")
    filesystem.create_dir(f"{folder}/run/checkpoint")
    with filesystem.open_output_stream(f"{folder}/run/checkpoint/state") as stream:
        stream.write(b"123")
    assert storage.read_bytes(join(bucket_uri, "run/checkpoint/state")) == b"123"
    assert [info.uri for info in storage.list(bucket_uri)] == [join(bucket_uri, "run/checkpoint/state")]


def test_environment_is_enough_for_any_client(storage: Storage, bucket_uri: str, tmp_path: Path) -> None:
    storage.write_bytes(join(bucket_uri, "x"), b"here")
    code = "import boto3, sys; print(boto3.client('s3').get_object(Bucket='tests', Key=sys.argv[1])['Body'].read())"
    command = [sys.executable, "-c", code, join(bucket_uri, "x").removeprefix("s3://tests/")]
    environment = {**storage.environment(), "PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    result = subprocess.run(command, capture_output=True, check=True, env=environment)
    assert result.stdout == b"b'here'\n"


@pytest.mark.parametrize(
    ("key", "secret", "code"),
    [("right", "wrong", "SignatureDoesNotMatch"), ("unknown", "wrong", "InvalidAccessKeyId")],
)
def test_wrong_credentials_are_said(
    storage: Storage, with_keys: dict[str, str], monkeypatch: pytest.MonkeyPatch, key: str, secret: str, code: str
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    if key == "unknown":
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
    with (
        pytest.raises(StorageError, match=rf"refuses the credentials \({code}\).*AWS_SECRET_ACCESS_KEY"),
        open_storage(outside(storage)),
    ):
        pass


@pytest.mark.usefixtures("with_keys")
def test_missing_bucket_is_said(storage: Storage) -> None:
    with (
        pytest.raises(StorageError, match=r"bucket 'elsewhere' does not exist.*aws s3 mb s3://elsewhere"),
        open_storage(outside(storage, bucket="elsewhere")),
    ):
        pass
    for action in (storage.read_bytes, storage.exists, lambda uri: storage.write_bytes(uri, b"")):
        with pytest.raises(StorageError, match="bucket 'elsewhere' does not exist"):
            action("s3://elsewhere/key")


@pytest.mark.usefixtures("with_keys")
def test_any_s3_by_endpoint_and_environment(storage: Storage, bucket_uri: str) -> None:
    with open_storage(outside(storage, prefix="deep/er")) as other:
        assert other.root == "s3://tests/deep/er"
        other.write_bytes(join(bucket_uri, "x"), b"1")
        filesystem, path = other.arrow_filesystem()
        assert path == "tests/deep/er"
        assert filesystem.get_file_info(join(bucket_uri, "x").removeprefix("s3://")).size == 1
    assert storage.read_bytes(join(bucket_uri, "x")) == b"1"


class FlakyProxy:
    """Forwards TCP to the server; cuts each of the first connections after so many bytes of the answer."""

    def __init__(self, target: str, cuts: list[int], *, stall: bool = False, trickle: bool = False) -> None:
        self.target, self.cuts, self.stall, self.trickle = target, cuts, stall, trickle
        self.connections = 0
        self.before_cut: threading.Event | None = None
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                limit = self.cuts[self.connections] if self.connections < len(self.cuts) else None
                self.connections += 1
                host, port = self.target.removeprefix("http://").split(":")
                server = socket.create_connection((host, int(port)))
                threading.Thread(target=self._pump, args=(client, server, None), daemon=True).start()
                threading.Thread(target=self._pump, args=(server, client, limit), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, limit: int | None) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if limit is not None and passed + len(data) > limit:
                    target.sendall(data[: limit - passed])
                    for byte in data[limit - passed :] if self.trickle else ():
                        target.sendall(bytes([byte]))
                        time.sleep(0.05)
                    if self.stall:
                        return  # leaves both connections open and silent
                    break
                target.sendall(data)
                passed += len(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


@contextlib.contextmanager
def flaky(
    storage: Storage, cuts: list[int], *, stall: bool = False, trickle: bool = False, **changes: object
) -> Iterator[tuple]:
    proxy = FlakyProxy(str(storage.endpoint_url), cuts, stall=stall, trickle=trickle)
    yield proxy, Storage(outside(storage, endpoint_url=proxy.url, **changes))
    proxy.listener.close()


@pytest.mark.usefixtures("with_keys")
def test_a_read_goes_on_where_the_connection_broke(storage: Storage, bucket_uri: str) -> None:
    data = os.urandom(5_000_000)
    storage.write_bytes(join(bucket_uri, "big"), data)
    with flaky(storage, [1_500_000, 100, 2_000_000, 700_000]) as (proxy, through):
        assert through.read_bytes(join(bucket_uri, "big")) == data
        assert proxy.connections == 5
    with flaky(storage, [1_000_000, 50]) as (proxy, through), through.open(join(bucket_uri, "big")) as stream:
        pieces = []
        while piece := stream.read(300_001):
            pieces.append(piece)
        assert b"".join(pieces) == data


def test_a_file_is_written_in_one_step_wherever_it_goes(storage: Storage, bucket_uri: str, tmp_path: Path) -> None:
    data = os.urandom(20_000_000)  # more than one part of an upload
    (tmp_path / "file").write_bytes(data)
    for uri in (join(bucket_uri, "big"), str(tmp_path / "folder" / "copy")):
        storage.upload_file(tmp_path / "file", uri)
        assert storage.read_bytes(uri) == data
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["copy"]
    (info,) = storage.list(bucket_uri)
    assert storage.read_range(info.uri, 0, 5, etag=info.etag).etag == info.etag
    with pytest.raises(StorageError, match="no such file"):
        storage.upload_file(tmp_path / "missing", str(tmp_path / "other"))


def test_ranges(storage: Storage, bucket_uri: str, tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    (tmp_path / "big").write_bytes(data)
    storage.write_bytes(join(bucket_uri, "big"), data)
    for uri in (join(bucket_uri, "big"), str(tmp_path / "big")):
        for start, end in ((0, 1), (512, 2_000_512), (2_999_999, 3_000_000), (0, 3_000_000)):
            part = storage.read_range(uri, start, end)
            assert bytes(part.data) == data[start:end]
            assert part.size_bytes == 3_000_000
        assert bytes(storage.read_range(uri, 2_999_000, 9_000_000).data) == data[2_999_000:]
        assert bytes(storage.read_range(uri, 3_000_000, 3_000_001).data) == b""
        with pytest.raises(StorageError, match="range 5 to 5 is empty"):
            storage.read_range(uri, 5, 5)
        with pytest.raises(ObjectNotFoundError, match="no such"):
            storage.read_range(uri + "?", 0, 5)
    (info,) = storage.list(bucket_uri)
    assert storage.read_range(info.uri, 0, 5, etag=info.etag).etag == info.etag
    storage.write_bytes(info.uri, bytes(3_000_000))
    with pytest.raises(ObjectChangedError, match="written again"):
        storage.read_range(info.uri, 0, 5, etag=info.etag)


@pytest.mark.usefixtures("with_keys")
def test_a_range_goes_on_where_the_connection_broke(storage: Storage, bucket_uri: str) -> None:
    uri, data = join(bucket_uri, "big"), os.urandom(5_000_000)
    storage.write_bytes(uri, data)
    with flaky(storage, [1_500_000, 100, 2_000_000, 700_000]) as (proxy, through):
        assert bytes(through.read_range(uri, 1000, 4_900_000).data) == data[1000:4_900_000]
        assert proxy.connections == 5
    with flaky(storage, [1_000_000], stall=True, read_timeout_s=0.5) as (proxy, through):
        assert bytes(through.read_range(uri, 0, 3_000_000).data) == data[:3_000_000]
        assert proxy.connections == 2
    with (
        flaky(storage, [1_000_000] + [50] * 9, retry_attempts=4) as (_, through),
        pytest.raises(StorageError, match=r"big at byte \d+: .* did not answer properly in 4 attempts|in 4 attempts"),
    ):
        through.read_range(uri, 0, 5_000_000)


@pytest.mark.parametrize(
    "error",
    [
        ssl.SSLError(1, "[SSL: DECRYPTION_FAILED_OR_BAD_RECORD_MAC]"),
        http.client.IncompleteRead(b""),
        OSError(errno.EHOSTUNREACH, "No route to host"),
        TimeoutError("timed out"),
    ],
)
def test_a_range_goes_on_after_any_break(
    error: Exception, storage: Storage, bucket_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, data = join(bucket_uri, "big"), os.urandom(3_000_000)
    storage.write_bytes(uri, data)
    readinto, calls = http.client.HTTPResponse.readinto, []

    def broken(self: http.client.HTTPResponse, buffer: memoryview) -> int:
        calls.append(len(buffer))
        if len(calls) == 2:
            raise error
        return readinto(self, buffer)

    monkeypatch.setattr(http.client.HTTPResponse, "readinto", broken)
    assert bytes(storage.read_range(uri, 0, 3_000_000).data) == data
    assert (calls[:3], sum(calls[2:])) == ([1 << 20, 1 << 20, 1 << 16], 3_000_000 - (1 << 20))


@pytest.mark.usefixtures("with_keys")
def test_ranges_that_are_read_in_turn_share_a_connection(storage: Storage, bucket_uri: str) -> None:
    uri, data = join(bucket_uri, "big"), os.urandom(5_000_000)
    storage.write_bytes(uri, data)
    with flaky(storage, []) as (proxy, through):
        for start in range(0, 5_000_000, 700_000):
            assert bytes(through.read_range(uri, start, start + 700_000).data) == data[start : start + 700_000]
        assert proxy.connections == 1


@pytest.mark.usefixtures("with_keys")
def test_a_read_goes_on_after_a_silence(storage: Storage, bucket_uri: str) -> None:
    data = os.urandom(3_000_000)
    storage.write_bytes(join(bucket_uri, "big"), data)
    with flaky(storage, [1_000_000], stall=True, read_timeout_s=0.5) as (proxy, through):
        assert through.read_bytes(join(bucket_uri, "big")) == data
        assert proxy.connections == 2


@pytest.mark.usefixtures("with_keys")
def test_a_connection_that_trickles_is_cut(storage: Storage, bucket_uri: str, caplog: pytest.LogCaptureFixture) -> None:
    """A byte every 50 ms is no silence, and so no time-out would ever end it."""
    uri, data = join(bucket_uri, "big"), os.urandom(3_000_000)
    storage.write_bytes(uri, data)
    with flaky(storage, [1_000_000], trickle=True, read_timeout_s=0.5, read_min_bytes_per_s=1e6) as (proxy, through):
        assert bytes(through.read_range(uri, 0, 3_000_000).data) == data
        assert proxy.connections == 2
    with flaky(storage, [1_000_000], trickle=True, read_timeout_s=0.5, read_min_bytes_per_s=1e6) as (proxy, through):
        assert through.read_bytes(uri) == data
        assert proxy.connections == 2
    assert caplog.text.count("less than 1e+06 bytes/s (storage.read_min_bytes_per_s)") == 2


@pytest.mark.usefixtures("with_keys")
def test_a_connection_that_always_breaks_is_said(storage: Storage, bucket_uri: str) -> None:
    storage.write_bytes(join(bucket_uri, "big"), bytes(3_000_000))
    said = r"big at byte \d+: .* did not answer properly in 4 attempts"
    with (
        flaky(storage, [1_000_000] + [50] * 9, retry_attempts=4) as (_, through),
        pytest.raises(StorageError, match=said),
    ):
        through.read_bytes(join(bucket_uri, "big"))


@pytest.mark.usefixtures("with_keys")
def test_an_object_changed_in_the_middle_of_a_read_is_said(storage: Storage, bucket_uri: str) -> None:
    uri = join(bucket_uri, "big")
    storage.write_bytes(uri, bytes(5_000_000))
    with flaky(storage, [3_000_000]) as (_, through), through.open(uri) as stream:
        stream.read(1000)
        storage.write_bytes(uri, bytes(4_999_999) + b"x")
        with pytest.raises(ObjectChangedError, match="written again"):
            stream.read()


@pytest.mark.usefixtures("with_keys")
@pytest.mark.parametrize("cut", [0, 25])  # before and after "100 Continue": without and with the body sent
def test_a_create_whose_answer_was_lost_is_known_as_ours(storage: Storage, bucket_uri: str, cut: int) -> None:
    with flaky(storage, [cut]) as (proxy, through):
        assert through.write_bytes(join(bucket_uri, "lock"), b"me", if_absent=True)
        assert proxy.connections == 2
    assert storage.read_bytes(join(bucket_uri, "lock")) == b"me"


@pytest.mark.usefixtures("with_keys")
@pytest.mark.parametrize("size_bytes", [2, 100_000])
def test_a_write_whose_body_never_came_leaves_nothing(storage: Storage, bucket_uri: str, size_bytes: int) -> None:
    """As when the writer is killed: the server must not keep an empty object, which would look like a finished one."""
    uri = join(bucket_uri, "x")
    with flaky(storage, [0], retry_attempts=1) as (_, through), pytest.raises(StorageError, match="did not answer"):
        through.write_bytes(uri, os.urandom(size_bytes))
    time.sleep(0.3)
    assert not storage.exists(uri)


def test_a_second_user_shares_the_server_and_leaves_it(tmp_path: Path) -> None:
    settings = StorageSettings(home=tmp_path / "home", bucket="first")
    with open_storage(settings) as one:
        with open_storage(settings.model_copy(update={"bucket": "second"})) as two:
            assert two.endpoint_url == one.endpoint_url
            two.write_bytes("s3://first/x", b"1")
        assert one.read_bytes("s3://first/x") == b"1"
        path = tmp_path / "home" / "credentials.json"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with pytest.raises(StorageError, match="refuses the credentials"):
            Storage(settings, endpoint_url=one.endpoint_url, credentials=Credentials("a", "b")).check()
        pid = json.loads((tmp_path / "home" / "server.json").read_text())["pid"]
    assert not Path(f"/proc/{pid}").exists()


def test_two_that_start_at_once_share_one_server(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom fewstep.storage import *\n"
        "with open_storage(StorageSettings(home=sys.argv[1])) as s:\n"
        "    print(s.endpoint_url, flush=True); sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "home")]
    users = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(2)]
    said = [user.stdout.readline() for user in users if user.stdout]
    assert said[0] == said[1] != b""
    for user in users:
        user.communicate()


def test_data_survive_kill_9_of_the_server(tmp_path: Path) -> None:
    settings = StorageSettings(home=tmp_path / "home", retry_attempts=2, retry_base_s=0.01)
    with open_storage(settings) as one:
        for number in range(20):
            one.write_bytes(join(one.root, f"x{number}"), b"%d" % number * 1000)
        os.kill(json.loads((tmp_path / "home" / "server.json").read_text())["pid"], signal.SIGKILL)
        with pytest.raises(StorageError, match="did not answer"):
            one.read_bytes(join(one.root, "x1"))
        with open_storage(settings) as two:  # the pid file is stale now, and the ports are others
            assert two.endpoint_url != one.endpoint_url
            for number in range(20):
                assert two.read_bytes(join(two.root, f"x{number}")) == b"%d" % number * 1000
            two.write_bytes(join(two.root, "x1"), b"new")
    with open_storage(settings) as three:
        assert three.read_bytes(join(three.root, "x1")) == b"new"


def test_the_server_dies_with_a_killed_parent(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom fewstep.storage import *\n"
        "with open_storage(StorageSettings(home=sys.argv[1])) as s:\n"
        "    s.write_bytes(join(s.root, 'x'), b'1'); print('ready', flush=True); time.sleep(60)\n"
    )
    user = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "home")], stdout=subprocess.PIPE)
    assert user.stdout is not None
    assert user.stdout.readline() == b"ready\n"
    pid = json.loads((tmp_path / "home" / "server.json").read_text())["pid"]
    user.kill()
    user.communicate()
    deadline = time.monotonic() + 5
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _runs(pid)
    with open_storage(StorageSettings(home=tmp_path / "home")) as again:
        assert again.read_bytes(join(again.root, "x")) == b"1"


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_a_pid_file_of_another_program_is_not_believed(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "server.json").write_text(json.dumps({"pid": os.getpid(), "ports": {"s3": 1}}))
    with open_storage(StorageSettings(home=home)) as opened:
        opened.write_bytes(join(opened.root, "x"), b"1")


def test_a_server_that_cannot_start_shows_its_log(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "filerldb2").write_text("in the way")
    with (
        pytest.raises(StorageError, match=r"(?s)ended at once with status.*weed\.log.*filerldb2"),
        open_storage(StorageSettings(home=home)),
    ):
        pass
