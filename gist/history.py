"""What a run leaves behind: one record per round, and the result."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gist.checkpoint import write_atomically


@dataclass(frozen=True, kw_only=True)
class RoundRecord:
    """One round.

    Attributes:
        round: Counted from 0.
        num_subnets: m.
        local_steps: Optimiser steps of each subnet.
        epochs: Budget spent so far, in epochs summed over the subnets.
        learning_rate_factor: Of the last step.
        train_loss: Mean over the subnets' steps.
        val_loss: Of the merged model; None where it was not evaluated.
        train_metric: Likewise.
        val_metric: Likewise.
        test_metric: Likewise.
        seconds: Training so far, evaluation left out.
        eval_seconds: Evaluation so far.
        repartition_seconds: Extracting and merging so far, part of ``seconds``.
        bytes_sent: By this worker to others so far, in exchanges of rounds.
        bytes_received: By this worker from others so far, likewise.
        clock: Of a federated run: seconds of its clock so far. There, bytes sent are those to
            clients, and bytes received those from them.
    """

    round: int
    num_subnets: int
    local_steps: int
    epochs: float
    learning_rate_factor: float
    train_loss: float
    val_loss: float | None = None
    train_metric: float | None = None
    val_metric: float | None = None
    test_metric: float | None = None
    seconds: float = 0.0
    eval_seconds: float = 0.0
    repartition_seconds: float = 0.0
    bytes_sent: int = 0
    bytes_received: int = 0
    clock: float | None = None

    def is_better_than(self, other: RoundRecord | None) -> bool:
        """A higher validation metric, or the same with a lower validation loss."""
        if self.val_metric is None or self.val_loss is None:
            return False
        if other is None or other.val_metric is None or other.val_loss is None:
            return True
        return (self.val_metric, -self.val_loss) > (other.val_metric, -other.val_loss)


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """The outcome of a run.

    ``val_metric`` and ``test_metric`` are those of the best round, also where ``keep_best=False``
    hands back the model of the last one, whose test metric is ``last_test_metric``.

    Attributes:
        history: One record per round.
        best: The evaluated round with the best validation metric.
        val_metric: At the best round.
        test_metric: At the best round.
        last_test_metric: After the last round.
        seconds: Training, evaluation left out.
        eval_seconds: Evaluation.
        repartition_seconds: Extracting and merging, part of ``seconds``.
        bytes_sent: By this worker to others, in exchanges of rounds.
        bytes_received: By this worker from others, likewise.
        peak_memory_bytes: Of this worker's process (CPU) or device (CUDA) during ``fit``.
        num_parameters: Of the global model.
        parameters_per_subnet: Trainable entries of each subnet of the last round.
    """

    history: tuple[RoundRecord, ...] = field(repr=False)
    best: RoundRecord
    val_metric: float
    test_metric: float
    last_test_metric: float
    seconds: float
    eval_seconds: float
    repartition_seconds: float
    bytes_sent: int
    bytes_received: int
    peak_memory_bytes: int
    num_parameters: int
    parameters_per_subnet: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """Everything but the history, as JSON values."""
        values = asdict(self)
        del values["history"]
        return values


def write_history(path: Path, records: Iterable[RoundRecord]) -> None:
    """One JSON object per line and round."""
    write_atomically(path, "".join(json.dumps(asdict(record)) + "\n" for record in records))
