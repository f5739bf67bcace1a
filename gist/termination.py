"""How a run ends from outside: by SIGTERM, and by a restart of its workers."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self


class Termination:
    """Notes SIGTERM instead of dying of it, so that a run can finish its round.

    Python hands signals to the main thread alone: elsewhere nothing is watched.

    Args:
        watch: Whether to; else the signal does what it did before.

    Attributes:
        asked: Whether the signal has come.
        status: That the process then exits with, as a shell reports it: 143.
    """

    status = 128 + signal.SIGTERM

    def __init__(self, *, watch: bool) -> None:
        self.asked = False
        self._watch = watch and threading.current_thread() is threading.main_thread()
        self._before: Any = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    def __enter__(self) -> Self:
        if self._watch:
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._watch:
            signal.signal(signal.SIGTERM, self._before)


def restarts() -> int:
    """How often torchrun has restarted the workers of this run."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
