"""The rendered workflow, carried out as Argo and KubeRay do it, and served as the RayService says.

Real here: kubectl's rendering, SeaweedFS and MLflow with the arguments and environment of their pods, Ray clusters with
a head, a worker and a token, KubeRay's line of submission, the stages, Serve, HTTP. Played: Argo and KubeRay themselves
(tests/k8s/argo.py, tests/k8s/kuberay.py), and the kubelet.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from mlflow import MlflowClient

from fewstep.storage import Storage, StorageSettings, join
from fewstep.tracking.registry import Registry
from fewstep.tracking.settings import TrackingSettings
from fewstep.tracking.tracker import Tracker
from k8s import argo
from k8s.kuberay import (
    BIN,
    Namespace,
    Process,
    RayCluster,
    RayJob,
    expanded,
    free_port,
    processes,
    put_serve_config,
    terminate,
)
from k8s.rendered import Manifest, find, read, rendered
from tiny import tiny_recipe, tiny_student_folder, tiny_teacher_folder

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(3600)]

KEY = {"AWS_ACCESS_KEY_ID": "AKIATESTS", "AWS_SECRET_ACCESS_KEY": "of-these-tests-alone"}
#: What is killed, and how the folder of its training begins.
TRAININGS = {"guidance": "guidance-", "progressive": "2-steps-"}
RECIPE = "emoji.yaml"  # of which the tiny one takes the place in the ConfigMap


@dataclass
class Platform:
    """What `kubectl apply -k k8s/overlays/kind` leaves, on this machine."""

    namespace: Namespace
    storage: Storage
    mlflow: str
    folder: Path


@pytest.fixture(scope="module", autouse=True)
def key() -> Iterator[None]:
    """Let this process's own clients in too."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in KEY.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def platform(key: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    folder = tmp_path_factory.mktemp("kind")
    objects = rendered("kind")
    content = tiny_recipe(tiny_teacher_folder(folder / "teacher"), name="tiny")
    content["stages"] = [*content["stages"], "promote"]
    content["guidance"]["train"] |= {"updates": 80, "checkpoint_every": 8}
    content["progressive"]["train"] |= {"updates": 40, "checkpoint_every": 8}
    content["register"]["name"] = "fewstep-emoji"
    content["register"]["gate"] = {"min_num_images": 1, "max_kid_ratio": 1e6, "min_alignment_ratio": None}
    for storage_of_the_recipe in ("storage", "tracking", "cluster"):
        content.pop(storage_of_the_recipe, None)
    find(objects, "ConfigMap", "fewstep-recipes")["data"][RECIPE] = yaml.safe_dump(content)
    s3_port, mlflow_port = free_port(), free_port()
    namespace = Namespace(
        objects,
        secrets={
            "s3-credentials": KEY,
            "mlflow-database": {"uri": f"sqlite:///{folder}/mlflow.db", "password": "unused"},
        },
        hosts={"//seaweedfs:8333": f"//127.0.0.1:{s3_port}", "//mlflow:5000": f"//127.0.0.1:{mlflow_port}"},
        paths={"/home/fewstep": folder / "home"},
    )
    (folder / "home").mkdir()
    namespace.mount("fewstep-recipes", "/etc/fewstep/recipes", folder / "recipes")
    servers = [_seaweedfs(namespace, folder, s3_port)]
    try:
        storage = Storage(
            StorageSettings(kind="s3", endpoint_url=f"http://127.0.0.1:{s3_port}", bucket="fewstep", prefix="distill")
        )
        _wait(lambda: _client(s3_port, KEY).head_bucket(Bucket="fewstep"), "SeaweedFS", servers[0].log)
        servers.append(_mlflow(namespace, folder, mlflow_port))
        url = f"http://127.0.0.1:{mlflow_port}"
        _wait(lambda: urllib.request.urlopen(f"{url}/health", timeout=5).read(), "MLflow", servers[1].log)
        yield Platform(namespace, storage, url, folder)
    finally:
        for server in servers:
            server.kill()


def _container(objects: list[Manifest], kind: str, name: str) -> Manifest:
    (only,) = find(objects, kind, name)["spec"]["template"]["spec"]["containers"]
    return only


def _arguments(container: Manifest, environment: dict[str, str], changes: dict[str, str]) -> list[str]:
    """Return a container's command with some options as this machine needs them; all of `changes` must be in it."""
    command = [expanded(each, environment) for each in container["args"]]
    for option, value in changes.items():
        (place,) = [number for number, each in enumerate(command) if each.startswith(f"{option}=")]
        command[place] = f"{option}={value}"
    return [str(BIN / command[0]), *command[1:]]


def _seaweedfs(namespace: Namespace, folder: Path, port: int) -> Process:
    container = _container(namespace.objects, "StatefulSet", "seaweedfs")
    environment = namespace.environment(container)
    (folder / "s3").mkdir()
    command = _arguments(
        container, environment, {"-dir": str(folder / "s3"), "-ip.bind": "127.0.0.1", "-s3.port": str(port)}
    )
    # A pod has all ports to itself.
    for other in ("master", "volume", "filer", "admin"):
        command.append(f"-{other}.port={free_port()}")
    return Process(command, environment, folder / "seaweedfs.log")


