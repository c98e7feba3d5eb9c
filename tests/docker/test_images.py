"""The images hold what their programs need, as far as that can be told without building one (docs/images.md)."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

_TOP = Path(__file__).parents[2]
_DOCKERFILES = sorted(_TOP.glob("docker/*/Dockerfile"))
_IMAGES = [path.parent.name for path in _DOCKERFILES]
_SERVING = _TOP / "docker" / "serving"
# Of these the serving rooms import a part only where it is there, or where no service comes.
_DONE_WITHOUT = {
    "peft": "only trainings put adapters on a network; models/lora.py looks for it first",
    "pyarrow": "only Ray Data reads tables from the store",
    "sqlalchemy": "only an MLflow on a database raises its errors; tracking/connection.py looks for it first",
}


def _instructions(image: str) -> list[tuple[str, str]]:
    """(INSTRUCTION, arguments) of a Dockerfile, comments dropped and continued lines joined."""
    text = (_TOP / "docker" / image / "Dockerfile").read_text()
    text = re.sub(r"^#.*\n", "", text, flags=re.M).replace("\\\n", " ")
    return [(head, rest.strip()) for head, _, rest in (line.partition(" ") for line in text.splitlines()) if head]


def _copied(image: str) -> list[str]:
    """Sources that a Dockerfile copies out of the repository."""
    copies = [rest.split() for head, rest in _instructions(image) if head == "COPY" and not rest.startswith("--from")]
    return [source for words in copies for source in words[:-1]]


def _let_through(image: str, path: str) -> bool:
    """Whether the image's .dockerignore leaves `path` in the context; the last rule that fits decides."""
    kept = True
    for rule in (_TOP / "docker" / image / "Dockerfile.dockerignore").read_text().splitlines():
        pattern = rule.removeprefix("!").strip()
        if not pattern or pattern.startswith("#"):
            continue
        parents = ["/".join(path.split("/")[: i + 1]) for i in range(path.count("/") + 1)]
        if any(fnmatch(part, pattern) or fnmatch(part, pattern.replace("**/", "*")) for part in parents):
            kept = rule.startswith("!")
    return kept


