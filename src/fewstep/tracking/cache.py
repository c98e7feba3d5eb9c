"""Folders fetched once: below $FEWSTEP_HOME/cache, whole or not there."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from fewstep.errors import StorageError
from fewstep.tracking.settings import fewstep_home


def cached_folder(name: Path, fill: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache, made by `fill(folder)` if it is not there yet.

    It appears in one step when `fill` is through, and processes that want it at the same time wait for one of them.
    StorageError when the cache cannot be written.
    """
    target = fewstep_home() / "cache" / name
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if target.is_dir():
                return target
            workplace = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
            try:
                folder = workplace / target.name
                fill(folder)
                os.replace(folder, target)
            finally:
                shutil.rmtree(workplace, ignore_errors=True)
    except OSError as error:
        raise StorageError(
            f"cache {target}: {error}. Free space there, or set FEWSTEP_HOME to a folder that can be written."
        ) from error
    return target
