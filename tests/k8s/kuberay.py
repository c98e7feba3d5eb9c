"""What Kubernetes and KubeRay do with the rendered objects, with real parts, on this machine.

A pod's environment comes from its own spec: ConfigMaps and Secrets by reference, in Kubernetes' order. Mounts become
folders below one, names of services become addresses of loopback. Ray is a real cluster with a head and a worker of
what the groups say, with the token that `authOptions` asks for, and jobs are submitted by the very line that KubeRay
v1.7.0 writes (ray-operator/controllers/ray/common/job.go, BuildJobSubmitCommand).
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from k8s.rendered import Manifest, find

BIN = Path(sys.executable).parent
_EXPANSION = re.compile(r"\$\(([A-Za-z_][A-Za-z0-9_]*)\)")
START_ATTEMPTS = 3
_SOURCES = {"configMapRef": "ConfigMap", "secretRef": "Secret"}
_KEYS = {"configMapKeyRef": "ConfigMap", "secretKeyRef": "Secret"}
#: What stands on this machine and what a pod does not have.
_OF_THE_MACHINE = ("PATH", "LANG", "TMPDIR", "PYTHONPATH", "VIRTUAL_ENV")


def free_port() -> int:
    """Return a port that nobody listens on, with the one 10,000 above it free too."""
    while True:
        with socket.socket() as probe, socket.socket() as above:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
            if port + 10_000 < 65_536:
                try:
                    above.bind(("127.0.0.1", port + 10_000))
                except OSError:
                    continue
                return port


@dataclass
class Namespace:
    """Objects as they were applied, the secrets that a user made, and where its services and mounts are here.

    Args:
        objects: rendered.
        secrets: name to keys and values.
        hosts: `name:port` of a service to its address here.
        paths: mount path to a folder here.
    """

    objects: list[Manifest]
    secrets: dict[str, dict[str, str]]
    hosts: dict[str, str] = field(default_factory=dict)
    paths: dict[str, Path] = field(default_factory=dict)

    def data(self, kind: str, name: str) -> dict[str, str] | None:
        """Return what is in a ConfigMap or Secret; None: there is none."""
        if kind == "Secret":
            return self.secrets.get(name)
        try:
            return dict(find(self.objects, kind, name)["data"])
        except ValueError:
            return None

    def environment(self, container: Manifest) -> dict[str, str]:
        """Return a container's environment as the kubelet makes it, and nothing of this process's own."""
        found: dict[str, str] = {}
        for source in container.get("envFrom", []):
            key = next(key for key in _SOURCES if key in source)
            kind, ref = _SOURCES[key], source[key]
            data = self.data(kind, ref["name"])
            assert data is not None or ref.get("optional"), f"{kind} {ref['name']} is not there"
            found |= data or {}
        for variable in container.get("env", []):
            value: str | None = variable.get("value")
            for key, kind in _KEYS.items():
                if ref := variable.get("valueFrom", {}).get(key):
                    data = self.data(kind, ref["name"])
                    assert (data is not None and ref["key"] in data) or ref.get("optional"), (
                        f"{kind} {ref} is not there"
                    )
                    value = (data or {}).get(ref["key"])
            if value is not None:
                found[variable["name"]] = expanded(value, found)
        here = {name: os.environ[name] for name in _OF_THE_MACHINE if name in os.environ}
        here["PATH"] = f"{BIN}:{here['PATH']}"  # as the images have it
        return {**here, **{name: self.here(value) for name, value in found.items()}}

    def here(self, text: str) -> str:
        """Return a text with the names of services and mounts as they are on this machine."""
        for name, address in self.hosts.items():
            text = text.replace(name, address)
        for mounted, folder in self.paths.items():
            text = text.replace(mounted, str(folder))
        return text

    def mount(self, config_map: str, path: str, folder: Path) -> None:
        """Write a ConfigMap's keys as files, where a container would find them."""
        data = self.data("ConfigMap", config_map)
        assert data is not None
        folder.mkdir(parents=True)
        for name, text in data.items():
            (folder / name).write_text(text)
        self.paths[path] = folder


def expanded(value: str, environment: Mapping[str, str]) -> str:
    """Return a value or argument with $(NAME) filled in; names that are not there stay as they are."""
    return _EXPANSION.sub(lambda match: environment.get(match.group(1), match.group(0)), value)


class Process:
    """A container that runs here: a command with an environment, its output in a file, and all that it started."""

    def __init__(self, command: list[str], environment: Mapping[str, str], log: Path) -> None:
        self.log = log
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                command, env=dict(environment), stdout=output, stderr=output, stdin=subprocess.DEVNULL, cwd=log.parent
            )

    def kill(self) -> None:
        """End it and its children at once."""
        try:
            family = [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]
        except psutil.NoSuchProcess:
            return
        for each in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        self.process.wait()


