"""Watching the calls of a network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def counted(network: nn.Module) -> Iterator[list[int]]:
    """Give the batch sizes of the calls made in the block."""
    sizes: list[int] = []

    def count(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        sizes.append(len(args[0]))

    hook = network.register_forward_hook(count)
    try:
        yield sizes
    finally:
        hook.remove()
