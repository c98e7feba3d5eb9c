"""What Argo Workflows does with a workflow, as far as fewstep's workflows go.

Read from argo-workflows v4.1.2: workflow/executor/resource.go (when a resource step ends), workflow/controller/dag.go
(order, `when`), util/template (filling in). What the workflows here do not use is refused, not guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from k8s.rendered import Manifest, load

_MARK = re.compile(r"\{\{(.*?)\}\}")


class UnresolvedError(Exception):
    """A {{...}} that names nothing."""


def fill(value: Any, scope: Mapping[str, str]) -> Any:
    """Return the value with every {{name}} in its texts replaced, once: what is put in is not looked through again."""
    if isinstance(value, dict):
        return {key: fill(below, scope) for key, below in value.items()}
    if isinstance(value, list):
        return [fill(below, scope) for below in value]
    if not isinstance(value, str):
        return value

    def put(match: re.Match[str]) -> str:
        name = match.group(1).strip()
        if name not in scope:
            raise UnresolvedError(f"{{{{{name}}}}} names nothing; there are {sorted(scope)}")
        return scope[name]

    return _MARK.sub(put, value)


@dataclass(frozen=True)
class Step:
    """A task of the graph that is carried out: a template with its inputs filled in."""

    name: str
    template: Manifest
    after: tuple[str, ...]
    runs: bool

    @property
    def manifest(self) -> Manifest:
        """The object that a resource step applies."""
        (only,) = load(self.template["resource"]["manifest"])
        return only


def parameters(workflow: Manifest, template: Manifest) -> dict[str, str]:
    """Return the workflow's parameters: its own, and the template's where it says nothing.

    Raises:
        UnresolvedError: it has one that the template does not know, or a value that is not in its enum.
    """
    known = {each["name"]: each for each in template["spec"]["arguments"]["parameters"]}
    own = {each["name"]: each["value"] for each in workflow["spec"].get("arguments", {}).get("parameters", [])}
    if strangers := set(own) - set(known):
        raise UnresolvedError(f"parameters that the template does not know: {sorted(strangers)}")
    values = {name: own.get(name, each["value"]) for name, each in known.items()}
    for name, each in known.items():
        if "enum" in each and values[name] not in each["enum"]:
            raise UnresolvedError(f"{name}={values[name]} is none of {each['enum']}")
    return values


def walk(workflow: Manifest, template: Manifest, *, now: str = "2026-11") -> Iterator[Step]:
    """Yield the steps of a workflow in an order in which Argo may run them."""
    spec = workflow["spec"]
    year, month = now.split("-")
    scope = {
        "workflow.name": workflow["metadata"]["name"],
        "workflow.creationTimestamp.Y": year,
        "workflow.creationTimestamp.m": month,
    }
    assert spec["workflowTemplateRef"]["name"] == template["metadata"]["name"]
    values = parameters(workflow, template)
    spec = template["spec"]
    entry = _template(spec, spec["entrypoint"])
    # The entrypoint is given the arguments filled in; as workflow.parameters they are put in as they stand.
    inputs = {f"inputs.parameters.{name}": fill(values[name], scope) for name in _inputs(entry)}
    scope |= {f"workflow.parameters.{name}": value for name, value in values.items()}
    tasks = {task["name"]: task for task in entry["dag"]["tasks"]}
    done: list[str] = []
    while len(done) < len(tasks):
        ready = [n for n, t in tasks.items() if n not in done and set(t.get("dependencies", ())) <= set(done)]
        assert ready, f"the tasks wait for each other: {sorted(set(tasks) - set(done))}"
        task = tasks[ready[0]]
        done.append(ready[0])
        runs = when(fill(task.get("when", "true == true"), {**scope, **inputs}))
        arguments = fill(task.get("arguments", {}).get("parameters", []), {**scope, **inputs})
        of_task = {each["name"]: each["value"] for each in arguments}
        below = _template(spec, task["template"])
        assert set(_inputs(below)) == set(of_task), f"{task['name']}: inputs and arguments differ"
        own = {f"inputs.parameters.{name}": value for name, value in of_task.items()}
        kept = {key: value for key, value in below.items() if key not in ("inputs", "outputs")}
        yield Step(task["name"], fill(kept, {**scope, **own}), tuple(task.get("dependencies", ())), runs)


def _template(spec: Manifest, name: str) -> Manifest:
    (only,) = [each for each in spec["templates"] if each["name"] == name]
    return only


def _inputs(template: Manifest) -> list[str]:
    return [each["name"] for each in template.get("inputs", {}).get("parameters", [])]


def when(expression: str) -> bool:
    """Return whether a condition of the form `A == B` holds."""
    left, mark, right = expression.partition(" == ")
    assert mark, f"a condition of another form: {expression}"
    assert " " not in left + right, f"a condition of another form: {expression}"
    return left == right


def outcome(resource: Manifest, status: Mapping[str, str]) -> bool | None:
    """Return how a resource step stands with an object's status: True succeeded, False failed, None waits on.

    The conditions are label selectors over the object's JSON; a comma is an "and" in successCondition and an "or" in
    failureCondition (resource.go, matchConditions).
    """
    labels = {f"status.{key}": value for key, value in status.items()}
    if any(_matches(each, labels) for each in _requirements(resource["failureCondition"])):
        return False
    return True if all(_matches(each, labels) for each in _requirements(resource["successCondition"])) else None


def _requirements(selector: str) -> list[str]:
    return [each.strip() for each in re.split(r",(?![^(]*\))", selector)]


def _matches(requirement: str, labels: Mapping[str, str]) -> bool:
    if match := re.fullmatch(r"(\S+) == (\S+)", requirement):
        return labels.get(match.group(1)) == match.group(2)
    match = re.fullmatch(r"(\S+) in \(([^)]+)\)", requirement)
    assert match, f"a condition of another form: {requirement}"
    return labels.get(match.group(1)) in {each.strip() for each in match.group(2).split(",")}