class RayCluster:
    """A Ray as KubeRay makes it of a cluster's spec: a head, and one worker where the group has any."""

    def __init__(self, spec: Manifest, namespace: Namespace, folder: Path, *, with_worker: bool = True) -> None:
        assert spec["authOptions"]["mode"] == "token"
        self.namespace = namespace
        self.folder = folder
        self.token = secrets.token_hex(16)
        # Ray's sockets lie below it, and their paths may have 107 characters.
        self.ray_folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))
        self.nodes: list[Process] = []
        self.dashboard_port = free_port()
        self.url = f"http://127.0.0.1:{self.dashboard_port}"
        gcs_port = free_port()
        head = spec["headGroupSpec"]
        self.environment = self._environment(head["template"]["spec"]["containers"][0])
        parameters = {
            "head": "",
            "port": str(gcs_port),
            "node-ip-address": "127.0.0.1",
            "dashboard-port": str(self.dashboard_port),
            "dashboard-agent-listen-port": str(free_port()),
            "metrics-export-port": str(free_port()),
            "object-store-memory": str(150 * 2**20),
            "block": "",
            **{key: value for key, value in head["rayStartParams"].items() if key != "dashboard-host"},
        }
        try:
            self._start(spec, parameters, gcs_port, with_worker=with_worker)
        except BaseException:
            self.stop()
            raise

    def _start(self, spec: Manifest, head: Mapping[str, str], gcs_port: int, *, with_worker: bool) -> None:
        self._node("head", head, self.environment)
        (group,) = spec["workerGroupSpecs"]
        if with_worker and group["minReplicas"]:
            (container,) = group["template"]["spec"]["containers"]
            parameters = {
                "address": f"127.0.0.1:{gcs_port}",
                "node-ip-address": "127.0.0.1",
                "num-cpus": container["resources"]["limits"]["cpu"],
                "dashboard-agent-listen-port": str(free_port()),
                "metrics-export-port": str(free_port()),
                "object-store-memory": str(150 * 2**20),
                "block": "",
            }
            self._node("worker", parameters, self._environment(container))

    def _environment(self, container: Manifest) -> dict[str, str]:
        # As KubeRay adds to a container, and as small as the tests' machine.
        return {
            **self.namespace.environment(container),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_worker_niceness": "0",
            "RAY_health_check_timeout_ms": "60000",
            "OMP_NUM_THREADS": "1",
            "HOME": str(self.folder),
            "RAY_TMPDIR": str(self.ray_folder),
        }

    def _node(self, name: str, parameters: Mapping[str, str], environment: Mapping[str, str]) -> None:
        """Start a node and wait for it. Ray gives its parts 30 s; a container that ends is started again."""
        arguments = [f"--{key}={value}" if value else f"--{key}" for key, value in parameters.items()]
        log = self.folder / f"{name}.log"
        for _ in range(START_ATTEMPTS):
            node = Process([str(BIN / "ray"), "start", *arguments], environment, log)
            self.nodes.append(node)
            while node.process.poll() is None:
                if self._num_nodes() >= (1 if name == "head" else 2):
                    return
                time.sleep(0.3)
            self.nodes.remove(node)
        raise AssertionError(f"Ray's {name} does not start: {log.read_text()[-3000:]}")

    def _num_nodes(self) -> int:
        request = urllib.request.Request(f"{self.url}/nodes?view=summary", headers=self.authorization)
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                nodes = json.loads(answer.read())["data"]["summary"]
        except (OSError, http.client.HTTPException):
            return 0
        return sum(each.get("raylet", {}).get("state") == "ALIVE" for each in nodes)

    def job_status(self, job_id: str) -> str | None:
        """Return a job's status as the dashboard tells it, "" before it is submitted; None: it does not answer."""
        request = urllib.request.Request(f"{self.url}/api/jobs/{job_id}", headers=self.authorization)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return str(json.loads(answer.read())["status"])
        except urllib.error.HTTPError as error:
            return "" if error.code == 404 else None
        except (OSError, http.client.HTTPException):
            return None

    @property
    def authorization(self) -> dict[str, str]:
        """The header that KubeRay's operator sends."""
        return {"Authorization": f"Bearer {self.token}"}

    def stop(self) -> None:
        """Take it down, as KubeRay deletes the pods."""
        for node in reversed(self.nodes):
            node.kill()
        # What Ray started as daemons has gone over to another parent.
        for each in psutil.process_iter(["environ"]):
            if (each.info["environ"] or {}).get("RAY_AUTH_TOKEN") == self.token:
                each.kill()
        shutil.rmtree(self.ray_folder, ignore_errors=True)


