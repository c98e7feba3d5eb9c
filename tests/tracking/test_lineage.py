import shutil
import subprocess
import sys
from pathlib import Path

from fewstep.tracking import lineage


def _git(folder: Path, *arguments: str) -> str:
    names = ["-c", "user.name=t", "-c", "user.email=t@example.com", "-c", "commit.gpgsign=false"]
    command = ["git", *names, "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _commit_seen_from(source: Path) -> str:
    code = "from fewstep.tracking.lineage import git_commit; print(git_commit())"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(source), "PATH": "/usr/bin:/bin:/usr/local/bin"},
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return done.stdout.strip()


def test_commit_is_that_of_the_working_copy_and_changes_show(tmp_path):
    package = tmp_path / "src" / "fewstep"
    here = Path(lineage.__file__).parents[1]
    (package / "tracking").mkdir(parents=True)
    for name in ("__init__.py", "errors.py", "tracking/__init__.py", "tracking/lineage.py"):
        shutil.copy(here / name, package / name)
    _git(tmp_path, "init", "-q")
    assert _commit_seen_from(tmp_path / "src") == "None"  # not part of the repository around it
    _git(tmp_path, "add", ".")
    _git(tmp_path, "commit", "-q", "-m", "x")
    commit = _git(tmp_path, "rev-parse", "HEAD")
    shutil.rmtree(package / "__pycache__", ignore_errors=True)
    shutil.rmtree(package / "tracking" / "__pycache__", ignore_errors=True)
    (tmp_path / ".git" / "info" / "exclude").write_text("__pycache__\n")
    assert _commit_seen_from(tmp_path / "src") == commit
    (package / "errors.py").write_text((package / "errors.py").read_text() + "\n# changed\n")
    assert _commit_seen_from(tmp_path / "src") == f"{commit}-dirty"


def test_image_without_a_repository_names_its_commit(monkeypatch):
    monkeypatch.setenv("FEWSTEP_GIT_COMMIT", "abc123")
    tags = lineage.lineage()
    assert tags["fewstep.git_commit"] == tags["mlflow.source.git.commit"] == "abc123"
