"""Making the next item while the current one is in use."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

Item = TypeVar("Item")

_IDLE_SECONDS = 0.5
_END: Any = object()


def prefetched(items: Iterator[Item]) -> Iterator[Item]:
    """The same items in the same order, each made in the background while the last is in use.

    What is raised while an item is made is raised where it would have been used. Closing the
    iterator, or letting go of it, ends the background thread; a thread that nobody asks for
    anything ends by itself, so that an iterator which an exception keeps alive leaves none behind.
    Where this process may use one core only there is no thread.

    Args:
        items: Made by one thread at a time, but not always by the same one.
    """
    if _cores() < 2:
        yield from items
        return
    worker = _Worker()
    pending = worker.ask(items)
    try:
        while (item := pending.result()) is not _END:
            pending = worker.ask(items)
            yield item
    finally:
        worker.stop()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Worker:
    """Makes items one at a time, in a thread that lives only while it is asked for some."""

    def __init__(self) -> None:
        self._tasks: SimpleQueue[tuple[Iterator[Any], Future[Any]] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.RLock()  # garbage collection may stop it from any thread

    def ask(self, items: Iterator[Any]) -> Future[Any]:
        """The next of ``items``, or ``_END``, once it is made."""
        future: Future[Any] = Future()
        with self._lock:
            self._tasks.put((items, future))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="gist-batches")
                self._thread.start()
        return future

    def stop(self) -> None:
        """Ends the thread, after what it is making."""
        with self._lock:
            thread = self._thread
            self._tasks.put(None)
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _run(self) -> None:
        while True:
            try:
                task = self._tasks.get(timeout=_IDLE_SECONDS)
            except Empty:
                with self._lock:
                    if self._tasks.empty():
                        self._thread = None
                        return
                continue
            if task is None:
                return
            items, future = task
            try:
                future.set_result(next(items, _END))
            except BaseException as error:
                future.set_exception(error)
            del items, future, task
