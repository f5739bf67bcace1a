"""Jobs that run one after the other, beside the caller's work or at once."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self


class Lane:
    """Runs jobs in the order in which they were handed in; each has ended before the next begins.

    What a job computes so depends on the order alone, and not on timing. After one has failed, no
    other begins. When the ``with`` block is left, all have ended, and so has the thread; where an
    error leaves it, those that had not begun never do.

    Args:
        beside: Run them in a thread of their own; else at once, before ``submit`` returns.

    Attributes:
        beside: Likewise.
    """

    def __init__(self, *, beside: bool) -> None:
        self.beside = beside
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="gist-lane") if beside else None
        self._jobs: list[Future[None]] = []
        self._error: BaseException | None = None

    def submit(self, job: Callable[..., object], *args: Any) -> Future[None]:
        """Hands in a job; the error that it raises comes up where its result is asked for."""
        if self._pool is None:
            job(*args)
            done: Future[None] = Future()
            done.set_result(None)
            return done
        future = self._pool.submit(self._run, job, *args)
        self._jobs.append(future)
        return future

    def _run(self, job: Callable[..., object], *args: Any) -> None:
        if self._error is not None:
            raise self._error
        try:
            job(*args)
        except BaseException as error:
            self._error = error
            raise

    def wait(self) -> None:
        """Returns when every job has ended; raises the error of the one that failed."""
        for job in self._jobs:
            job.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._error = self._error or error
        if self._pool is not None:
            self._pool.shutdown()
        if error is None:
            self.wait()
