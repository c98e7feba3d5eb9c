"""Strict checks of Kubernetes objects without a server: fields that do not exist, wrong types, rules.

Core kinds and pods by kubernetes-validate. Custom kinds by the compact schemas in `schemas/`, cut from the projects'
own definitions (KubeRay v1.7.0, Argo Workflows v4.1.2, Kueue v0.19.2, External Secrets v2.9.0) to the fields used here:

    python tests/k8s/schemas.py FOLDER_WITH_CRDS

(those of the Prometheus operator are written by hand).

Where those definitions are at hand ($FEWSTEP_CRDS, or ../shared/schemas), they are checked whole too, with their rules
in CEL.
"""

from __future__ import annotations

import functools
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from k8s.rendered import REPO, Manifest, pods

COMPACT = Path(__file__).parent / "schemas"
KUBERNETES = "1.36.0"
_CUSTOM = ("ray.io/", "argoproj.io/", "kueue.x-k8s.io/", "external-secrets.io/", "monitoring.coreos.com/")
# It reads its largest file anew for each object.
kubernetes_validate.utils.schema_contents = functools.cache(kubernetes_validate.utils.schema_contents)
_META = {
    "type": "object",
    "additionalProperties": False,
    "required": ["name"],
    "properties": {
        "name": {"type": "string"},
        "namespace": {"type": "string"},
        "labels": {"type": "object", "additionalProperties": {"type": "string"}},
        "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
    },
}
_KEPT = (
    *("type", "enum", "pattern", "format", "required", "minimum", "maximum", "minLength", "maxLength"),
    *("minItems", "maxItems", "minProperties", "maxProperties", "allOf", "anyOf", "oneOf", "not"),
)


def is_custom(manifest: Manifest) -> bool:
    """Return whether the kind is of another project than Kubernetes."""
    return manifest["apiVersion"].startswith(_CUSTOM)


def faults(manifest: Manifest) -> list[str]:
    """Return what an API server with strict decoding would refuse, in words."""
    name = f"{manifest['kind']}/{manifest['metadata']['name']}"
    found = [f"{name}: {fault}" for fault in (_custom(manifest) if is_custom(manifest) else _core(manifest))]
    for where, template in pods(manifest):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod", **template.get("metadata", {})}}
        found += [f"{where}: {fault}" for fault in _core({**pod, "spec": template["spec"]})]
    return found


def _core(manifest: Manifest) -> list[str]:
    return _core_text(json.dumps(manifest))


