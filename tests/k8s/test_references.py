"""What an object names is there: in what is applied with it, or in the short list of what a user makes first."""

from collections.abc import Iterator
from typing import Any

import pytest

from k8s.all_objects import named_objects, steps
from k8s.rendered import OVERLAYS, REPO, Manifest, find, pods, rendered

#: Secrets are never in git: docs/operations.md says how each is made. Those of `optional` may stay away.
PREREQUISITES = {
    "kind": {"Secret": {"s3-credentials", "mlflow-database"}},
    "gpu": {"Secret": {"s3-credentials", "mlflow-database"}},
    "aws": {"Secret": set()},
}
#: KubeRay and Argo bring these labels; and not every run has every stage.
_BROUGHT = {"ray.io/node-type", "workflows.argoproj.io/workflow", "fewstep.io/stage"}


def _named(value: Any) -> Iterator[tuple[str, str, bool]]:
    """Yield (kind, name, whether it may stay away) of everything that a pod names."""
    if isinstance(value, list):
        for below in value:
            yield from _named(below)
    if not isinstance(value, dict):
        return
    for key, below in value.items():
        match key:
            case "configMapRef" | "configMapKeyRef":
                yield "ConfigMap", below["name"], below.get("optional", False)
            case "secretRef" | "secretKeyRef" if isinstance(below, dict):
                yield "Secret", below["name"], below.get("optional", False)
            case "configMap" if isinstance(below, dict):
                yield "ConfigMap", below["name"], below.get("optional", False)
            case "secret" if isinstance(below, dict):
                yield "Secret", below["secretName"], below.get("optional", False)
            case "persistentVolumeClaim":
                yield "PersistentVolumeClaim", below["claimName"], False
            case "serviceAccountName":
                yield "ServiceAccount", below, False
            case "priorityClassName":
                yield "PriorityClass", below, False
            case _:
                yield from _named(below)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_everything_that_a_pod_names_is_there(overlay: str):
    objects = rendered(overlay)
    there = {(each["kind"], each["metadata"]["name"]) for each in objects}
    there |= {("Secret", each["spec"]["target"]["name"]) for each in objects if each["kind"] == "ExternalSecret"}
    there |= {(kind, name) for kind, names in PREREQUISITES[overlay].items() for name in names}
    made = [each for source, each in steps() if source.endswith(f" on {overlay}")]
    named = {
        (kind, name)
        for each in (*objects, *made)
        for _, template in pods(each)
        for kind, name, optional in _named(template)
        if not optional
    }
    assert ("ConfigMap", "fewstep-recipes") in named
    assert ("PriorityClass", "fewstep-training") in named
    assert named - there == set()


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_prerequisite_is_needed_and_in_the_manual(overlay: str):
    manual = (REPO / "docs" / "operations.md").read_text()
    used = {
        name
        for each in rendered(overlay)
        for _, template in pods(each)
        for kind, name, _ in _named(template)
        if kind == "Secret"
    }
    for name in PREREQUISITES[overlay]["Secret"]:
        assert name in used
        assert f"create secret generic {name}" in manual


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_keys_that_pods_read_of_config_maps_are_in_them(overlay: str):
    objects = rendered(overlay)
    for each in objects:
        for where, template in pods(each):
            for container in template["spec"]["containers"]:
                for variable in container.get("env", []):
                    ref = variable.get("valueFrom", {}).get("configMapKeyRef")
                    if ref:
                        assert ref["key"] in find(objects, "ConfigMap", ref["name"])["data"], where


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_services_budgets_and_policies_select_pods_that_exist(overlay: str):
    objects = rendered(overlay)
    made = [each for source, each in steps() if source.endswith(f" on {overlay}")]
    labels = [
        template.get("metadata", {}).get("labels", {}) for each in (*objects, *made) for _, template in pods(each)
    ]
    for each in objects:
        selectors: list[Manifest] = []
        if each["kind"] == "Service":
            selectors = [{"matchLabels": each["spec"]["selector"]}]
        elif each["kind"] == "PodDisruptionBudget":
            selectors = [each["spec"]["selector"]]
        elif each["kind"] == "NetworkPolicy":
            rules = [*each["spec"].get("ingress", []), *each["spec"].get("egress", [])]
            peers = [peer for rule in rules for peer in (*rule.get("from", []), *rule.get("to", []))]
            selectors = [each["spec"]["podSelector"]]
            selectors += [peer["podSelector"] for peer in peers if "podSelector" in peer and len(peer) == 1]
        for selector in selectors:
            assert any(_selects(selector, of_pod) for of_pod in labels), (each["metadata"]["name"], selector)


def _selects(selector: Manifest, labels: dict[str, str]) -> bool:
    for key, value in selector.get("matchLabels", {}).items():
        if key not in _BROUGHT and labels.get(key) != value:
            return False
    for each in selector.get("matchExpressions", []):
        if each["key"] in _BROUGHT:
            continue
        if (labels.get(each["key"]) in each["values"]) is not (each["operator"] == "In"):
            return False
    return True


def test_every_image_is_the_one_that_the_overlay_names():
    objects = [each for source, each in named_objects() if source == "everything"]
    images = {
        container["image"]
        for each in objects
        for _, template in pods(each)
        for container in (*template["spec"]["containers"], *template["spec"].get("initContainers", []))
    }
    assert images == {
        "registry.test/training:1", "registry.test/serving:1", "registry.test/mlflow:1", "postgres:17.6-bookworm"
    }  # fmt: skip
    template = find(objects, "WorkflowTemplate", "fewstep-distill")
    values = {each["name"]: each["value"] for each in template["spec"]["arguments"]["parameters"]}
    assert values["training-image"] == "registry.test/training:1"
    assert values["prepare-image"] == "registry.test/prepare:1"
    assert values["queue"] == "fewstep"


def test_each_stage_runs_in_its_image():
    for source, job in steps():
        images = {container["image"] for _, template in pods(job) for container in template["spec"]["containers"]}
        stage = job["metadata"]["labels"]["fewstep.io/stage"]
        (image,) = images
        assert ("prepare" if stage == "prepare" else "training") in image, source


def test_every_image_has_a_tag_that_says_which():
    for source, each in named_objects():
        for where, template in pods(each):
            for container in template["spec"]["containers"]:
                name, mark, tag = container["image"].rpartition(":")
                assert name, (source, where)
                assert mark, (source, where)
                assert tag not in ("", "latest"), (source, where)
                assert "/" not in tag, (source, where)


def test_kueue_and_autoscaling_are_not_together():
    for overlay in OVERLAYS:
        kinds = {each["kind"] for each in rendered(overlay)}
        template = find(rendered(overlay), "WorkflowTemplate", "fewstep-distill")
        values = {each["name"]: each["value"] for each in template["spec"]["arguments"]["parameters"]}
        assert not ("LocalQueue" in kinds and values["autoscaling"] == "true")


def test_autoscaling_reaches_the_jobs_and_the_service():
    objects = rendered("aws")
    values = {
        each["name"]: each["value"]
        for each in find(objects, "WorkflowTemplate", "fewstep-distill")["spec"]["arguments"]["parameters"]
    }
    assert (values["autoscaling"], values["head-service-account"]) == ("true", "fewstep-ray-head")
    cluster = find(objects, "RayService", "fewstep")["spec"]["rayClusterConfig"]
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["headGroupSpec"]["template"]["spec"]["serviceAccountName"] == "fewstep-serving-head"
    for source, job in steps():
        on_aws = source.endswith(" on aws")
        assert job["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"] is on_aws, source
        head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
        assert head["automountServiceAccountToken"] is on_aws, source
