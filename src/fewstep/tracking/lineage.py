"""Which code made a thing."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = ("fewstep", "torch", "diffusers", "ray")


def git_commit() -> str | None:
    """The commit this code runs from, with ``-dirty`` behind it when files were changed; None when there is no telling.

    $FEWSTEP_GIT_COMMIT comes first: images are built without the repository.
    """
    given = os.environ.get("FEWSTEP_GIT_COMMIT")
    if given:
        return given
    package = Path(__file__).resolve().parents[1]
    # An installed package may lie inside somebody else's repository, whose commit would mean nothing.
    if _git(package, "ls-files", "--error-unmatch", "errors.py") is None:
        return None
    commit = _git(package, "rev-parse", "--verify", "--quiet", "HEAD")
    if not commit:
        return None
    return f"{commit}-dirty" if _git(package, "status", "--porcelain", "--", str(package)) else commit


def lineage() -> dict[str, str]:
    """Tags that name the code: git commit (if known), Python, and the packages that decide the numbers."""
    tags = {"fewstep.python": platform.python_version()}
    for name in _PACKAGES:
        try:
            tags["fewstep.version" if name == "fewstep" else f"fewstep.{name}"] = version(name)
        except PackageNotFoundError:
            continue
    commit = git_commit()
    if commit is not None:
        tags["fewstep.git_commit"] = commit
        tags["mlflow.source.git.commit"] = commit.removesuffix("-dirty")
    return tags


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=False
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
