"""Every object is one that an API server with strict decoding takes."""

import copy
from collections.abc import Callable

import pytest

from k8s.all_objects import named_objects
from k8s.rendered import Manifest, find, read, rendered
from k8s.schemas import definitions, faults, is_custom, is_defined, whole_faults

_OBJECTS = named_objects()


def test_every_object_is_valid():
    assert [f"{source}: {fault}" for source, each in _OBJECTS for fault in faults(each)] == []


def test_the_objects_are_those_that_a_user_applies():
    kinds = {each["kind"] for _, each in _OBJECTS}
    assert kinds >= {
        "Namespace", "ConfigMap", "ServiceAccount", "Role", "RoleBinding", "Deployment", "StatefulSet", "Service",
        "NetworkPolicy", "ResourceQuota", "LimitRange", "PriorityClass", "PodDisruptionBudget", "RayService", "RayJob",
        "Workflow", "WorkflowTemplate", "CronWorkflow", "ClusterQueue", "LocalQueue", "ResourceFlavor",
        "ExternalSecret", "PodMonitor", "PrometheusRule",
    }  # fmt: skip
    assert len([each for source, each in _OBJECTS if source.startswith("step of")]) >= 6 * 9


@pytest.mark.skipif(definitions() is None, reason="the projects' own definitions are not here")
def test_every_custom_object_is_valid_by_the_projects_whole_definitions():
    folder = definitions()
    assert folder is not None
    custom = [(source, each) for source, each in _OBJECTS if is_custom(each) and is_defined(each, folder)]
    checked = {each["kind"] for _, each in custom}
    assert checked >= {"RayJob", "RayService", "WorkflowTemplate", "Workflow", "CronWorkflow"}
    # One of each run is enough of the many like ones: the whole definitions are large.
    first = {
        (each["kind"], each["metadata"]["name"], source.split(" on ")[0]): (source, each) for source, each in custom
    }
    assert [f"{source}: {fault}" for source, each in first.values() for fault in whole_faults(each, folder)] == []


def _typo(job: Manifest) -> None:
    job["spec"]["shutdownAfterJobFinish"] = job["spec"].pop("shutdownAfterJobFinishes")


def _wrong_type(job: Manifest) -> None:
    job["spec"]["backoffLimit"] = "two"


def _wrong_value(job: Manifest) -> None:
    job["spec"]["rayClusterSpec"]["authOptions"]["mode"] = "tokens"


def _unknown_in_a_pod(job: Manifest) -> None:
    job["spec"]["submitterPodTemplate"]["spec"]["containers"][0]["imagePullPolice"] = "Always"


def _missing_in_a_pod(job: Manifest) -> None:
    del job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["name"]


@pytest.mark.parametrize("spoil", [_typo, _wrong_type, _wrong_value, _unknown_in_a_pod, _missing_in_a_pod])
def test_a_planted_fault_is_found(spoil: Callable[[Manifest], None]):
    job = copy.deepcopy(read("workflows/rayjobs/emoji/guidance.yaml"))
    assert faults(job) == []
    spoil(job)
    assert faults(job)


def test_a_planted_fault_in_a_core_object_is_found():
    deployment = copy.deepcopy(find(rendered("kind"), "Deployment", "mlflow"))
    deployment["spec"]["replica"] = 2
    assert faults(deployment)
