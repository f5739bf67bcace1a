"""What an executor trains on: batches and a loss, without knowing graphs or images."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from torch import Tensor, nn


class Objective(Protocol):
    """The data side of a run, as executors and trainers see it."""

    @property
    def steps_per_epoch(self) -> int:
        """Batches that make one pass over the training data."""

    def batches(self, *, seed: int, round: int, subnet: int, steps: int) -> Iterable[Any]:
        """The ``steps`` batches of one subnet in one round; depends on the arguments alone."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The training loss of one batch, differentiable: a scalar, or ``[m]`` of stacked subnets.

        Stacked subnets put out ``[n, m, C]`` where one puts out ``[n, C]``.
        """

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """``train_metric``, ``val_metric``, ``test_metric`` and ``val_loss`` of a model.

        ``train_metric`` is left out where the training labels do not define it.
        """

    def sample_inputs(self, model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A small set of arguments of the model, positional and by name, to verify it with."""

    def check(self, model: nn.Module) -> None:
        """Refuses a model that does not fit the data, before training starts."""

    def fingerprint(self) -> str:
        """Identifies the data, so that a checkpoint is not resumed on other data."""