def _names(requirements: Path) -> set[str]:
    lines = (line.split("#")[0].strip() for line in requirements.read_text().splitlines())
    return {_plain(re.split(r"[\[=<>;]", line)[0]) for line in lines if line}


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _imports(path: Path) -> set[str]:
    """Modules that a file imports, lazily or not; those for type checkers alone left out."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {
                f"{node.module}.{alias.name}" if node.module == "fewstep" else str(node.module) for alias in node.names
            }
    return found


def _served_files() -> list[Path]:
    code = [_TOP / source for source in _copied("serving") if source.startswith("src/fewstep/")]
    return [file for path in code for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]


@pytest.mark.parametrize("image", _IMAGES)
def test_hadolint_finds_nothing(image):
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run(
        [hadolint, _TOP / "docker" / image / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("image", _IMAGES)
def test_what_is_copied_is_there_and_in_the_context(image):
    assert _copied(image)
    for source in _copied(image):
        assert (_TOP / source).exists(), source
        assert _let_through(image, source), f"{source} is kept out by docker/{image}/Dockerfile.dockerignore"
    for kept_out in (".venv/bin/python", "runs/x", ".git/config", "src/fewstep/models/__pycache__/x.pyc"):
        assert not _let_through(image, kept_out), kept_out


@pytest.mark.parametrize("image", _IMAGES)
def test_final_stage_is_of_this_project_s_kind(image):
    instructions = _instructions(image)
    assert instructions[0] == ("ARG", "BASE_IMAGE=python:3.11-slim-bookworm")
    stages = [number for number, (head, _) in enumerate(instructions) if head == "FROM"]
    assert len(stages) == 2
    final = instructions[stages[-1] :]
    assert ("USER", "1000:1000") in final  # a name would not pass for Kubernetes' runAsNonRoot
    assert [head for head, _ in final].count("HEALTHCHECK") == 1
    installed = " ".join(rest for head, rest in final if head == "RUN")
    assert " wget" in installed
    assert "pip" not in installed
    assert not re.search(r"gcc|g\+\+|build-essential|-dev\b", installed)
    labels = " ".join(rest for head, rest in final if head == "LABEL")
    for label in ("title", "source", "version", "licenses", "revision"):
        assert f"org.opencontainers.image.{label}=" in labels
    version = tomllib.loads((_TOP / "pyproject.toml").read_text())["project"]["version"]
    assert ("ARG", f"VERSION={version}") in final


@pytest.mark.parametrize("image", _IMAGES)
def test_every_install_keeps_to_versions_that_are_pinned(image):
    installs = [part for _, rest in _instructions(image) for part in rest.split("&&") if " install ${PIP_ARGS}" in part]
    assert installs
    assert all(" -c " in part or " --no-deps " in part for part in installs), installs
    for folder, requirements in (("", "docker/serving"), ("docker/prepare", "docker/prepare")):
        pinned = _names(_TOP / folder / "constraints.txt")
        lines = (_TOP / folder / "constraints.txt").read_text().splitlines()
        assert all("==" in line for line in lines if line and not line.startswith("#"))
        # That one is for a Python that the images have not.
        assert _names(_TOP / requirements / "requirements.txt") - pinned <= {"standard-imghdr"}


def test_packages_of_torch_s_cuda_build_are_those_of_the_torch_that_is_pinned():
    lines = (_TOP / "docker" / "cuda-constraints.txt").read_text().splitlines()
    (torch,) = (line for line in (_TOP / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    assert f"Resolved with {torch.replace('==', ' ')};" in lines[1]
    assert any(line.startswith("triton==") for line in lines)
    assert all("==" in line for line in lines[2:])


def test_serving_image_holds_whatever_the_code_in_it_imports():
    files = _served_files()
    modules = {
        ".".join(file.relative_to(_TOP / "src").with_suffix("").parts).removesuffix(".__init__") for file in files
    }
    assert "fewstep.serve.app" in modules
    installed, distributions = _names(_SERVING / "requirements.txt"), packages_distributions()
    for file in files:
        for module in _imports(file):
            top = module.split(".")[0]
            if top == "fewstep":
                assert module in modules or module.rpartition(".")[0] in modules, f"{file} imports {module}"
            elif top not in sys.stdlib_module_names and top not in _DONE_WITHOUT:
                providers = {_plain(name) for name in distributions[top]}
                assert providers & installed, (
                    f"{file} imports {module}: add {providers} to docker/serving/requirements.txt"
                )


def test_serving_image_holds_no_training_and_nothing_needless():
    rooms = {file.relative_to(_TOP / "src" / "fewstep").parts[0] for file in _served_files()}
    assert rooms == {"__init__.py", "errors.py", "diffusion", "models", "storage", "tracking", "serve"}
    used = {module.split(".")[0] for file in _served_files() for module in _imports(file)}
    distributions = packages_distributions()
    needed = {_plain(name) for top in used - set(_DONE_WITHOUT) for name in distributions.get(top, [])}
    assert _names(_SERVING / "requirements.txt") <= needed
    assert set(_DONE_WITHOUT) <= used


def test_serving_image_s_own_configuration_is_of_the_form_that_the_service_takes():
    from ray.serve.schema import ServeDeploySchema

    from fewstep.serve.app import ServeArguments

    document = yaml.safe_load((_SERVING / "serve.yaml").read_text())
    (application,) = ServeDeploySchema.model_validate(document).applications
    assert application.import_path == "fewstep.serve.app:build"
    arguments = ServeArguments.model_validate(application.args)
    for uri in arguments.serve.models:
        assert f"src/fewstep/assets/{uri.removeprefix('asset:')}" in _copied("serving")