def _mlflow(namespace: Namespace, folder: Path, port: int) -> Process:
    container = _container(namespace.objects, "Deployment", "mlflow")
    environment = namespace.environment(container)
    command = _arguments(container, environment, {"--host": "127.0.0.1", "--port": str(port), "--workers": "1"})
    return Process(command, environment, folder / "mlflow.log")


def _client(port: int, key: dict[str, str]) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{port}",
        region_name="us-east-1",
        aws_access_key_id=key["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=key["AWS_SECRET_ACCESS_KEY"],
        config=Config(s3={"addressing_style": "path"}, retries={"max_attempts": 1}),
    )


def _wait(look: Callable[[], Any], what: str, log: Path, timeout_s: float = 300) -> Any:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            found = look()
            if found is not False:
                return found
            error: Exception | None = None
        except (OSError, BotoCoreError, ClientError, http.client.HTTPException) as failure:
            error = failure
        assert time.monotonic() < deadline, f"{what}: {error}\n{log.read_text()[-3000:]}"
        time.sleep(0.2)


def test_s3_takes_no_other_key(platform: Platform) -> None:
    port = int(platform.namespace.hosts["//seaweedfs:8333"].rsplit(":", 1)[1])
    with pytest.raises(ClientError, match=r"InvalidAccessKeyId|403"):
        _client(port, {**KEY, "AWS_ACCESS_KEY_ID": "AKIAOTHER"}).list_objects_v2(Bucket="fewstep")
    with pytest.raises(ClientError, match=r"SignatureDoesNotMatch|403"):
        _client(port, {**KEY, "AWS_SECRET_ACCESS_KEY": "another"}).list_objects_v2(Bucket="fewstep")


def test_mlflow_answers_under_the_names_that_pods_and_probes_call_it_and_no_other(platform: Platform) -> None:
    def status(host: str, path: str = "/api/2.0/mlflow/experiments/search?max_results=1") -> int:
        request = urllib.request.Request(f"{platform.mlflow}{path}", headers={"Host": host})
        try:
            return int(urllib.request.urlopen(request, timeout=30).status)
        except urllib.error.HTTPError as error:
            return error.code

    for host in ("mlflow:5000", "mlflow.fewstep.svc:5000", "localhost:5000"):
        assert status(host) == 200, host
    assert status("10.1.2.3:5000", "/health") == 200  # as a kubelet asks
    for host in ("mlflow.evil.example", "10.evil.example"):
        assert status(host) == 403, host


@pytest.fixture(scope="module")
def carried_out(platform: Platform) -> dict[str, Any]:
    """Carry the workflow out: guidance's driver and one of progressive's workers are killed half way."""
    template = find(platform.namespace.objects, "WorkflowTemplate", "fewstep-distill")
    workflow = read("workflows/emoji.yaml")
    clusters: list[RayCluster] = []
    done: dict[str, Any] = {"order": [], "killed": [], "tries": {}, "submitted": {}}

    def new_cluster(spec: Manifest) -> RayCluster:
        for old in clusters:
            old.stop()
        clusters.clear()
        folder = platform.folder / f"ray{len(list(platform.folder.glob('ray*')))}"
        folder.mkdir()
        clusters.append(RayCluster(spec["rayClusterSpec"], platform.namespace, folder))
        return clusters[0]

    try:
        for step in argo.walk(workflow, template):
            if not step.runs or "resource" not in step.template:
                continue
            job = RayJob(step.manifest, platform.namespace, platform.folder)
            # KubeRay makes a cluster for each job. Those of one run are alike, so that one serves until it must go.
            cluster = clusters[0] if clusters else new_cluster(job.spec)
            job_id, submitter = job.submit(cluster)
            deadline = time.monotonic() + 900
            while True:
                status = job.status(cluster, job_id, submitter)
                outcome = argo.outcome(step.template["resource"], status)
                if outcome is not None:
                    break
                if step.name in TRAININGS.keys() - {*done["killed"]} and _kill_half_way(step.name, platform, cluster):
                    done["killed"].append(step.name)
                if status["jobDeploymentStatus"] == "Retrying":
                    submitter.kill()
                    cluster = new_cluster(job.spec)
                    job_id, submitter = job.submit(cluster)
                assert time.monotonic() < deadline, submitter.log.read_text()[-4000:]
                time.sleep(0.3)
            assert outcome, f"{step.name}: {status}\n{submitter.log.read_text()[-4000:]}"
            done["order"].append(step.name)
            done["tries"][step.name] = job.tries
            done["submitted"][step.name] = submitter.log.read_text()
    finally:
        for each in clusters:
            each.stop()
    return done


