"""Models that a process in the cluster cannot load, in a module that it can import."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from fewstep.errors import ModelError
from fewstep.models import Parts, load_model


def dies_once(teacher: Path, mark: Path) -> Parts:
    """Kill the first process that asks."""
    if not mark.exists():
        mark.write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGKILL)
    return load_model(teacher)


def cannot_load() -> Parts:
    """Refuse as a damaged folder is refused."""
    raise ModelError("the folder nowhere has no unet: name another")
