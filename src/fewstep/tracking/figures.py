"""Figures on their way to MLflow: sent in the background, kept while MLflow is out of reach.

Training must neither wait for MLflow nor end because of it.
"""

from __future__ import annotations

import atexit
import logging
import re
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

from fewstep.errors import TrackingError
from fewstep.tracking.connection import connect, failures, is_permanent, without_password
from fewstep.tracking.settings import TrackingSettings

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)
_BATCH = 1000  # the most that MLflow takes in one request
_MAX_PAUSE_S = 30.0
_NAME = re.compile(r"[A-Za-z0-9_.:/ -]{1,250}")


class _Figure(NamedTuple):
    name: str
    value: float
    timestamp_ms: int
    step: int


class TrackerHandle:
    """Sends the figures of one MLflow run from any process; picklable, so that Ray workers can have it.

    `metrics` never blocks and never fails for MLflow's sake. Call `close` when the work is over: it waits for what is
    still on its way and says how many figures were lost.
    """

    def __init__(self, settings: TrackingSettings, run_id: str) -> None:
        self.settings = settings.resolved()
        self.run_id = run_id
        self._reset()

    def _reset(self) -> None:
        self._waiting: deque[_Figure] = deque()
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._deadline_s: float | None = None  # time.monotonic() after which the sender gives up; None while open
        self._lost = 0
        self.last_error: Exception | None = None  # why the newest try failed

    def __getstate__(self) -> dict[str, Any]:
        return {"settings": self.settings, "run_id": self.run_id}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.settings, self.run_id = state["settings"], state["run_id"]
        self._reset()

    @property
    def lost(self) -> int:
        """Figures that never reached MLflow so far."""
        return self._lost

    @property
    def waiting(self) -> int:
        """Figures that are still on their way."""
        return len(self._waiting)

    def metrics(self, figures: dict[str, float], step: int) -> None:
        """Hands over `figures` of `step`; returns at once.

        TrackingError for a name that MLflow does not take (a fault of the caller that no waiting mends).
        """
        now_ms = int(time.time() * 1000)
        rows = []
        for name, value in figures.items():
            if not _NAME.fullmatch(name):
                raise TrackingError(
                    f"figure {name!r}: a name has at most 250 letters, digits, spaces and _ - . : / only. Rename it."
                )
            rows.append(_Figure(name, float(value), now_ms, int(step)))
        with self._lock:
            self._waiting.extend(rows)
            while len(self._waiting) > self.settings.max_buffered:
                self._waiting.popleft()
                self._lost += 1
            if self._thread is None or not self._thread.is_alive():
                self._deadline_s = None
                self._wake.clear()
                self._thread = threading.Thread(target=self._send_all, name="fewstep-figures", daemon=True)
                self._thread.start()
                atexit.register(self.close, timeout_s=5.0)

    def close(self, *, timeout_s: float = 60.0) -> int:
        """Waits up to `timeout_s` for what is on its way; the number of figures lost, which is also logged."""
        thread = self._thread
        if thread is not None:
            self._deadline_s = time.monotonic() + timeout_s
            self._wake.set()
            thread.join(timeout_s + 1.0)
            atexit.unregister(self.close)
            with self._lock:
                self._lost += len(self._waiting)
                self._waiting.clear()
                self._thread = None
            if self._lost:
                logger.warning(
                    "%d figures of run %s did not reach MLflow at %s: %s",
                    self._lost, self.run_id, without_password(self.settings.tracking_uri()), self.last_error,
                )  # fmt: skip
        return self._lost

    def _send_all(self) -> None:
        client: MlflowClient | None = None
        pause_s = self.settings.flush_every_s
        has_warned = False
        while True:
            self._wake.wait(pause_s)
            closing_at_s = self._deadline_s
            pause_s = self.settings.flush_every_s if closing_at_s is None else 0.0
            try:
                with failures(f"send figures of run {self.run_id}", self.settings):
                    client = client or connect(self.settings)
                    self._send_waiting(client)
                if has_warned:
                    logger.warning("MLflow takes figures again; those that waited were sent.")
                has_warned = False
            except Exception as error:  # whatever it is, it must not reach the training loop
                self.last_error = error
                if not has_warned:
                    logger.warning("%s Training goes on; the figures are kept and sent again.", error)
                has_warned = True
                pause_s = min(max(2 * pause_s, 0.5), _MAX_PAUSE_S)
            if closing_at_s is not None:
                if not self._waiting or time.monotonic() + pause_s >= closing_at_s:
                    return
                self._wake.clear()

    def _send_waiting(self, client: MlflowClient) -> None:
        from mlflow.entities import Metric

        while self._waiting:
            with self._lock:
                rows = [self._waiting[i] for i in range(min(_BATCH, len(self._waiting)))]
            metrics = [Metric(row.name, row.value, row.timestamp_ms, row.step) for row in rows]
            try:
                client.log_batch(self.run_id, metrics=metrics, synchronous=True)
            except Exception as error:
                if not is_permanent(error):
                    raise
                logger.warning("MLflow refuses %d figures of run %s: %s", len(rows), self.run_id, error)
                self.last_error = error
                self._lost += len(rows)
            sent = set(map(id, rows))
            with self._lock:  # the oldest may have been dropped meanwhile
                while self._waiting and id(self._waiting[0]) in sent:
                    self._waiting.popleft()
