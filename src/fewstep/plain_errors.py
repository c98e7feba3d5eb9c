"""How commands tell what went wrong."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from fewstep.errors import FewstepError


def plain_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """Return a command that tells an error that a user can mend in one line and ends with status 2; Ctrl-C ends it with
    130, and a fault of ours keeps its stack."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except FewstepError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(2)
        except KeyboardInterrupt:
            click.echo("stopped; the same command goes on where this one was", err=True)
            sys.exit(130)
        except Exception as error:
            said = _disk_error(error, command.__name__, arguments=kwargs)
            if said is None:
                raise
            click.echo(f"error: {said}", err=True)
            sys.exit(2)

    return run


def _disk_error(error: Exception, command: str, *, arguments: dict[str, Any]) -> FewstepError | None:
    from fewstep.storage.faults import disk_error
    from fewstep.tracking.settings import fewstep_home

    out = arguments.get("out") or arguments.get("folder") or Path.cwd()
    return disk_error(error, what=command, folders=[out, fewstep_home(), Path(tempfile.gettempdir())])
