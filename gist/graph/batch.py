"""What a training step sees of a graph, and where it comes from.

Shape legend: ``n`` nodes of a batch, ``t`` of them with a loss, ``F`` features.
"""

from __future__ import annotations

import copy
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Generator, Tensor, nn

from gist.graph.adjacency import Adjacency
from gist.graph.data import GraphData
from gist.graph.parts import cache_folder
from gist.partition.streams import stream

Item = TypeVar("Item")


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

    def outputs(self, out: Tensor) -> Tensor:
        """What the loss is taken over, of a model's output ``[n, C]``; stacked ``[n, m, C]``."""
        return out if self.targets is None else out[self.targets]


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

    def largest_batch(self) -> GraphBatch:
        """The largest batch it may give, or where that is not known, one of those it gives."""
        return next(iter(self.batches(seed=0, round=0, subnet=0, steps=1)))

    @property
    def kept_bytes(self) -> int:
        """About what batches take that exist beside the one in use, at most."""
        return 0

    def check(self, model: nn.Module) -> None:
        """Refuses a model that these batches cannot train; takes any by default.

        Raises:
            ConfigError: what the model lacks.
        """
        del model


class BatchRecipe(ABC):
    """Settings of a batch source, before it is bound to a graph; a frozen dataclass."""

    @abstractmethod
    def bind(self, data: GraphData) -> BatchSource:
        """The source of batches of ``data``, on its device.

        Args:
            data: The graph to train on. In inductive training its val and test masks are empty.
        """


@dataclass(frozen=True, kw_only=True)
class FullGraph(BatchRecipe):
    """Every step sees the whole graph."""

    def bind(self, data: GraphData) -> BatchSource:
        """See :meth:`BatchRecipe.bind`."""
        return FullGraphSource(data)


class FullGraphSource(BatchSource):
    """The whole graph as the batch of every step."""

    steps_per_epoch = 1

    def __init__(self, data: GraphData) -> None:
        targets = data.train_mask.nonzero()[:, 0]
        self.batch = GraphBatch(x=data.x, graph=data.adjacency, y=data.y[targets], targets=targets)

    def batches(self, *, seed: int, round: int, subnet: int, steps: int) -> Iterator[GraphBatch]:
        """The same one, ``steps`` times."""
        for _ in range(steps):
            yield self.batch

    def describe(self) -> dict[str, Any]:
        """See :meth:`BatchSource.describe`."""
        return {"name": "FullGraph"}


def training_graph(data: GraphData) -> GraphData:
    """The subgraph that the training nodes induce: what inductive training may see.

    Nodes keep their order; edges to any other node are gone, and so are the other splits. Of a
    graph from a folder it may have been kept: see :func:`gist.graph.layout.keep_training_graph`.
    """
    place = training_place(data)
    if place is not None and place.is_dir():
        return GraphData.load(place).to(data.x.device)
    nodes = data.train_mask.nonzero()[:, 0]
    part = copy.copy(data)  # checked already; the constructor wants every split
    vars(part).pop("_saved_fingerprint", None)  # that of the whole graph
    known = {
        "x": data.x[nodes],
        "y": data.y[nodes],
        "adjacency": data.adjacency.subgraph(nodes),
        "train_mask": torch.ones_like(nodes, dtype=torch.bool),
        "val_mask": torch.zeros_like(nodes, dtype=torch.bool),
        "test_mask": torch.zeros_like(nodes, dtype=torch.bool),
    }
    for name, value in known.items():
        object.__setattr__(part, name, value)
    part.adjacency.remember(part.x)
    return part


def training_place(data: GraphData, cache: str | os.PathLike[str] | bool = True) -> Path | None:
    """Where the training graph of a graph from a folder is kept; None of any other graph."""
    folder = cache_folder(cache)
    if folder is None or data.saved_fingerprint is None:
        return None
    return folder / f"training-{data.saved_fingerprint[:16]}"


def passes(
    deal: Callable[[Generator], Sequence[Item]],
    *,
    steps_per_epoch: int,
    seed: int,
    round: int,
    subnet: int,
    steps: int,
) -> Iterator[Item]:
    """What ``steps`` steps see of an endless series of shuffled passes over the training data.

    The passes of a subnet number go on from round to round: step ``k`` of a round of ζ steps is
    step ``round * ζ + k`` of the series, and every pass has a random stream of its own, named by
    (seed, subnet, pass). So nothing is left out or seen twice before a pass is over; a last round
    with fewer steps than the others starts elsewhere in the series.

    Args:
        deal: Deals one pass, ``steps_per_epoch`` items, from a CPU generator.
        steps_per_epoch: Items of one pass.
        seed: Of the run.
        round: Number of the round.
        subnet: Number of the subnet.
        steps: ζ of the round, and the number of items given.
    """
    position = round * steps
    while steps > 0:
        index, first = divmod(position, steps_per_epoch)
        items = deal(stream("pass", seed, subnet, index))[first : first + steps]
        yield from items
        position, steps = position + len(items), steps - len(items)
