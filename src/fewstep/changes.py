"""Changes to a recipe as it is loaded, so that one unedited file runs anywhere: $FEWSTEP_SET and --set."""

from __future__ import annotations

import datetime
import logging
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from fewstep.errors import RecipeError

logger = logging.getLogger("fewstep")
VARIABLE = "FEWSTEP_SET"
OPTION = "--set"

_PATH = re.compile(r"[^\s.=]+(\.[^\s.=]+)*")
# Up to the last @, as a password may have one, and a slash, as those in base64 do.
_PASSWORD = re.compile(r"(://[^/:@\s]*):\S*@")


@dataclass(frozen=True)
class Change:
    """One change: the keys that lead to the place, the value as it was written, and who says so."""

    path: tuple[str, ...]
    text: str
    source: str

    def __str__(self) -> str:
        return f"{'.'.join(self.path)}={without_passwords(self.text)}"


def without_passwords(text: str) -> str:
    """Return text as it may be shown: without the passwords of addresses."""
    return _PASSWORD.sub(r"\1:***@", text)


def in_words(changes: Sequence[Change]) -> str:
    """Return who has changed what, for messages."""
    sources = dict.fromkeys(change.source for change in changes)
    by = (f"{each} ({', '.join(str(change) for change in changes if change.source == each)})" for each in sources)
    return f"changed by {' and '.join(by)},"


def changes_at_hand(options: Sequence[str] = ()) -> list[Change]:
    """Return the changes of $FEWSTEP_SET, one a line, and after them, as later ones win, those of the options.

    A change is written ``key.path=value``. One with nothing behind the equals sign changes nothing, as orchestrators
    cannot leave lines out.

    Raises:
        RecipeError: one is written otherwise.
    """
    return [*_parsed(os.environ.get(VARIABLE, "").splitlines(), VARIABLE), *_parsed(options, OPTION)]


def _parsed(lines: Iterable[str], source: str) -> list[Change]:
    found = []
    for line in map(str.strip, lines):
        if not line:
            continue
        path, equals, text = (part.strip() for part in line.partition("="))
        if not equals or not _PATH.fullmatch(path):
            raise RecipeError(
                f"{source}: {without_passwords(line)!r} is not written key.path=value, such as cluster.num_workers=8"
            )
        if text:
            found.append(Change(tuple(path.split(".")), text, source))
    return found


def apply_changes(
    content: dict[str, Any], changes: Sequence[Change], *, is_text: Callable[[tuple[str, ...]], bool]
) -> dict[str, Any]:
    """Return the content of a recipe with the changes made, each told once.

    A path may lead through keys that are not there yet, and through a plain value, which becomes a mapping.

    Args:
        content: of the recipe's file; it is left as it is.
        changes: in order; later ones win.
        is_text: whether the key at a path takes text alone, so that 2026 is no number there.

    Raises:
        RecipeError: a value is no YAML.
    """
    changed = content
    for change in changes:
        before = _get(content, change.path)
        said = "nothing" if before is None else without_passwords(_shown(before))
        logger.info("%s: %s (the recipe says %s)", change.source, change, said)
        changed = _set(changed, change.path, _value(change, text=is_text(change.path)))
    return changed


def _value(change: Change, *, text: bool) -> Any:
    try:
        value = yaml.safe_load(change.text)
    except (yaml.YAMLError, ValueError) as error:  # 2026-02-30 is a ValueError
        if text and isinstance(error, ValueError):
            return change.text
        fault = str(error).splitlines()[0]
        raise RecipeError(
            f"{change.source}: {change}: the value is no YAML ({fault}); put quotes around text with such signs"
        ) from None
    if value is None and change.text.lower() not in ("null", "~"):
        raise RecipeError(
            f"{change.source}: {change}: YAML takes the value for a comment, which is nothing; put quotes around it, "
            "or write null"
        )
    # No key takes a date, and what an orchestrator hands over as text may look like a number.
    if isinstance(value, datetime.date) or (text and isinstance(value, (bool, int, float))):
        return change.text
    return value


def _get(place: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        if not isinstance(place, dict):
            return None
        place = place.get(_own(place, key))
    return place


def _set(place: Any, path: tuple[str, ...], value: Any) -> Any:
    if not path:
        return value
    mapping = place if isinstance(place, dict) else {}
    key = _own(mapping, path[0])
    return {**mapping, key: _set(mapping.get(key), path[1:], value)}


def _own(mapping: dict[Any, Any], key: str) -> Any:
    """Return the key as the mapping has it: YAML reads step counts as numbers."""
    return next((own for own in mapping if str(own) == key), key)


def _shown(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")
