"""Rules for every pod, whoever makes it: Pod Security `restricted`, and more than that."""

import re
from typing import Any

import pytest
import yaml

from k8s.all_objects import named_objects
from k8s.rendered import OVERLAYS, REPO, Manifest, find, pods, rendered

_PODS = [(f"{source}: {where}", template) for source, each in named_objects() for where, template in pods(each)]


def _containers(template: Manifest) -> list[Manifest]:
    return [*template["spec"]["containers"], *template["spec"].get("initContainers", [])]


def test_there_are_pods_of_all_kinds():
    text = " ".join(where for where, _ in _PODS)
    for kind in (
        "submitterPodTemplate",
        "headGroupSpec",
        "workerGroupSpecs",
        "Deployment",
        "StatefulSet",
        "RayService",
    ):
        assert kind in text


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_namespace_enforces_restricted(overlay: str):
    labels = find(rendered(overlay), "Namespace", "fewstep")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


def test_pods_are_restricted():
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/, profile restricted."""
    for where, template in _PODS:
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True, where
        assert spec["securityContext"]["runAsUser"] > 0, where
        assert spec["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault", where
        for key in ("hostNetwork", "hostPID", "hostIPC", "hostUsers"):
            assert key not in spec, where
        for volume in spec.get("volumes", []):
            assert set(volume) - {"name"} <= {"emptyDir", "configMap", "secret", "persistentVolumeClaim"}, where
        for container in _containers(template):
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False, where
            assert context["capabilities"] == {"drop": ["ALL"]}, where
            assert "privileged" not in context, where
            assert "runAsUser" not in context, where
            assert all("hostPort" not in port for port in container.get("ports", [])), where


def test_root_file_systems_are_read_only_and_what_must_be_written_is_a_volume():
    for where, template in _PODS:
        for container in _containers(template):
            assert container["securityContext"]["readOnlyRootFilesystem"] is True, where
            paths = {mount["mountPath"] for mount in container["volumeMounts"]}
            assert "/tmp" in paths, where
            if "fewstep" in container["image"] or "registry.test" in container["image"]:
                assert "/home/fewstep" in paths, where


def test_autoscalers_and_workflow_steps_are_restricted_too():
    for source, each in named_objects():
        if each["kind"] in ("RayJob", "RayService"):
            cluster = each["spec"].get("rayClusterSpec") or each["spec"]["rayClusterConfig"]
            context = cluster["autoscalerOptions"]["securityContext"]
            assert context == {
                "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}
            }, source  # fmt: skip
        if each["kind"] == "WorkflowTemplate":  # of which every run is
            context = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
            assert each["spec"]["securityContext"] == context
            assert each["spec"]["serviceAccountName"] == "fewstep-workflow"


def test_every_container_says_what_it_takes_and_memory_is_not_overcommitted():
    for where, template in _PODS:
        for container in _containers(template):
            wants, may = container["resources"]["requests"], container["resources"]["limits"]
            assert {"cpu", "memory"} <= set(wants), where
            assert wants["memory"] == may["memory"], where
            assert wants.get("nvidia.com/gpu") == may.get("nvidia.com/gpu"), where


def test_service_accounts_hold_no_token_but_where_the_api_server_is_asked():
    allowed = {"fewstep-ray-head", "fewstep-serving-head"}
    for where, template in _PODS:
        spec = template["spec"]
        assert spec["serviceAccountName"] != "default", where
        if spec["automountServiceAccountToken"]:
            assert spec["serviceAccountName"] in allowed, where
    for overlay in OVERLAYS:
        for each in rendered(overlay):
            if each["kind"] == "ServiceAccount" and each["metadata"]["name"] != "fewstep-workflow":
                assert each["automountServiceAccountToken"] is False


def test_rights_are_the_least():
    roles = [each for source, each in named_objects() if each["kind"] in ("Role", "ClusterRole")]
    assert {each["kind"] for each in roles} == {"Role"}
    for role in roles:
        assert role["rules"] == [
            {"apiGroups": ["argoproj.io"], "resources": ["workflowtaskresults"], "verbs": ["create", "patch"]},
            {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["get", "create", "patch"]},
        ]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_network_is_closed_but_for_what_is_allowed(overlay: str):
    policies = [each for each in rendered(overlay) if each["kind"] == "NetworkPolicy"]
    deny = find(policies, "NetworkPolicy", "default-deny")["spec"]
    assert deny == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for each in policies:
        for rule in each["spec"].get("ingress", []):
            assert rule.get("from"), each["metadata"]["name"]  # nothing is open to all
        for rule in each["spec"].get("egress", []):
            assert rule.get("to"), each["metadata"]["name"]
            for peer in rule["to"]:
                if "ipBlock" in peer and peer["ipBlock"]["cidr"] == "0.0.0.0/0":
                    assert "169.254.0.0/16" in peer["ipBlock"]["except"], each["metadata"]["name"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_prepare_reaches_no_private_address_by_any_policy(overlay: str):
    """It fetches what strangers name, and policies add up."""
    labels = {
        "app.kubernetes.io/part-of": "fewstep",
        "app.kubernetes.io/component": "training",
        "fewstep.io/stage": "prepare",
    }
    blocks = [
        peer["ipBlock"]
        for each in rendered(overlay)
        if each["kind"] == "NetworkPolicy" and _selects(each["spec"]["podSelector"], labels)
        for rule in each["spec"].get("egress", [])
        for peer in rule["to"]
        if "ipBlock" in peer and peer["ipBlock"]["cidr"] != "169.254.20.10/32"  # the node's DNS cache
    ]
    private = {"10.0.0.0/8", "100.64.0.0/10", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16", "127.0.0.0/8"}
    assert blocks
    for block in blocks:
        assert private <= set(block["except"])


def _selects(selector: Manifest, labels: dict[str, str]) -> bool:
    wanted = all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())
    for each in selector.get("matchExpressions", []):
        value = labels.get(each["key"])
        match each["operator"]:
            case "In":
                wanted &= value in each["values"]
            case "NotIn":
                wanted &= value not in each["values"]
            case "Exists":
                wanted &= value is not None
            case other:
                raise AssertionError(other)
    return wanted


def test_no_secret_value_is_in_git():
    for source, each in named_objects():
        assert each["kind"] != "Secret", source
        _no_values(each, source)
    words = re.compile(r"(?i)(secret_access_key|password|token|api_key)['\"]?\s*[:=]\s*['\"]?[A-Za-z0-9/+]{12,}")
    for folder in ("k8s", "workflows", "docker"):
        for file in (REPO / folder).rglob("*"):
            if file.is_file():
                assert not words.search(file.read_text()), file


def _no_values(value: Any, source: str) -> None:
    if isinstance(value, dict):
        name = str(value.get("name", ""))
        if re.search(r"PASSWORD|SECRET|TOKEN|ACCESS_KEY", name):
            assert "value" not in value, (source, name)
        for below in value.values():
            _no_values(below, source)
    elif isinstance(value, list):
        for below in value:
            _no_values(below, source)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_serving_stands_above_training(overlay: str):
    objects = rendered(overlay)
    serving = find(objects, "PriorityClass", "fewstep-serving")
    training = find(objects, "PriorityClass", "fewstep-training")
    assert serving["value"] > training["value"]
    assert training["preemptionPolicy"] == "Never"
    for where, template in _PODS:
        part = template["metadata"]["labels"].get("app.kubernetes.io/component")
        if part in ("training", "submitter"):
            assert template["spec"]["priorityClassName"] == "fewstep-training", where
        if part in ("serving", "mlflow"):
            assert template["spec"]["priorityClassName"] == "fewstep-serving", where


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_service_survives_drains_and_spreads(overlay: str):
    objects = rendered(overlay)
    budget = find(objects, "PodDisruptionBudget", "fewstep-serving")["spec"]
    # Not maxUnavailable: a RayCluster has no scale subresource, and without it nothing could ever be drained.
    assert "maxUnavailable" not in budget
    assert budget["minAvailable"] == 1
    (group,) = find(objects, "RayService", "fewstep")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert group["minReplicas"] == (1 if overlay == "kind" else 2)
    keys = {each["topologyKey"] for each in group["template"]["spec"]["topologySpreadConstraints"]}
    assert keys == {"kubernetes.io/hostname", "topology.kubernetes.io/zone"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_gpus_are_where_the_overlay_has_them(overlay: str):
    service = find(rendered(overlay), "RayService", "fewstep")
    cluster = service["spec"]["rayClusterConfig"]
    (worker,) = cluster["workerGroupSpecs"][0]["template"]["spec"]["containers"]
    gpus = int(worker["resources"]["limits"].get("nvidia.com/gpu", "0"))
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    assert gpus == config["applications"][0]["args"]["serve"].get("num_gpus", 0) == (0 if overlay == "kind" else 1)
    (head,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    assert "nvidia.com/gpu" not in head["resources"]["limits"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
