"""Leaves the tests of this folder out, and says so, where torch sees no CUDA device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

_HERE = Path(__file__).parent
_left_out: list[str] = []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    without_device = [item for item in items if _HERE in item.path.parents]
    _left_out[:] = [item.nodeid for item in without_device]
    config.hook.pytest_deselected(items=without_device)
    items[:] = [item for item in items if item not in without_device]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if _left_out and "not gpu" not in str(config.option.markexpr):
        terminalreporter.write_line(
            f"{len(_left_out)} GPU tests left out: torch sees no CUDA device. Run `make gpu-check` where there is one."
        )
