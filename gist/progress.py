"""A progress bar over rounds: on a terminal, or where asked for."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gist.history import RoundRecord


class RoundProgress:
    """Shows round, loss, validation metric and seconds per round.

    Args:
        total: Rounds of the run.
        done: Rounds already done, where it was resumed.
        show: Whether to show it; None does so where standard error is a terminal.
    """

    def __init__(self, total: int, done: int, show: bool | None) -> None:
        self._show = sys.stderr.isatty() if show is None else show
        self._bar = Progress(
            TextColumn("round"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=Console(stderr=True, force_terminal=True if show else None),
            disable=not self._show,
        )
        self._task = self._bar.add_task("", total=total, completed=done)
        self._done = done

    def __enter__(self) -> RoundProgress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def update(self, record: RoundRecord, rounds_run: int) -> None:
        """Advances by one round."""
        parts = [f"loss {record.train_loss:.4f}"]
        if record.val_metric is not None:
            parts.append(f"val {record.val_metric:.4f}")
        parts.append(f"{record.seconds / rounds_run:.3f} s/round")
        self._bar.update(self._task, advance=1, description="  ".join(parts))
