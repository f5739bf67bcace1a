"""What a training step sees of a graph, and where it comes from.

Shape legend: ``n`` nodes of a batch, ``t`` of them with a loss, ``F`` features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gist.graph.adjacency import Adjacency
from gist.graph.data import GraphData


@dataclass(frozen=True, kw_only=True, eq=False)
class GraphBatch:
    """One training step's share of a graph.

    Attributes:
        x: ``[n, F]`` features of the batch's nodes.
        graph: Edges between them; or one graph per layer, where layers are sampled apart.
        y: Labels of the targets: ``[t]`` or ``[t, C]``.
        targets: ``[t]`` int64, the rows of the model's output that the loss is taken over; None for
            all of them.
    """

    x: Tensor
    graph: Adjacency | tuple[Adjacency, ...]
    y: Tensor
    targets: Tensor | None = None


class BatchSource(ABC):
    """Where a run's batches come from: a recipe bound to one graph."""

    @property
    @abstractmethod
    def steps_per_epoch(self) -> int:
        """Batches that make one pass over the training nodes."""

    @abstractmethod
    def batches(self, *, seed: int, round: int, subnet: int, steps: int) -> Iterator[GraphBatch]:
        """``steps`` batches; a function of the arguments alone, on every machine."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Name and settings as JSON values: a run is resumed on the same ones."""


class BatchRecipe(ABC):
    """Settings of a batch source, before it is bound to a graph; a frozen dataclass."""

    @abstractmethod
    def bind(self, data: GraphData) -> BatchSource:
        """The source of batches of ``data``, on its device."""


@dataclass(frozen=True, kw_only=True)
class FullGraph(BatchRecipe):
    """Every step sees the whole graph."""

    def bind(self, data: GraphData) -> BatchSource:
        """See :meth:`BatchRecipe.bind`."""
        return _FullGraph(data)


class _FullGraph(BatchSource):
    steps_per_epoch = 1

    def __init__(self, data: GraphData) -> None:
        targets = data.train_mask.nonzero()[:, 0]
        self.batch = GraphBatch(x=data.x, graph=data.adjacency, y=data.y[targets], targets=targets)

    def batches(self, *, seed: int, round: int, subnet: int, steps: int) -> Iterator[GraphBatch]:
        for _ in range(steps):
            yield self.batch

    def describe(self) -> dict[str, Any]:
        return {"name": "full graph"}
