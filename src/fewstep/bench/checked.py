"""Settings of a benchmark from its options, with errors that name the option."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from fewstep.errors import FewstepError

_Settings = TypeVar("_Settings", bound=BaseModel)


def checked(kind: type[_Settings], options: Mapping[str, Any], *, names: Mapping[str, str] | None = None) -> _Settings:
    """Return the settings.

    Args:
        kind: of the settings.
        options: their values; None, or nothing, is the default.
        names: option of a setting, where it is not the setting's own name.

    Raises:
        FewstepError: a value that cannot work, with the name of the option.
    """
    try:
        return kind.model_validate(options)
    except ValidationError as error:
        fault = error.errors()[0]
        words = str(fault["msg"]).removeprefix("Value error, ")
        if not fault["loc"]:  # of options that do not go together
            raise FewstepError(words) from error
        setting = str(fault["loc"][0])
        name = (names or {}).get(setting, setting).replace("_", "-")
        given = ",".join(fault["input"]) if isinstance(fault["input"], tuple) else fault["input"]
        raise FewstepError(f"--{name} {given}: {words}") from error
