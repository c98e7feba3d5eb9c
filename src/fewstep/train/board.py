"""A board in the cluster: workers write progress, log lines and what went wrong; the driver reads it.

A Ray worker has no terminal and Ray Train repeats any failed worker; the board tells the driver how far the training
is, and tells a restarted worker that the failure before was the user's and would only happen again.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fewstep.errors import FewstepError


@dataclass
class Notes:
    """What the driver reads: updates done, the last figures, and log records since it read before."""

    updates_done: int | None = None
    figures: dict[str, float] = field(default_factory=dict)
    log_lines: list[tuple[str, int, str]] = field(default_factory=list)  # logger, level, message


class Board:
    """The actor itself."""

    def __init__(self) -> None:
        self._notes = Notes()
        self._failure: FewstepError | None = None

    def progress(self, updates_done: int, figures: dict[str, float] | None) -> None:
        self._notes.updates_done = updates_done
        if figures is not None:
            self._notes.figures = figures

    def log(self, logger: str, level: int, message: str) -> None:
        self._notes.log_lines = [*self._notes.log_lines[-999:], (logger, level, message)]

    def read(self) -> Notes:
        notes, self._notes = self._notes, Notes(self._notes.updates_done, self._notes.figures)
        return notes

    def fail(self, error: FewstepError) -> None:
        if self._failure is None:
            self._failure = error

    def failure(self) -> FewstepError | None:
        return self._failure


def make_board() -> Any:
    """Return the handle of a new board on this node; it ends with the driver."""
    here = NodeAffinitySchedulingStrategy(node_id=ray.get_runtime_context().get_node_id(), soft=True)
    options: dict[str, Any] = {"num_cpus": 0, "scheduling_strategy": here}
    # Workers that start ask it first: should it go with its node, it comes again elsewhere, empty.
    return ray.remote(Board).options(**options, max_restarts=-1, max_task_retries=5).remote()


class BoardLogHandler(logging.Handler):
    """Sends a worker's log records to the board."""

    def __init__(self, board: Any) -> None:
        super().__init__(level=logging.INFO)
        self._board = board

    def emit(self, record: logging.LogRecord) -> None:
        self._board.log.remote(record.name, record.levelno, self.format(record))