@functools.cache
def _core_text(manifest: str) -> list[str]:
    try:
        kubernetes_validate.validate(json.loads(manifest), KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{'.'.join(map(str, error.path))}: {error.message[:300]}"]
    return []


def _custom(manifest: Manifest) -> list[str]:
    return [
        f"{'.'.join(map(str, error.absolute_path))}: {error.message[:300]}"
        for error in _compact(manifest["apiVersion"], manifest["kind"]).iter_errors(manifest)
    ]


@functools.cache
def _compact(version: str, kind: str) -> jsonschema.Draft202012Validator:
    file = COMPACT / f"{kind.lower()}.json"
    assert file.exists(), f"{file.name} is not there; see {__file__}"
    schema = json.loads(file.read_text())
    assert schema["properties"]["apiVersion"] == {"const": version}, f"{kind}: {version} is another version"
    return jsonschema.Draft202012Validator(schema)


# --- the whole definitions, where they are at hand


def definitions() -> Path | None:
    """Return the folder of the projects' own definitions, if it is here."""
    folder = Path(os.environ.get("FEWSTEP_CRDS", REPO.parent / "shared" / "schemas"))
    return folder if folder.is_dir() else None


@functools.cache
def _whole(folder: Path) -> dict[tuple[str, str], Any]:
    found = {}
    for file in folder.rglob("*.yaml"):
        definition = yaml.load(file.read_text(), Loader=yaml.CSafeLoader)
        if not isinstance(definition, dict) or definition.get("kind") != "CustomResourceDefinition":
            continue
        for version in definition["spec"]["versions"]:
            key = (f"{definition['spec']['group']}/{version['name']}", definition["spec"]["names"]["kind"])
            found[key] = version["schema"]["openAPIV3Schema"]
    return found


@functools.cache
def _whole_validator(folder: Path, version: str, kind: str) -> jsonschema.Draft202012Validator:
    schema = strict(_whole(folder)[version, kind])
    schema["properties"] |= {"apiVersion": {"const": version}, "kind": {"const": kind}, "metadata": _META}
    return jsonschema.Draft202012Validator(schema)


def is_defined(manifest: Manifest, folder: Path) -> bool:
    """Return whether the definition of the kind is in the folder."""
    return (manifest["apiVersion"], manifest["kind"]) in _whole(folder)


def whole_faults(manifest: Manifest, folder: Path) -> list[str]:
    """Return what the whole definition of a custom kind refuses: fields, types, values, CEL rules."""
    key = (manifest["apiVersion"], manifest["kind"])
    name = f"{manifest['kind']}/{manifest['metadata']['name']}"
    found = [
        f"{name}: {'.'.join(map(str, error.absolute_path))}: {error.message[:300]}"
        for error in _whole_validator(folder, *key).iter_errors(manifest)
    ]
    return found + [f"{name}{fault}" for fault in _cel(_whole(folder)[key], manifest, "")]


def strict(schema: Any) -> Any:
    """Return a structural schema as a JSON schema that also refuses unknown fields, as strict decoding does."""
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    made = {key: schema[key] for key in _KEPT if key in schema}
    if "pattern" in made and (flags := re.search(r"\(\?([ims]+)\)", made["pattern"])):  # Go's may stand anywhere
        made["pattern"] = f"(?{flags.group(1)})" + made["pattern"].replace(flags.group(0), "")
    below = schema.get("properties")
    if below is not None:
        made["properties"] = {key: strict(value) for key, value in below.items()}
    further = schema.get("additionalProperties")
    if isinstance(further, dict):
        made["additionalProperties"] = strict(further)
    elif below is not None and further is not True and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made["additionalProperties"] = False
    if "required" in made:  # the API server fills defaults in before it looks
        made["required"] = [key for key in made["required"] if "default" not in (below or {}).get(key, {})]
    if "items" in schema:
        made["items"] = strict(schema["items"])
    if schema.get("x-kubernetes-embedded-resource"):
        made.pop("additionalProperties", None)
    return {"anyOf": [made, {"type": "null"}]} if schema.get("nullable") else made


def _cel(schema: Any, value: Any, where: str) -> Iterator[str]:
    import celpy

    for rule in schema.get("x-kubernetes-validations", []):
        if "oldSelf" not in rule["rule"]:  # those are about updates
            holds = _program(rule["rule"]).evaluate({"self": celpy.json_to_cel(value)})
            if not holds:
                yield f"{where}: {rule.get('message') or rule['rule']}"
    if isinstance(value, dict):
        for key, below in value.items():
            further = schema.get("additionalProperties")
            of_key = schema.get("properties", {}).get(key) or (further if isinstance(further, dict) else None)
            if of_key:
                yield from _cel(of_key, below, f"{where}.{key}")
    elif isinstance(value, list) and "items" in schema:
        for number, below in enumerate(value):
            yield from _cel(schema["items"], below, f"{where}[{number}]")


@functools.cache
def _program(rule: str) -> Any:
    import celpy

    environment = celpy.Environment()
    return environment.program(environment.compile(rule))


# --- cutting them down


def cut(schema: Any, values: list[Any]) -> Any:
    """Return the strict schema of the fields that these values have; pods are checked elsewhere."""
    if "anyOf" in schema and "type" not in schema and "properties" not in schema:
        return schema
    made = {key: value for key, value in schema.items() if key not in ("properties", "items", "additionalProperties")}
    mappings = [value for value in values if isinstance(value, dict)]
    if "properties" in schema:
        used = sorted({key for value in mappings for key in value})
        made["properties"] = {
            key: {"type": "object"}
            if _is_pod([value[key] for value in mappings if key in value])
            else cut(schema["properties"][key], [value[key] for value in mappings if key in value])
            for key in used
            if key in schema["properties"]
        }
        made["additionalProperties"] = schema.get("additionalProperties", False)
    elif "additionalProperties" in schema:
        made["additionalProperties"] = schema["additionalProperties"]
    if "items" in schema:
        lists = [value for value in values if isinstance(value, list)]
        made["items"] = cut(schema["items"], [each for value in lists for each in value])
    return made


def _is_pod(values: list[Any]) -> bool:
    return any(isinstance(value, dict) and "containers" in (value.get("spec") or {}) for value in values)


def write_compact(folder: Path) -> None:
    """Write the compact schemas of all custom objects of the repository."""
    from k8s.all_objects import all_objects

    COMPACT.mkdir(exist_ok=True)
    by_kind: dict[tuple[str, str], list[Manifest]] = {}
    for manifest in all_objects():
        if is_custom(manifest) and (manifest["apiVersion"], manifest["kind"]) in _whole(folder):
            by_kind.setdefault((manifest["apiVersion"], manifest["kind"]), []).append(manifest)
    for (version, kind), manifests in by_kind.items():
        schema = cut(_whole_validator(folder, version, kind).schema, manifests)
        schema["properties"] |= {"apiVersion": {"const": version}, "kind": {"const": kind}, "metadata": _META}
        (COMPACT / f"{kind.lower()}.json").write_text(json.dumps(schema, indent=1, sort_keys=True) + "\n")
        print(kind, len(manifests))


if __name__ == "__main__":
    write_compact(Path(sys.argv[1]))
