"""Runs the reading of parts ahead of the training loop: on a thread, or in processes."""

from __future__ import annotations

import multiprocessing
import pickle
import queue
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from fewstep.data.part import Part, PartBatch, PartReader
from fewstep.errors import DataError


class Batches(Protocol):
    """Batches of parts, each a list with one PartBatch a part; `close` ends what makes them."""

    def __iter__(self) -> Iterator[list[PartBatch]]: ...

    def close(self) -> None: ...


class OnAThread:
    """The Batches of one part, read on a thread of this process, at most `ahead` before they are wanted."""

    def __init__(self, reader: PartReader, part: Part, *, ahead: int) -> None:
        self._queue: queue.Queue[PartBatch | BaseException] = queue.Queue(maxsize=ahead)
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(reader.read(part),), name="fewstep-batches", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> Iterator[list[PartBatch]]:
        while not self._stop.is_set():
            try:
                item = self._queue.get(timeout=1.0)
            except queue.Empty:  # look whether another thread called close
                continue
            if isinstance(item, BaseException):
                raise item
            yield [item]

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        while self._thread.is_alive():  # it may be waiting for room in the queue
            try:
                self._queue.get_nowait()
            except queue.Empty:
                self._thread.join(0.01)

    def _run(self, items: Iterator[PartBatch]) -> None:
        try:
            for item in items:
                self._queue.put(item)
                if self._stop.is_set():
                    return
        except BaseException as error:
            self._queue.put(error)
        finally:
            items.close()  # type: ignore[attr-defined]


class InProcesses:
    """The Batches of several parts, each read in a process of its own, at most `ahead` before they are wanted."""

    def __init__(self, reader: PartReader, parts: Sequence[Part], *, ahead: int) -> None:
        self._streams = [set(part.streams) for part in parts]
        # Not by fork: a Ray worker has threads, whose locks a forked process would find shut for ever.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["fewstep.data.part"])
        with warnings.catch_warnings():
            # torch advises one process for each core; how many there are is the recipe's choice.
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            loader = DataLoader(
                _PartDataset(reader, parts),
                batch_size=None,
                num_workers=len(parts),
                prefetch_factor=ahead,
                multiprocessing_context=context,
            )
            self._items: Any = iter(loader)

    def __iter__(self) -> Iterator[list[PartBatch]]:
        while self._items is not None:
            # The loader takes one item from each process in turn.
            yield [self._next(streams) for streams in self._streams]

    def close(self) -> None:
        """End the processes."""
        self._items = None

    def _next(self, streams: set[int]) -> PartBatch:
        try:
            item = next(self._items)
        except StopIteration:
            raise DataError("A loading process ended before its time. Its own words stand above") from None
        except RuntimeError as error:
            raise DataError(
                f"A loading process ended: {str(error).splitlines()[0]}. Its own words stand above. If it "
                "was out of memory, lower stream.shuffle_bytes, stream.prefetch_batches or stream.loader_processes; "
                "batches lie in shared memory (/dev/shm), so that must have room for them too"
            ) from error
        if isinstance(item, BaseException):
            raise item
        assert isinstance(item, PartBatch)
        if set(item.after.streams) != streams:
            raise DataError(
                f"a loading process gave rows of the streams {sorted(item.after.streams)} where those of "
                f"{sorted(streams)} were due: a batch before it did not arrive. Its process's words stand above"
            )
        return item


class _PartDataset(IterableDataset[Any]):
    """In a loader's process: the batches of its part; an error is the last item, whole, for the consumer to raise."""

    def __init__(self, reader: PartReader, parts: Sequence[Part]) -> None:
        self._reader, self._parts = reader, parts

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        assert info is not None
        try:
            yield from self._reader.read(self._parts[info.id])
        except GeneratorExit:
            raise
        except BaseException as error:
            yield _that_travels(error)


def _that_travels(error: BaseException) -> BaseException:
    """Return the error, or where it cannot be pickled one that tells it: what cannot is dropped without a word."""
    try:
        same = type(pickle.loads(pickle.dumps(error))) is type(error)
    except Exception:
        same = False
    return error if same else DataError(f"a loading process failed:\n{''.join(traceback.format_exception(error))}")
