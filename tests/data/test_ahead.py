"""Items made ahead by a thread: the same ones, bounded in number, errors where they belong, and an end."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from fewstep.data.ahead import made_ahead


def test_the_items_come_in_order_and_only_so_many_are_made_ahead() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(20):
            made.append(number)
            yield number

    ahead = made_ahead(items(), count=2)
    assert next(ahead) == 0
    time.sleep(0.2)
    assert len(made) <= 4  # the one handed out, two that wait, and one that waits for room
    assert [0, *ahead] == list(range(20))


def test_an_error_comes_where_its_item_would_have() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    ahead = made_ahead(items(), count=5)
    assert next(ahead) == 1
    with pytest.raises(ValueError, match="broken"):
        next(ahead)


def test_closing_ends_the_thread() -> None:
    def forever() -> Iterator[int]:
        while True:
            yield 1

    ahead = made_ahead(forever(), count=2)
    assert next(ahead) == 1
    assert any(thread.name == "fewstep-ahead" for thread in threading.enumerate())
    ahead.close()
    assert not any(thread.name == "fewstep-ahead" for thread in threading.enumerate())
