"""The files themselves: made ones as their source makes them, and all of them well formed."""

import importlib.util
import subprocess
import sys
from pathlib import Path

from k8s.rendered import REPO


def test_made_files_are_what_their_source_makes():
    spec = importlib.util.spec_from_file_location("generate", REPO / "workflows" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    sys.modules["generate"] = generate  # its dataclasses look for their module
    spec.loader.exec_module(generate)
    made = generate.files()
    stale = [
        str(path.relative_to(REPO)) for path, text in made.items() if not path.exists() or path.read_text() != text
    ]
    assert not stale, "run `make manifests`"
    there = {*(REPO / "workflows" / "rayjobs").rglob("*.yaml"), *(REPO / "workflows").glob("*.yaml")}
    assert there - {REPO / "workflows" / "kustomization.yaml"} == {
        path for path in made if path.parent.name != "distill"
    }


def test_yaml_is_well_formed():
    done = subprocess.run(
        [
            Path(sys.executable).parent / "yamllint",
            "--strict",
            "--config-file",
            REPO / ".yamllint.yaml",
            "k8s",
            "workflows",
        ],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=REPO,
    )
    assert done.returncode == 0, done.stdout + done.stderr
