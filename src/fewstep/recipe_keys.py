"""All keys of a recipe as a page: `fewstep keys`, and docs/recipes.md."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from fewstep.recipe import Recipe
from fewstep.stage_settings import settings_class

_HEAD = """# Recipes: every key

One YAML file describes a whole workflow; the shipped ones are in `workflows/recipes/`. Unknown keys are errors, and all
checks run before any work. This page is the output of `fewstep keys`.

A recipe can stay unedited: `--set KEY=VALUE` and the lines of `$FEWSTEP_SET` change keys as it is loaded, and
`$FEWSTEP_S3_BUCKET` and `$MLFLOW_TRACKING_URI` say where things are kept ([environment.md](environment.md)).

| key | default | what it is |
|---|---|---|
"""


def recipe_keys() -> str:
    """Return the Markdown page of all keys, their defaults and descriptions."""
    return _HEAD + "\n".join(f"| `{key}` | {default} | {text} |" for key, default, text in _rows(Recipe, "")) + "\n"


def _rows(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, str]]:
    for name, field in model.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        inner = settings_class(field.annotation)
        text = (field.description or "").rstrip(".").replace("|", "\\|")
        yield key, "" if inner and not isinstance(field.default, int) else _default(field), text
        if inner is not None:
            yield from _rows(inner, f"{key}.")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value: Any = field.default
    if value is PydanticUndefined:
        return "see text" if field.default_factory not in (dict, list, tuple) else "`{}`"
    if value == "":
        return "empty"
    return "null" if value is None else f"`{list(value) if isinstance(value, tuple) else value}`"
