"""What a sample is, and why one is left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fewstep.errors import DataError

Bytes = bytes | bytearray | memoryview
#: "__key__": str, and the members by extension: bytearray, or memoryview of pictures and arrays (.npy).
Sample = dict[str, Any]
Decode = Callable[[Sample], dict[str, Any]]


class BadSampleError(DataError):
    """A sample that cannot be used. `reason` is a short constant text: samples are counted by it."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


class FilteredError(DataError):
    """A sample that a filter leaves out: nothing is wrong with it. `reason` is a short constant text, as of the bad."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
