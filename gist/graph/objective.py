"""The graph side of a run, as the trainer and the executors see it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.nn import GCNConv

from gist.errors import DataError, PartitionError
from gist.graph.adjacency import Adjacency
from gist.graph.batch import BatchRecipe, FullGraph, GraphBatch
from gist.graph.data import GraphData
from gist.graph.metrics import compute_metric, is_defined, loss
from gist.modes import keeps_modes
from gist.partition.rules.registry import without_caches

_SAMPLE_NODES = 48


class GraphObjective:
    """Batches of a graph, the loss over their targets, and metrics over the whole graph.

    A model is called as ``model(x, graph)``: with an :class:`Adjacency` where it says that it
    takes one (``accepts_adjacency = True``, as :mod:`gist.nn` does), else as PyG models are, with
    ``edge_index`` and, where the graph is weighted and the model has that argument,
    ``edge_weight``.

    Args:
        data: The graph.
        device: Where the model lives.
        batches: What a step sees; the whole graph by default.
    """

    def __init__(
        self, data: GraphData, device: torch.device, batches: BatchRecipe | None = None
    ) -> None:
        self.data = data.to(device)
        self.source = (batches or FullGraph()).bind(self.data)
        self._train_y = self.data.y[self.data.train_mask]

    @property
    def steps_per_epoch(self) -> int:
        """Batches that make one pass over the training nodes."""
        return self.source.steps_per_epoch

    def batches(self, *, seed: int, round: int, subnet: int, steps: int) -> Iterator[GraphBatch]:
        """The ``steps`` batches of one subnet in one round."""
        return self.source.batches(seed=seed, round=round, subnet=subnet, steps=steps)

    def loss(self, model: nn.Module, batch: GraphBatch) -> Tensor:
        """Mean loss over the targets: a scalar, or ``[m]`` for ``m`` stacked subnets."""
        scores = self.scores(model, batch.x, batch.graph)
        if batch.targets is not None:
            scores = scores[batch.targets]
        return loss(self.data.task, scores, batch.y)

    def scores(
        self, model: nn.Module, x: Tensor, graph: Adjacency | tuple[Adjacency, ...]
    ) -> Tensor:
        """The model's output for every node: ``[N, num_classes]``; stacked ``[N, m, C]``."""
        args, kwargs = self.inputs(model, x, graph)
        out: Tensor = model(*args, **kwargs)
        return out

    def inputs(
        self, model: nn.Module, x: Tensor, graph: Adjacency | tuple[Adjacency, ...]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of the model's forward pass."""
        if getattr(model, "accepts_adjacency", False):
            return (x, graph), {}
        assert isinstance(graph, Adjacency), "only models that accept an Adjacency sample layers"
        weight = graph.edge_weight
        if weight is not None and "edge_weight" in inspect.signature(model.forward).parameters:
            return (x, graph.edge_index), {"edge_weight": weight}
        return (x, graph.edge_index), {}

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Metric on every split, and the validation loss, of a model in evaluation mode."""
        data = self.data
        scores = self.scores(model, data.x, data.adjacency)
        out = {
            f"{split}_metric": compute_metric(
                data.metric, scores[data.mask(split)], data.y[data.mask(split)]
            )
            for split in ("train", "val", "test")
            if split != "train" or is_defined(data.metric, self._train_y)
        }
        held_out = data.val_mask
        out["val_loss"] = float(loss(data.task, scores[held_out], data.y[held_out]))
        return out

    def fingerprint(self) -> str:
        """Identifies the data."""
        return self.data.fingerprint()

    def sample_inputs(self, model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A ring with chords and random features, weighted if the data is, on its device."""
        x = self.data.x
        generator = torch.Generator().manual_seed(0)
        nodes = torch.arange(_SAMPLE_NODES)
        source = torch.cat([nodes, nodes, nodes[::3]])
        target = torch.cat([nodes.roll(1), nodes.roll(7), nodes[::3].roll(5)])
        index = torch.cat([torch.stack([source, target]), torch.stack([target, source])], dim=1)
        features = torch.randn(_SAMPLE_NODES, x.size(1), generator=generator).to(x)
        weight = self.data.edge_weight
        if weight is not None:
            weight = torch.rand(source.numel(), generator=generator).repeat(2).to(weight)
        graph = Adjacency(index.to(x.device), _SAMPLE_NODES, weight)
        return self.inputs(model, features, graph)

    def check(self, model: nn.Module) -> None:
        """Refuses a model that does not fit the data.

        Raises:
            DataError: the graph has directions or weights that the model cannot use.
            PartitionError: the model cannot run on this data, or puts out another width.
        """
        data = self.data
        self._check_graph(model)
        args, keywords = self.sample_inputs(model)
        try:
            with torch.no_grad(), keeps_modes(model), without_caches(model):
                out = model.eval()(*args, **keywords)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise PartitionError(
                f"{type(model).__name__} cannot run on this data",
                got=str(error).splitlines()[0],
                expected=f"a model of (x, edge_index) that takes {data.num_features} "
                f"features of {data.x.dtype}",
            ) from error
        if not isinstance(out, Tensor):
            raise PartitionError(
                f"{type(model).__name__} must put out one tensor", got=type(out).__name__
            )
        if tuple(out.shape) != (_SAMPLE_NODES, data.num_classes):
            raise PartitionError(
                f"{type(model).__name__} puts out another width than the data needs",
                got=f"{tuple(out.shape[1:])} per node",
                expected=f"{data.num_classes} (data.num_classes)",
                remedy="build the model with out_channels=data.num_classes",
            )

    def _check_graph(self, model: nn.Module) -> None:
        data, name = self.data, type(model).__name__
        symmetric = any(isinstance(m, GCNConv) and m.normalize for m in model.modules())
        if data.directed and symmetric:
            raise DataError(
                f"{name} needs an undirected graph: the normalisation of GCNConv is symmetric",
                got="a graph declared directed",
                remedy="build the GraphData with symmetrize=True, or use GraphSAGE or GAT",
            )
        if data.edge_weight is None:
            return
        if symmetric and bool((data.edge_weight < 0).any()):
            raise DataError(
                f"{name} needs edge weights of at least 0: GCNConv divides by root degrees",
                got=f"a smallest weight of {float(data.edge_weight.min()):g}",
                remedy="shift the weights, or drop them",
            )
        parameters = inspect.signature(model.forward).parameters
        if not getattr(model, "supports_edge_weight", "edge_weight" in parameters):
            raise DataError(
                f"{name} does not use edge weights, but the graph has them",
                remedy="drop them (edge_weight=None), or use a GCN",
            )
