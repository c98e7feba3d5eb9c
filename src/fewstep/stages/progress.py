"""Progress of a long step: a bar with rate and time left in a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

from fewstep.train.progress import duration

_LINE_EVERY_S = 15.0
_BAR = "{desc}  {bar} {n_fmt}/{total_fmt}{unit} · {elapsed}<{remaining} · {rate_noinv_fmt}"


class Progress:
    """Counts to a total; use as a context manager.

    Args:
        name: the stage.
        total: how many there are, or None when nobody knows.
        unit: what is counted, in the plural.
        done: how many an earlier run has done; the rate does not count them.
    """

    def __init__(self, name: str, total: int | None, unit: str, *, done: int = 0) -> None:
        self.name, self.total, self.unit = name, total, unit
        self.done = self._before = done
        self._started = self._said = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=done, desc=name, unit=f" {unit}", leave=False, bar_format=_BAR)

    def advance(self, count: int = 1) -> None:
        """Count so many more."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self._said >= _LINE_EVERY_S:
            self._say()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def _say(self) -> None:
        self._said = time.monotonic()
        rate = (self.done - self._before) / max(self._said - self._started, 1e-9)
        counted = f"{self.done}{f'/{self.total}' if self.total else ''} {self.unit}"
        line = f"{self.name}  {counted} · {rate:.{0 if rate >= 10 else 1}f} {self.unit}/s"
        if self.total and rate:
            line += f" · {duration((self.total - self.done) / rate)} left"
        print(line, file=sys.stderr, flush=True)