def _kill_half_way(stage: str, platform: Platform, cluster: RayCluster) -> bool:
    """Kill the driver of guidance, or a worker of progressive, once there is a checkpoint to go on from."""
    folder = join(platform.storage.root, "students")
    training = f"{folder}/{TRAININGS[stage]}"
    stored = [each.uri for each in platform.storage.list(folder) if each.uri.startswith(training)]
    if not any("/checkpoints/update-" in uri for uri in stored):
        return False
    command = f"fewstep stage {stage}" if stage == "guidance" else "RayTrainWorker"
    found = processes(command, cluster.token)
    for each in found:
        terminate(each)
    return bool(found)


def test_all_stages_run_in_their_order(carried_out: dict[str, Any]) -> None:
    assert carried_out["order"] == [
        "prepare", "encode", "guidance", "progressive", "evaluate", "register", "promote"
    ]  # fmt: skip


def test_what_was_killed_went_on_and_did_not_begin_again(carried_out: dict[str, Any], platform: Platform) -> None:
    assert carried_out["killed"] == ["guidance", "progressive"]
    assert carried_out["tries"]["guidance"] == 2  # the driver died: a new cluster
    assert carried_out["tries"]["progressive"] == 1  # a worker died: the training mends itself
    folder = join(platform.storage.root, "students")
    for training in TRAININGS.values():
        (result,) = [
            each.uri
            for each in platform.storage.list(folder)
            if each.uri.startswith(f"{folder}/{training}") and each.uri.endswith("/result.json")
        ]
        assert platform.storage.read_json(result)["result"]["resumed_from"] >= 8, training


def test_a_workflow_that_is_applied_again_repeats_nothing(carried_out: dict[str, Any], platform: Platform) -> None:
    template = find(platform.namespace.objects, "WorkflowTemplate", "fewstep-distill")
    workflow = read("workflows/emoji.yaml")
    workflow["metadata"]["name"] = "emoji-2"
    (step,) = [each for each in argo.walk(workflow, template) if each.name == "guidance"]
    (head,) = step.manifest["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    environment = {**platform.namespace.environment(head), "HOME": str(platform.folder), "OMP_NUM_THREADS": "1"}
    command = platform.namespace.here(step.manifest["spec"]["entrypoint"]).split()
    again = Process([str(BIN / command[0]), *command[1:]], environment, platform.folder / "again.log")
    assert again.process.wait(timeout=120) == 0, again.log.read_text()
    assert "guidance: done already" in again.log.read_text()


@pytest.fixture(scope="module")
def served(carried_out: dict[str, Any], platform: Platform) -> Iterator[str]:
    """Serve as the RayService says, on a cluster with its environment, and return the address."""
    service = find(platform.namespace.objects, "RayService", "fewstep")
    spec = service["spec"]["rayClusterConfig"]
    spec["headGroupSpec"]["rayStartParams"]["num-cpus"] = "2"  # one node here, instead of a head and a worker
    folder = platform.folder / "serving"
    folder.mkdir()
    cluster = RayCluster(spec, platform.namespace, folder, with_worker=False)
    port = free_port()
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    config["http_options"] |= {"host": "127.0.0.1", "port": port}
    config["applications"][0]["args"]["serve"]["reload_every_s"] = 1.0
    try:
        put_serve_config(cluster, config)
        url = f"http://127.0.0.1:{port}"
        _wait(lambda: _picture(url) is not None, "Serve", folder / "head.log", timeout_s=240)
        yield url
    finally:
        cluster.stop()


def _picture(url: str) -> dict[str, Any] | None:
    request = urllib.request.Request(
        f"{url}/v1/images/generations",
        data=json.dumps({"prompt": "a red apple", "seed": 7}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        found: dict[str, Any] = json.loads(answer.read())
        return found


def test_the_champion_is_served_and_another_takes_its_place_without_a_restart(
    served: str, platform: Platform, tmp_path: Path
) -> None:
    first = _picture(served)
    assert first is not None
    assert first["data"][0]["b64_json"]
    registry = Registry(Tracker.open(TrackingSettings(uri=platform.mlflow, experiment="tests"), platform.storage))
    before = registry.get("models:/fewstep-emoji@champion")
    other = tiny_student_folder(tmp_path / "other", num_inference_steps=before.num_inference_steps or 0, seed=5)
    with registry._tracker.run("other", key="other") as run:
        version = registry.log_student(
            run,
            other,
            name="fewstep-emoji",
            params={},
            tags={
                "num_inference_steps": str(before.num_inference_steps),
                "teacher": "tiny",
                "data_digest": "none",
                "fingerprint": "other",
            },
            metrics={},
        )
    client = MlflowClient(tracking_uri=platform.mlflow, registry_uri=platform.mlflow)
    seconds = {}
    for wanted in (version, before.version):  # a promotion, and the roll back
        client.set_registered_model_alias("fewstep-emoji", "champion", str(wanted))
        begun = time.monotonic()
        log = platform.folder / "serving" / "head.log"
        _wait(lambda wanted=wanted: f"@{wanted}" in json.dumps(_picture(served)), "the new version", log, timeout_s=60)
        seconds[wanted] = time.monotonic() - begun
    assert max(seconds.values()) < 30, seconds
    assert _picture(served)["data"] == first["data"]  # type: ignore[index]  # the same student, the same seed
