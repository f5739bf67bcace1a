"""What a trainer asks of an executor, and what it gets back from a round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from gist.config import TrainConfig
from gist.execution.objective import Objective
from gist.partition.assignment import Assignment
from gist.partition.spec import PartitionSpec
from gist.plan import RoundPlan


@dataclass(frozen=True, kw_only=True)
class RoundReport:
    """What a round cost and gave.

    Attributes:
        train_loss: Mean over subnets of their mean loss.
        repartition_seconds: Extracting and merging.
        bytes_sent: Between processes.
        bytes_received: Between processes.
    """

    train_loss: float
    repartition_seconds: float
    bytes_sent: int = 0
    bytes_received: int = 0


class Executor(Protocol):
    """Runs the subnets of a round and puts them back into the global model."""

    @property
    def name(self) -> str:
        """As the setting ``executor`` names it."""

    def run_round(self, plan: RoundPlan, assignment: Assignment) -> RoundReport:
        """Extracts, trains and merges every subnet of one round."""

    def state_dict(self) -> dict[str, Tensor]:
        """What the executor keeps between rounds besides the model, for a checkpoint."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes what :meth:`state_dict` gave."""


def make_executor(
    model: nn.Module, spec: PartitionSpec, objective: Objective, config: TrainConfig
) -> Executor:
    """The executor that ``config.executor`` asks for; ``"auto"`` is the serial one."""
    from gist.execution.serial import SerialExecutor

    return SerialExecutor(model, spec, objective, config)
