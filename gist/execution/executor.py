"""What a trainer asks of an executor, and what it gets back from a round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from gist.partition.assignment import Assignment
from gist.plan import RoundPlan


@dataclass(frozen=True, kw_only=True)
class RoundReport:
    """What a round cost and gave.

    Attributes:
        train_loss: Mean over subnets of their mean loss.
        repartition_seconds: Extracting and merging; where these go on beside the training, only
            what it waited for them.
        bytes_sent: By this process to others.
        bytes_received: By this process from others.
        clock: At the end of the round, seconds of a clock that is counted; None without one.
    """

    train_loss: float
    repartition_seconds: float
    bytes_sent: int = 0
    bytes_received: int = 0
    clock: float | None = None


class Executor(Protocol):
    """Runs the subnets of a round and puts them back into the global model."""

    @property
    def name(self) -> str:
        """As the setting ``executor`` names it; what was picked, where it was left to measure."""

    def run_round(self, plan: RoundPlan, assignment: Assignment) -> RoundReport:
        """Extracts, trains and merges every subnet of one round."""

    def state_dict(self) -> dict[str, Tensor]:
        """What the executor keeps in this process besides the model, for a checkpoint."""

    def read_state(self, paths: Sequence[Path]) -> None:
        """Takes what :meth:`state_dict` gave, of one rank or several, from files."""
