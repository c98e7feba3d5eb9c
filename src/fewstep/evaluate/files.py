"""Files of a report: written whole or not at all, and read back."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from fewstep.errors import DataError

_Report = TypeVar("_Report", bound=BaseModel)


def replace_text(path: Path, text: str) -> None:
    """Write a file aside and move it: a run killed here leaves the old one or the new one, never half of one."""
    aside = path.with_name(path.name + ".part")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def read_json_report(kind: type[_Report], path: str | os.PathLike[str], *, what: str, remedy: str) -> _Report:
    """Return a report from its JSON.

    Args:
        kind: of the report.
        path: its file.
        what: what it should be, such as "report".
        remedy: what to run, such as "run the evaluate stage".

    Raises:
        DataError: the file is missing, or is no such report of this version.
    """
    try:
        return kind.model_validate_json(Path(path).read_bytes())
    except OSError as error:
        raise DataError(f"the {what} {os.fspath(path)} cannot be read: {error}; {remedy}") from error
    except ValidationError as error:
        raise DataError(
            f"{os.fspath(path)} is no {what} of this version of fewstep: {error}; {remedy} again"
        ) from error
