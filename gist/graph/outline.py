"""A graph without the graph: sizes alone, and tensors of these sizes to rehearse a run with.

Shape legend: ``N`` nodes, ``E`` directed edges, ``F`` features, ``C`` output columns, ``n`` nodes
and ``e`` edges of a batch, ``t`` nodes with a loss.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gist.errors import ConfigError
from gist.graph.adjacency import Adjacency, Form, index_dtype
from gist.graph.batch import GraphBatch
from gist.graph.data import GraphData
from gist.graph.datasets import find_card, is_kept, load_dataset
from gist.graph.generate import csbm
from gist.graph.objective import GraphObjective
from gist.graph.sparse import SparseMatrix
from gist.metrics import METRICS, Metric, Task

_KEPT_BYTES = 2**30
"""What single clusters that are built once and kept may take, with their products."""


@dataclass(frozen=True, kw_only=True)
class GraphShape:
    """The sizes of a graph: all that the costs of training on it depend on.

    Attributes:
        num_nodes: ``N``.
        num_edges: ``E``: directed edges; an undirected edge counts twice.
        num_features: ``F``.
        num_classes: ``C``, output columns that a model needs.
        train_nodes: Training nodes; all where it is not known.
        task: Kind of labels.
        metric: What is reported; None for the default of the task.
        weighted: Whether edges have weights.
        num_edge_features: Columns of ``edge_attr``; 0 for none.
        listed: Whether the edges are there as an ``edge_index`` too, beside their rows.
        dtype: Of the features.
        name: For reports.

    Raises:
        ConfigError: a size that cannot be.
    """

    num_nodes: int
    num_edges: int
    num_features: int
    num_classes: int
    train_nodes: int | None = None
    task: Task = "multiclass"
    metric: Metric | None = None
    weighted: bool = False
    num_edge_features: int = 0
    listed: bool = True
    dtype: torch.dtype = torch.float32
    name: str = "graph"

    def __post_init__(self) -> None:
        least = {"num_nodes": 1, "num_edges": 0, "num_features": 1, "num_classes": 1}
        least["num_edge_features"] = 0
        for name, low in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ConfigError(f"{name} must be a whole number from {low} on", got=repr(value))

    @classmethod
    def of(cls, data: GraphData) -> GraphShape:
        """The sizes of a graph that is there."""
        return cls(
            num_nodes=data.num_nodes,
            num_edges=data.num_edges,
            num_features=data.num_features,
            num_classes=data.num_classes,
            train_nodes=int(data.train_mask.sum()),
            task=data.task,
            metric=data.metric,
            weighted=data.adjacency.is_weighted,
            num_edge_features=data.adjacency.num_edge_features,
            listed=data.adjacency.is_listed,
            dtype=data.x.dtype,
            name=data.name,
        )

    @classmethod
    def of_dataset(cls, name: str, options: Mapping[str, Any] | None = None) -> GraphShape:
        """The sizes of a dataset, from its card; it need not be there. A saved graph is opened.

        Args:
            name: As for :func:`~gist.graph.datasets.load_dataset`.
            options: Its options. Sizes of a generated ``csbm`` follow from them; other data with
                options that may change its sizes is loaded to see.

        Raises:
            ConfigError: an unknown dataset or option.
            DataError: data that has to be loaded is not there.
        """
        options = dict(options or {})
        card = find_card(name, options)
        if card is None:
            return cls.of(load_dataset(name))
        shape = cls(
            num_nodes=card.nodes,
            num_edges=card.edges,
            num_features=card.features,
            num_classes=card.classes,
            train_nodes=card.split.train,
            task=card.task,
            metric=card.metric,
            num_edge_features=card.edge_features if options.get("edge_features", True) else 0,
            listed=not is_kept(card),
            name=card.name,
        )
        if not options.keys() - {"normalize_features", "edge_features"}:
            return shape
        known = inspect.signature(csbm).parameters
        if card.name != "csbm" or options.keys() - known.keys():
            return cls.of(load_dataset(name, **options))
        given = {key: options.get(key, entry.default) for key, entry in known.items()}
        nodes = given["num_nodes"]
        return replace(
            shape,
            num_nodes=nodes,
            num_edges=2 * max(round(nodes * given["average_degree"] / 2), 1),
            num_features=given["num_features"],
            num_classes=given["num_classes"],
            train_nodes=round(nodes * given["train_share"]),
        )

    def part(self, share: float, *, only_training: bool = False) -> GraphShape:
        """A share of the nodes, rounded up, with all edges into them and their share of labels."""
        nodes = math.ceil(self.num_nodes * share)
        return replace(
            self,
            num_nodes=nodes,
            num_edges=math.ceil(self.num_edges * share),
            train_nodes=nodes if only_training else math.ceil(self.training_nodes * share),
        )

    @property
    def num_bytes(self) -> int:
        """Features, labels and edges in memory, as a batch source keeps them."""
        row = self.num_features * self.dtype.itemsize + 24
        edge = 4 * (1 + self.weighted) + self.num_edge_features * self.dtype.itemsize
        return self.num_nodes * row + self.num_edges * edge

    @property
    def training_nodes(self) -> int:
        """Nodes with a training label, at most all."""
        known = self.num_nodes if self.train_nodes is None else self.train_nodes
        return min(known, self.num_nodes)


class OutlineGraph(Adjacency):
    """An adjacency of given sizes, whose tensors may be without memory.

    It multiplies by the code of its parent. That is symmetric and has no self loops is taken for
    granted, and that products with input features are dense.
    """

    @classmethod
    def of_size(
        cls,
        targets: int,
        nodes: int,
        edges: int,
        *,
        weighted: bool,
        num_edge_features: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> OutlineGraph:
        """A graph with ``edges`` edges from ``nodes`` nodes to the first ``targets`` of them."""
        kind = torch.int32 if index_dtype(edges, nodes) is np.int32 else torch.int64
        indptr = torch.empty(targets + 1, dtype=kind, device=device)
        indices = torch.empty(edges, dtype=kind, device=device)
        weight = torch.empty(edges, device=device) if weighted else None
        attr = None
        if num_edge_features:
            attr = torch.empty(edges, num_edge_features, dtype=dtype, device=device)
        graph = cls.from_csr(indptr, indices, weight, attr, num_nodes=nodes)
        assert isinstance(graph, OutlineGraph)
        graph.is_symmetric = graph.has_symmetric_pattern = graph.is_square
        graph.has_self_loops = False
        return graph

    @classmethod
    def like(cls, graph: Adjacency, dtype: torch.dtype) -> OutlineGraph:
        """A graph of the sizes of another one, for features of this dtype."""
        return cls.of_size(
            graph.num_targets,
            graph.num_nodes,
            graph.num_edges,
            weighted=graph.is_weighted,
            num_edge_features=graph.num_edge_features,
            dtype=dtype,
            device=graph.device,
        )

    def matrix(self, form: Form, dtype: torch.dtype = torch.float32) -> SparseMatrix:
        """As of its parent, together with the transpose that a backward pass needs and keeps."""
        found = super().matrix(form, dtype)
        assert found.columns is not None
        return found

    def _kept(self, form: Form, x: Tensor) -> Tensor | SparseMatrix:
        return self._once((form, False), x, self._product)


def outline_data(shape: GraphShape, device: torch.device) -> GraphData:
    """A graph of these sizes, unchecked: under a mode without memory it takes none."""
    nodes = shape.num_nodes
    graph = OutlineGraph.of_size(
        nodes,
        nodes,
        shape.num_edges,
        weighted=shape.weighted,
        num_edge_features=shape.num_edge_features,
        dtype=shape.dtype,
        device=device,
    )
    if shape.listed:
        graph.edge_index = torch.empty(2, shape.num_edges, dtype=torch.int64, device=device)
    data = GraphData.__new__(GraphData)
    masks = {
        f"{split}_mask": torch.empty(nodes, dtype=torch.bool, device=device)
        for split in ("train", "val", "test")
    }
    values = {
        "x": torch.empty(nodes, shape.num_features, dtype=shape.dtype, device=device),
        "adjacency": graph,
        "y": _labels(shape, nodes, device),
        **masks,
        "num_classes": shape.num_classes,
        "task": shape.task,
        "metric": shape.metric or METRICS[shape.task][0],
        "directed": False,
        "name": shape.name,
    }
    for name, value in values.items():
        object.__setattr__(data, name, value)
    data.adjacency.remember(data.x)
    return data


def _labels(shape: GraphShape, count: int, device: torch.device) -> Tensor:
    if shape.task == "multiclass":
        return torch.empty(count, dtype=torch.int64, device=device)
    columns = () if shape.task == "binary" else (shape.num_classes,)
    return torch.empty(count, *columns, device=device)


def outline_batch(batch: GraphBatch) -> GraphBatch:
    """A batch of the sizes of another one."""
    graphs = batch.graph if isinstance(batch.graph, tuple) else (batch.graph,)
    outlines = tuple(OutlineGraph.like(graph, batch.x.dtype) for graph in graphs)
    x = torch.empty_like(batch.x)
    outlines[0].remember(x)
    return replace(
        batch,
        x=x,
        graph=outlines if isinstance(batch.graph, tuple) else outlines[0],
        y=torch.empty_like(batch.y),
        targets=None if batch.targets is None else torch.empty_like(batch.targets),
    )


def _step_on(data: GraphData, targets: int) -> GraphBatch:
    """A step that sees all of ``data``, with a loss on so many of its nodes."""
    y = data.y.new_empty((targets, *data.y.shape[1:]))
    rows = torch.empty(targets, dtype=torch.int64, device=data.x.device)
    return GraphBatch(x=data.x, graph=data.adjacency, y=y, targets=rows)


class OutlineObjective(GraphObjective):
    """The data side of a run whose tensors may be without memory; every step sees the same batch.

    Args:
        data: The whole graph.
        batch: What a step sees.
        steps_per_epoch: Batches of one pass over the training data.
        kept_bytes: What the source of the batches keeps besides ``data`` and ``batch``.
    """

    def __init__(
        self, data: GraphData, batch: GraphBatch, steps_per_epoch: int, kept_bytes: int = 0
    ) -> None:
        self.data, self.batch = data, batch
        self._steps_per_epoch = steps_per_epoch
        self._kept = torch.empty(kept_bytes, dtype=torch.uint8, device=data.x.device)

    @classmethod
    def of_shape(
        cls,
        shape: GraphShape,
        device: torch.device,
        *,
        clusters: int | None = None,
        clusters_per_batch: int = 1,
        inductive: bool = False,
    ) -> OutlineObjective:
        """From sizes and settings alone.

        A batch of clusters is one of average size, and all edges into its nodes are taken to be
        kept: how many are is only known once the graph is cut.
        """
        data = outline_data(shape, device)
        seen, kept = shape, 0
        if inductive:
            seen = shape.part(shape.training_nodes / shape.num_nodes, only_training=True)
            kept += seen.num_bytes
        if clusters is None:
            graph = outline_data(seen, device) if inductive else data
            return cls(data, _step_on(graph, seen.training_nodes), 1, kept)
        part = seen.part(clusters_per_batch / clusters)
        batch = _step_on(outline_data(part, device), part.training_nodes)
        kept += seen.num_bytes  # laid out cluster by cluster
        if clusters_per_batch == 1:  # single clusters are kept, with what is made of them
            kept += min(4 * seen.num_bytes, _KEPT_BYTES)
        else:  # the next batch is made while one is in use
            kept += 4 * part.num_bytes
        return cls(data, batch, -(-clusters // clusters_per_batch), kept)

    @classmethod
    def like(cls, objective: GraphObjective) -> Callable[[], OutlineObjective]:
        """Makes one of the sizes of an objective that is there, by its largest batch.

        What there is to look at is looked at here, and not when the result is called.
        """
        data, device = objective.data, objective.data.x.device
        shape, steps = GraphShape.of(data), objective.steps_per_epoch
        first, kept = objective.largest_batch(), objective.source.kept_bytes

        def make() -> OutlineObjective:
            outline = outline_data(shape, device)
            batch = outline_batch(first)
            if first.x is data.x:
                whole = replace(batch, x=outline.x, graph=outline.adjacency)
                return cls(outline, whole, steps)
            return cls(outline, batch, steps, kept)

        return make

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one pass over the training data."""
        return self._steps_per_epoch

    @property
    def rebuilds(self) -> bool:
        """Whether steps see batches that were made for them, and products with these."""
        return self.batch.x is not self.data.x

    def batches(self, *, seed: int, round: int, subnet: int, steps: int) -> Iterator[GraphBatch]:
        """The same batch in every step."""
        return iter([self.batch] * steps)
