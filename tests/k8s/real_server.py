"""Applies everything to a real API server, and works there as the workflow's own service account. By hand:

    KUBECONFIG=… python tests/k8s/real_server.py

The server needs the definitions of KubeRay and Argo, and must be empty: namespaces and objects are made and deleted.
What a node would do is not done: statuses of RayJobs are written as KubeRay writes them. docs/testing.md, tier 2.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))

from k8s import argo
from k8s.rendered import OVERLAYS, Manifest, find, kubectl, rayjob_files, read, rendered, run_files

ACCOUNT = "system:serviceaccount:fewstep:fewstep-workflow"


def run(*arguments: str, given: str | None = None, fails: bool = False) -> str:
    """Return what kubectl says; AssertionError if it fails and should not, or the other way round."""
    done = subprocess.run([kubectl(), *arguments], input=given, capture_output=True, text=True, timeout=300)
    assert (done.returncode != 0) is fails, f"{arguments}: {done.stdout}{done.stderr}"
    return done.stdout + (done.stderr if fails else "")


def served() -> set[tuple[str, str]]:
    """Return (apiVersion, kind) of all that the server knows."""
    lines = run("api-resources", "--no-headers").splitlines()
    return {(line.split()[-3], line.split()[-1]) for line in lines}


def apply(objects: list[Manifest], *arguments: str) -> list[str]:
    """Apply objects with strict validation and return which are there now."""
    text = run("apply", "--validate=strict", *arguments, "-f", "-", given=yaml.safe_dump_all(objects))
    return [line.rsplit(" ", 1)[0] for line in text.splitlines()]


def generations(objects: list[Manifest]) -> dict[str, Any]:
    """Return the generation of each object, which rises where its spec has really changed."""
    # kubectl says `configured` also where it only leaves out what the server fills in.
    text = run("get", "-o", "json", "-f", "-", given=yaml.safe_dump_all(objects))
    return {
        f"{each['kind']}/{each['metadata']['name']}": each["metadata"].get("generation")
        for each in json.loads(text)["items"]
    }


def can(verb: str, resource: str, namespace: str = "fewstep") -> bool:
    """Return whether the workflow's account may do that. Asked of the server itself: kubectl knows no kinds unseen."""
    name, _, group = resource.partition(".")
    attributes = {"namespace": namespace, "verb": verb, "group": group, "resource": name}
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SubjectAccessReview",
        "spec": {"user": ACCOUNT, "resourceAttributes": attributes},
    }
    allowed: bool = json.loads(run("create", "-o", "json", "-f", "-", given=json.dumps(review)))["status"]["allowed"]
    return allowed


def status(name: str, **values: str) -> None:
    """Write a RayJob's status, as KubeRay does."""
    patch = json.dumps({"status": values})
    run("patch", "rayjob", name, "-n", "fewstep", "--subresource=status", "--type=merge", "-p", patch)


def overlays() -> None:
    """Apply each overlay to the server, whole but for kinds that it does not serve."""
    known = served()
    for overlay in OVERLAYS:
        objects = rendered(overlay)
        strange = {(each["apiVersion"], each["kind"]) for each in objects} - known
        print(f"{overlay}: {len(objects)} objects; not served here: {sorted(kind for _, kind in strange) or 'none'}")
        namespaces = [each for each in objects if each["kind"] == "Namespace"]
        apply(namespaces)
        rest = [each for each in objects if (each["apiVersion"], each["kind"]) in known and each not in namespaces]
        applied = apply(rest)
        assert len(applied) == len(rest)
        before = generations(rest)
        apply(rest)
        assert generations(rest) == before
        print("  applied; applied again: nothing changed")
        for path in (*run_files(), "workflows/monthly.yaml", *rayjob_files()):
            apply([read(path)], "--dry-run=server")
        print(f"  {len(run_files()) + 1 + len(rayjob_files())} run files and RayJobs pass a dry run at the server")


def rights() -> None:
    """Hold what the account may do against what it should."""
    wanted = {
        ("get", "rayjobs.ray.io"): True,
        ("create", "rayjobs.ray.io"): True,
        ("patch", "rayjobs.ray.io"): True,
        ("create", "workflowtaskresults.argoproj.io"): True,
        ("patch", "workflowtaskresults.argoproj.io"): True,
        ("list", "rayjobs.ray.io"): False,
        ("delete", "rayjobs.ray.io"): False,
        ("get", "secrets"): False,
        ("list", "secrets"): False,
        ("create", "pods"): False,
        ("create", "rayservices.ray.io"): False,
        ("patch", "workflows.argoproj.io"): False,
    }
    for (verb, resource), allowed in wanted.items():
        assert can(verb, resource) is allowed, (verb, resource)
    assert not can("create", "rayjobs.ray.io", "default")
    print(f"rights: {len(wanted) + 1} questions answered as they should be")


def workflow() -> None:
    """Walk the emoji workflow as its account; KubeRay's part is played by the administrator."""
    template = find(rendered("kind"), "WorkflowTemplate", "fewstep-distill")
    made = read("workflows/emoji.yaml")
    apply([made])
    owner = json.loads(run("get", "workflow", "emoji-1", "-n", "fewstep", "-o", "json"))
    reference = {
        "apiVersion": owner["apiVersion"],
        "kind": owner["kind"],
        "name": "emoji-1",
        "uid": owner["metadata"]["uid"],
    }
    for step in argo.walk(made, template):
        if not step.runs or "resource" not in step.template:
            continue
        job = step.manifest
        job["metadata"]["namespace"] = "fewstep"
        job["metadata"]["ownerReferences"] = [reference]
        name = job["metadata"]["name"]
        (line,) = run("apply", "-f", "-", "--as", ACCOUNT, given=yaml.safe_dump(job)).splitlines()
        assert "created" in line
        before = generations([job])
        run("apply", "-f", "-", "--as", ACCOUNT, given=yaml.safe_dump(job))  # as after an eviction of Argo's pod
        assert generations([job]) == before
        if step.name == "guidance":  # KubeRay tries it again
            status(name, jobStatus="FAILED", jobDeploymentStatus="Retrying")
            assert _outcome(step, name) is None
        status(name, jobStatus="RUNNING", jobDeploymentStatus="Running")
        assert _outcome(step, name) is None
        status(name, jobStatus="SUCCEEDED", jobDeploymentStatus="Complete")
        assert _outcome(step, name) is True
    refused = run("delete", "rayjob", "emoji-1-guidance", "-n", "fewstep", "--as", ACCOUNT, fails=True)
    assert "forbidden" in refused
    job["spec"]["shutdownAfterJobFinish"] = True
    refused = run("apply", "-f", "-", "--as", ACCOUNT, given=yaml.safe_dump(job), fails=True)
    assert "unknown field" in refused
    print("workflow: all steps applied twice, waited for and ended as its service account; delete and a typo refused")
    run("delete", "workflow", "emoji-1", "-n", "fewstep")
    deadline = time.monotonic() + 120
    while left := run("get", "rayjobs", "-n", "fewstep", "-o", "name").split():
        assert time.monotonic() < deadline, left
        time.sleep(1)
    print("workflow: deleted, and its RayJobs with it")


def _outcome(step: argo.Step, name: str) -> bool | None:
    found: dict[str, Any] = json.loads(run("get", "rayjob", name, "-n", "fewstep", "-o", "json", "--as", ACCOUNT))
    return argo.outcome(step.template["resource"], found["status"])


if __name__ == "__main__":
    overlays()
    rights()
    workflow()
    run("delete", "namespace", "fewstep", "--wait=true")
    print("passed")
