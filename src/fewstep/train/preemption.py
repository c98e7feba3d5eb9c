"""Looks whether a node under the training is about to be taken away, so that a checkpoint is written before."""

from __future__ import annotations

import logging
import time
from datetime import UTC, datetime

import ray.train
import ray.train.collective
from ray._private.ray_constants import env_bool
from ray.train.v2._internal.constants import (
    DEFAULT_ENABLE_PREEMPTION_WATCHER,
    DEFAULT_PREEMPTION_DEADLINE_S,
    ENABLE_PREEMPTION_WATCHER_ENV_VAR,
)

logger = logging.getLogger(__name__)

#: Workers ask one another about so often: an answer takes milliseconds, and Ray itself looks every five seconds.
_LOOK_EVERY_S = 2.0

#: After the deadline, until which a worker waits that Ray ends it.
_PATIENCE_S = 30.0


def is_watched() -> bool:
    """Return whether Ray Train watches for nodes that are about to be taken away, in trainings of this process."""
    watched: bool = env_bool(ENABLE_PREEMPTION_WATCHER_ENV_VAR, DEFAULT_ENABLE_PREEMPTION_WATCHER)
    return watched


class PreemptionWatch:
    """Tells every worker of a training after the same update that a node is about to be taken away.

    Ray's question is a meeting of all workers, too dear for every update of a quick training: each meeting also agrees
    on the update of the next one. The device is not waited for.

    Args:
        name: of the training, for messages.
        first: updates done when it begins.
        speaks: whether this worker logs what is found.
    """

    def __init__(self, name: str, *, first: int, speaks: bool) -> None:
        self._name, self._speaks = name, speaks
        self._asked_s, self._asked_at, self._every = time.monotonic(), first, 1
        self._known: set[str] = set()
        self._until_s = 0.0  # time of day

    def must_save(self, updates_done: int) -> bool:
        """Return whether a node was named since the last time. All workers must ask after every update."""
        if updates_done < self._asked_at + self._every:
            return False
        now_s = time.monotonic()
        in_time = int((updates_done - self._asked_at) / max(1e-6, now_s - self._asked_s) * _LOOK_EVERY_S)
        # The first worker's clock counts, as all must ask again after the same update. No sudden leaps: an update after
        # a few quick ones may take long.
        self._every = ray.train.collective.broadcast_from_rank_zero(max(1, min(in_time, 2 * self._every)))
        self._asked_s, self._asked_at = now_s, updates_done
        info = ray.train.get_preemption_info()
        named = set() if info is None else set(info.preempted_node_ids) - self._known
        if info is None or not named:
            return False
        self._known |= named
        deadline_s = (
            time.time() + DEFAULT_PREEMPTION_DEADLINE_S if info.deadline_ms is None else info.deadline_ms / 1000
        )
        self._until_s = deadline_s + _PATIENCE_S
        if self._speaks:
            logger.warning(
                "%s: %s of the training will be taken away%s, with workers %s; a checkpoint of update %d is written "
                "now, and the training goes on until then",
                self._name,
                "a node" if len(named) == 1 else f"{len(named)} nodes",
                "" if info.deadline_ms is None else f" at {_clock(info.deadline_ms)}",
                ", ".join(str(rank) for rank in info.preempted_ranks),
                updates_done,
            )
        return True

    def outlast(self) -> None:
        """Wait for Ray to end this process, if a node of the training is being taken away; return when it does not.

        When a node goes, the other workers' exchanges break. Ray takes that for a fault of theirs if it hears of it
        before it knows of the node's end, and counts it against the tries that are there for real faults.
        """
        while self._known and time.time() < self._until_s:
            time.sleep(0.2)


def _clock(time_ms: int) -> str:
    return datetime.fromtimestamp(time_ms / 1000, tz=UTC).strftime("%H:%M:%S UTC")
