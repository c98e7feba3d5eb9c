"""Progress for people: a bar in a terminal, plain lines in a log."""

from __future__ import annotations

import logging
import math
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

from tqdm import tqdm

logger = logging.getLogger(__name__)

LINE_EVERY_S = 20.0
_BAR = "{desc}  {bar} {n_fmt}/{total_fmt} updates · {elapsed}<{remaining}"


class ProgressPrinter:
    """Shows how far a training is: `guidance  320/700 updates · 146 images/s · loss 0.213 · 2 min left`.

    Args:
        name, updates, samples_per_update: of the training.
        out: where to; a bar if it is a terminal, otherwise a line every `line_every_s`.
    """

    def __init__(
        self,
        *,
        name: str,
        updates: int,
        samples_per_update: int,
        out: TextIO | None = None,
        line_every_s: float = LINE_EVERY_S,
    ) -> None:
        self.name = name
        self.updates = updates
        self.samples_per_update = samples_per_update
        self._out = out if out is not None else sys.stderr
        self._line_every_s = line_every_s
        self._start: tuple[float, int] | None = None
        self._latest = -1
        self._line_at_s = -math.inf
        self._bar: tqdm | None = None

    def show(self, updates_done: int, figures: dict[str, float]) -> None:
        """Show a new position; the first one is where the training starts or goes on."""
        now_s = time.monotonic()
        if self._start is None or updates_done < self._latest:  # a restarted worker begins at its checkpoint
            self._start = (now_s, updates_done)
        elif updates_done == self._latest:
            return
        self._latest = updates_done
        start_s, first = self._start
        rate = (updates_done - first) / (now_s - start_s) if updates_done > first else None
        if self._out.isatty():
            self._show_bar(updates_done, rate, figures)
        elif now_s - self._line_at_s >= self._line_every_s or updates_done == self.updates:
            self._line_at_s = now_s
            print(self.line(updates_done, rate, figures), file=self._out, flush=True)

    def line(self, updates_done: int, updates_per_s: float | None, figures: dict[str, float]) -> str:
        """Return the plain line."""
        parts = [f"{self.name}  {updates_done}/{self.updates} updates", *self._facts(updates_per_s, figures)]
        if updates_per_s is not None and updates_done < self.updates:
            parts.append(f"{duration((self.updates - updates_done) / updates_per_s)} left")
        return " · ".join(parts)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _facts(self, updates_per_s: float | None, figures: dict[str, float]) -> list[str]:
        facts = []
        if updates_per_s is not None:
            images_per_s = updates_per_s * self.samples_per_update
            facts.append(f"{images_per_s:.0f} images/s" if images_per_s >= 10 else f"{images_per_s:.1f} images/s")
        return facts + ([f"loss {figures['loss']:.4g}"] if "loss" in figures else [])

    def _show_bar(self, updates_done: int, updates_per_s: float | None, figures: dict[str, float]) -> None:
        if self._bar is None:
            self._bar = tqdm(
                total=self.updates, initial=updates_done, desc=self.name, unit="update", file=self._out, bar_format=_BAR
            )  # fmt: skip
        # Not as tqdm's postfix, which begins with a comma.
        self._bar.bar_format = " · ".join([_BAR, *self._facts(updates_per_s, figures)])
        self._bar.update(updates_done - self._bar.n)


def duration(seconds: float) -> str:
    """Return a rough duration in words: `40 s`, `2 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Watcher:
    """Calls a function every `every_s` on a thread while the block runs, and once at its end."""

    def __init__(self, look: Callable[[], None], *, every_s: float = 0.5) -> None:
        self._look = look
        self._every_s = every_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fewstep-progress", daemon=True)

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            ended = self._ended.wait(self._every_s)
            try:
                self._look()
            except Exception as error:  # watching must not end a training
                logger.debug("progress cannot be shown: %s", error)
            if ended:
                return