class RayJob:
    """One RayJob: submitted by KubeRay's line, and tried again on a new cluster `backoffLimit` times.

    Args:
        manifest: as applied.
        namespace: where.
        folder: for logs and Ray's files.
    """

    def __init__(self, manifest: Manifest, namespace: Namespace, folder: Path) -> None:
        self.manifest = manifest
        self.namespace = namespace
        self.folder = folder
        self.tries = 0

    @property
    def spec(self) -> Manifest:
        """Its spec."""
        spec: Manifest = self.manifest["spec"]
        return spec

    def submit(self, cluster: RayCluster) -> tuple[str, Process]:
        """Run the submitter, and return the job's id and the submitter."""
        self.tries += 1
        job_id = f"{self.manifest['metadata']['name']}-{secrets.token_hex(3)}"
        line = self.namespace.here(submit_line(self.spec, address=cluster.url, job_id=job_id))
        log = self.folder / f"{job_id}.log"
        (container,) = self.spec["submitterPodTemplate"]["spec"]["containers"]
        environment = {
            **self.namespace.environment(container),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": cluster.token,
            "HOME": str(self.folder),
        }
        return job_id, Process(["/bin/bash", "-ce", line], environment, log)

    def status(self, cluster: RayCluster, job_id: str, submitter: Process) -> dict[str, str]:
        """Return what KubeRay would write into the object's status now (rayjob_controller.go)."""
        state = cluster.job_status(job_id)
        if state is None:  # the dashboard is busy: KubeRay asks again later
            return {"jobStatus": "", "jobDeploymentStatus": "Initializing"}
        deployment = "Running" if state else "Initializing"
        if not state and submitter.process.poll():
            deployment = "Failed"  # it could not be submitted
        if state in ("SUCCEEDED", "FAILED", "STOPPED") and submitter.process.poll() is not None:
            again = state == "FAILED" and self.tries <= self.spec["backoffLimit"]
            deployment = "Retrying" if again else "Failed" if state == "FAILED" else "Complete"
        return {"jobStatus": state, "jobDeploymentStatus": deployment}


def submit_line(spec: Manifest, *, address: str, job_id: str) -> str:
    """Return the shell line of KubeRay's submitter (BuildJobSubmitCommand, K8sJobMode)."""
    healthy = (
        f"""python -c "import urllib.request; r=urllib.request.urlopen('{address}/api/gcs_healthz', timeout=5); """
        """exit(0 if b'success' in r.read() else 1)\""""
    )
    words = [
        "until", healthy, ">/dev/null", "2>&1", ";",
        "do", "echo", f'"Waiting for Ray Dashboard GCS to become healthy at {address} ..."', ";", "sleep", "2", ";",
        "done", ";",
        "if", "!", "ray", "job", "status", "--address", address, job_id, ">/dev/null", "2>&1", ";", "then",
        "ray", "job", "submit", "--address", address, "--no-wait",
    ]  # fmt: skip
    words += ["--submission-id", job_id]
    if spec.get("entrypointNumCpus", 0) > 0:
        words += ["--entrypoint-num-cpus", f"{spec['entrypointNumCpus']:f}"]
    if spec.get("entrypointNumGpus", 0) > 0:
        words += ["--entrypoint-num-gpus", f"{spec['entrypointNumGpus']:f}"]
    words += ["--", spec["entrypoint"].strip(), ";", "fi", ";"]
    words += ["ray", "job", "logs", "--address", address, "--follow", job_id]
    return " ".join(words)


def put_serve_config(cluster: RayCluster, config: Mapping[str, Any]) -> None:
    """Hand a Serve configuration over as KubeRay does: PUT to the dashboard."""
    request = urllib.request.Request(
        f"{cluster.url}/api/serve/applications/",
        data=json.dumps(config).encode(),
        method="PUT",
        headers={"Content-Type": "application/json", **cluster.authorization},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.status == 200


def processes(command: str, token: str) -> list[psutil.Process]:
    """Return the processes of a cluster whose command line or title has a text."""
    found = []
    for each in psutil.process_iter(["cmdline", "environ"]):
        title = " ".join(each.info["cmdline"] or [])
        if command in title and (each.info["environ"] or {}).get("RAY_AUTH_TOKEN") == token:
            found.append(each)
    return found


def terminate(process: psutil.Process) -> None:
    """Kill it as the kernel kills for memory: no last words."""
    process.send_signal(signal.SIGKILL)
