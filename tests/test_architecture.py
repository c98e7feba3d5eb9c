"""The rooms use only what docs/architecture.md lets them use (contracts in pyproject.toml)."""

from pathlib import Path

import pytest
from importlinter.cli import lint_imports

_PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def test_no_room_uses_what_it_may_not(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(_PYPROJECT.parent)
    assert lint_imports(config_filename=str(_PYPROJECT), no_cache=True) == 0, capsys.readouterr().out
