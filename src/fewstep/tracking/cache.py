"""Folders fetched once: below $FEWSTEP_HOME/cache, whole or not there, and no more of them than fit a limit."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from fewstep.errors import StorageError
from fewstep.tracking.settings import fewstep_home

logger = logging.getLogger(__name__)

#: Environment variable with the size in GB that the cache is kept below.
CACHE_LIMIT = "FEWSTEP_CACHE_GB"
_DEFAULT_LIMIT_GB = 100.0
#: A folder that was asked for this recently may be in the middle of being read.
_IN_USE_S = 3600.0


def cached_folder(name: Path, fill: Callable[[Path], None]) -> Path:
    """The folder `name` (KIND/ENTRY) of the cache, made by `fill(folder)` if it is not there yet.

    It appears in one step when `fill` is through, and processes that want it at the same time wait for one of them.
    Afterwards the folders that were not asked for the longest are deleted until all are below $FEWSTEP_CACHE_GB (100);
    none that was asked for within the last hour. StorageError when the cache cannot be written, or the limit is no
    number.
    """
    limit_bytes = _limit_bytes()
    root = fewstep_home() / "cache"
    target = root / name
    try:
        if target.is_dir():
            with contextlib.suppress(OSError):  # a cache that is filled once and mounted read-only
                os.utime(target)
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if target.is_dir():
                return target
            workplace = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
            try:
                folder = workplace / target.name
                fill(folder)
                os.utime(folder)  # when it was asked for; a copy may have brought the time of its source
                os.replace(folder, target)
            finally:
                shutil.rmtree(workplace, ignore_errors=True)
        with contextlib.suppress(OSError):  # another process prunes, too
            _prune(root, limit_bytes)
    except OSError as error:
        raise StorageError(
            f"cache {target}: {error}. Free space there, or set FEWSTEP_HOME to a folder that can be written."
        ) from error
    return target


def _limit_bytes() -> float:
    text = os.environ.get(CACHE_LIMIT) or str(_DEFAULT_LIMIT_GB)
    try:
        limit_gb = float(text)
    except ValueError:
        limit_gb = -1.0
    if not limit_gb >= 0:
        raise StorageError(f"{CACHE_LIMIT}={text!r} must be a size in GB, 0 or more, for example 100")
    return limit_gb * 1e9


def _prune(root: Path, limit_bytes: float) -> None:
    # All names are KIND/ENTRY.
    found = [folder for kind in root.iterdir() if kind.is_dir() for folder in kind.iterdir() if folder.is_dir()]
    sizes = {folder: sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) for folder in found}
    total = sum(sizes.values())
    for folder in sorted(found, key=lambda folder: folder.stat().st_mtime):
        if total <= limit_bytes or time.time() - folder.stat().st_mtime < _IN_USE_S:
            return
        if _delete(folder):
            logger.info("cache: %s deleted (%.2f GB), to stay below %s", folder, sizes[folder] / 1e9, CACHE_LIMIT)
            total -= sizes[folder]


def _delete(folder: Path) -> bool:
    """Take a folder out of sight in one step, then delete it, unless somebody asked for it meanwhile."""
    if _is_left_over(folder):
        shutil.rmtree(folder, ignore_errors=True)
        return True
    hidden = folder.with_name(f".{folder.name}-deleted")
    with FileLock(f"{folder}.lock"):
        if time.time() - folder.stat().st_mtime < _IN_USE_S:
            return False
        shutil.rmtree(hidden, ignore_errors=True)
        os.replace(folder, hidden)
    shutil.rmtree(hidden, ignore_errors=True)
    return True


def _is_left_over(folder: Path) -> bool:
    """Whether the folder is the workplace of a process that was killed while it filled or deleted."""
    return folder.name.startswith(".")
