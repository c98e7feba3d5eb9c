"""Local files with an object store's manners: whole objects, written in one step, missing ones said in words."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from fewstep.errors import StorageError
from fewstep.storage.faults import ObjectNotFoundError, full_error, is_full
from fewstep.storage.object_range import ObjectRange, empty_buffer


@contextlib.contextmanager
def disk_errors(what: str, path: Path) -> Iterator[None]:
    """Turns an OSError inside the block into a StorageError that names the disk when that is full."""
    try:
        yield
    except FileNotFoundError as error:
        raise ObjectNotFoundError(f"{what}: no such file.") from error
    except OSError as error:
        if is_full(error):
            raise full_error(what=what, place="disk", folder=path) from error
        raise StorageError(f"{what}: {error.strerror or error}.") from error


def open_read(path: Path) -> BinaryIO:
    """The file, open for reading. ObjectNotFoundError when it is missing."""
    with disk_errors(f"read {path}", path):
        return path.open("rb")


def read_range(path: Path, start: int, end: int) -> ObjectRange:
    """The bytes `start` to `end` of the file; fewer where it ends before. ObjectNotFoundError when it is missing."""
    with disk_errors(f"read {path}", path), path.open("rb") as file:
        size_bytes = os.fstat(file.fileno()).st_size
        data = empty_buffer(max(0, min(end, size_bytes) - start))
        file.seek(start)
        got = file.readinto(data)
        return ObjectRange(data[:got], size_bytes, "")


def copy(source: Path, target: Path) -> None:
    """Copies a file in one step (a reader never sees half of it)."""
    with disk_errors(f"copy {source} to {target}", target):
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = _beside(target)
        try:
            shutil.copyfile(source, partial)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)


def write(path: Path, data: bytes, *, if_absent: bool) -> bool:
    """Writes the file in one step (a reader never sees half of it). False when `if_absent` and it was there."""
    with disk_errors(f"write {path}", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = _beside(path)
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if not if_absent:
                partial.replace(path)
                return True
            try:
                os.link(partial, path)  # unlike rename, link refuses to replace
            except FileExistsError:
                return False
            return True
        finally:
            partial.unlink(missing_ok=True)


def below(folder: Path) -> list[Path]:
    """All files below the folder, sorted as an object store sorts their names."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(files, key=lambda path: path.relative_to(folder).as_posix())


def delete(path: Path, *, recursive: bool) -> None:
    """Deletes a file, or with `recursive` a folder. What is not there is no error."""
    with disk_errors(f"delete {path}", path):
        if recursive and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif not path.is_dir():
            path.unlink(missing_ok=True)


def mirror(files: dict[str, Path], target: Path) -> None:
    """Makes `target` a folder of just these files, in one step."""
    with disk_errors(f"copy to {target}", target), staging(target) as folder:
        for name, path in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)


@contextlib.contextmanager
def staging(target: Path) -> Iterator[Path]:
    """Yields an empty folder beside `target` that takes its place when the block ends well, and goes when it fails."""
    if target.exists() and not target.is_dir():
        raise StorageError(f"{target} is a file; a folder is to be written there. Choose another place.")
    partial = _beside(target)
    with disk_errors(f"write {target}", target):
        partial.mkdir(parents=True)
    try:
        yield partial
        with disk_errors(f"write {target}", target):
            old = _beside(target, ".old.part")
            if target.exists():
                target.rename(old)
            partial.rename(target)
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _beside(path: Path, suffix: str = ".part") -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}{suffix}")
