"""Cells of the tables that the experiments print."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def with_interval(row: Mapping[str, Any], name: str, *, digits: int = 4, sign: str = "") -> str:
    """Return a figure of a row with its 95 % interval, which stands under `name` and "_ci"."""
    low, high = row[f"{name}_ci"]
    return f"{row[name]:{sign}.{digits}f} ({low:{sign}.{digits}f} … {high:{sign}.{digits}f})"
