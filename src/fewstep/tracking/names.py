"""Names that MLflow takes."""

from __future__ import annotations

import re


def figure_name(group: str, reason: str) -> str:
    """Return ``group/reason`` as the name of a figure: MLflow takes few signs, at most 250 of them, and reads names as
    paths."""
    said = re.sub(r"[^A-Za-z0-9_.: -]", "_", reason).rstrip(". ") or "_"
    return f"{group}/{said}"[:200]
