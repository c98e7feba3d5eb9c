"""Every object that a user of this repository could apply, and every one that those make."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from k8s.argo import walk
from k8s.rendered import OVERLAYS, Manifest, everything, find, rayjob_files, read, rendered, run_files

#: Applied by hand at times.
OTHERS = ("workflows/monthly.yaml", "k8s/mlflow-upgrade.yaml")


@functools.cache
def _objects() -> tuple[tuple[str, Manifest], ...]:
    found: list[tuple[str, Manifest]] = []
    for overlay in OVERLAYS:
        found += [(overlay, each) for each in rendered(overlay)]
    found += [("everything", each) for each in everything()]
    found += [(path, read(path)) for path in (*run_files(), *OTHERS, *rayjob_files())]
    return (*found, *((f"step of {source}", each) for source, each in steps()))


#: The run that the README begins with on an overlay.
FIRST = {"kind": "workflows/emoji.yaml", "gpu": "workflows/sd15-laion.yaml", "aws": "workflows/sd15-laion.yaml"}


def all_objects() -> list[Manifest]:
    """Return them all, those that several overlays have several times."""
    return [each for _, each in _objects()]


def named_objects() -> list[tuple[str, Manifest]]:
    """Return (where from, object) of all."""
    return list(_objects())


def steps() -> Iterator[tuple[str, Manifest]]:
    """Yield (run file, RayJob) of each step of each run on each overlay's template."""
    for overlay in OVERLAYS:
        template = find(rendered(overlay), "WorkflowTemplate", "fewstep-distill")
        # All runs on one overlay, and on the others the one for each: what differs is the template's values alone.
        runs = {path: read(path) for path in (run_files() if overlay == "gpu" else [FIRST[overlay]])}
        if overlay == "gpu":
            runs["workflows/monthly.yaml"] = monthly()
        for path, run in runs.items():
            for step in walk(run, template):
                if step.runs and "resource" in step.template:
                    yield f"{path} on {overlay}", step.manifest


def monthly() -> Manifest:
    """Return a workflow as the CronWorkflow makes one."""
    cron = read("workflows/monthly.yaml")
    name = f"{cron['metadata']['name']}-1793480400"
    return {"kind": "Workflow", "metadata": {"name": name}, "spec": cron["spec"]["workflowSpec"]}
