"""The object store as the environment names it, where a recipe leaves that open."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from fewstep.errors import StorageError

BUCKET = "FEWSTEP_S3_BUCKET"

#: Key of the storage settings -> the variables that stand in for it; the first that is set counts. AWS_… are read by
#: AWS's own tools too.
VARIABLES: dict[str, tuple[str, ...]] = {
    "bucket": (BUCKET,),
    "prefix": ("FEWSTEP_S3_PREFIX",),
    "endpoint_url": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
    "region": ("AWS_REGION", "AWS_DEFAULT_REGION"),
    "addressing_style": ("FEWSTEP_S3_ADDRESSING_STYLE",),
}
_STYLES = ("path", "virtual")


def names_a_bucket() -> bool:
    """Return whether the environment names a bucket, so that a store that nobody describes is that one."""
    return bool(os.environ.get(BUCKET))


def with_environment(said: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `StorageSettings` that are said, with those of the environment where nothing is.

    An embedded server takes nothing from the environment. Without `kind`, the store is in S3 when the environment names
    a bucket, unless `home` is said, which only an embedded server has. An empty value counts as not set.

    Raises:
        StorageError: a variable has a value that cannot be used.
    """
    fields = dict(said)
    if "kind" not in fields and "home" not in fields and names_a_bucket():
        fields["kind"] = "s3"
    if fields.get("endpoint_url") in (None, ""):
        fields.pop("endpoint_url", None)
    if fields.get("kind") != "s3":
        return fields
    for key, variables in VARIABLES.items():
        variable = next((name for name in variables if os.environ.get(name)), None)
        if variable is not None and key not in fields:
            fields[key] = _checked(variable, key, os.environ[variable])
    return fields


def _checked(variable: str, key: str, value: str) -> str:
    """Refuse here what the settings would refuse too, as their message could not name the variable."""
    if key == "bucket" and len(value) < 3:
        raise StorageError(f"{variable} is {value!r}: the name of a bucket has at least 3 characters")
    if key == "endpoint_url" and not value.startswith(("http://", "https://")):
        raise StorageError(f"{variable} is {value!r}: it must begin with http:// or https://")
    if key == "addressing_style" and value not in _STYLES:
        raise StorageError(f"{variable} is {value!r}: it must be path or virtual")
    return value
