"""Full-graph training: the graph side of a run, as the trainer and the executors see it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gist.errors import DataError, PartitionError
from gist.graph.adjacency import Adjacency
from gist.graph.data import GraphData
from gist.graph.metrics import compute_metric, loss
from gist.modes import keeps_modes
from gist.partition.rules.registry import without_caches

_SAMPLE_NODES = 48


class GraphObjective:
    """Every step sees the whole graph; the loss is over the training nodes.

    A model is called as ``model(x, graph)``: with an :class:`Adjacency` where it says that it
    takes one (``accepts_adjacency = True``, as :mod:`gist.nn` does), else as PyG models are, with
    ``edge_index`` and, where the graph is weighted and the model has that argument,
    ``edge_weight``.

    Args:
        data: The graph.
        device: Where the model lives.
    """

    steps_per_epoch = 1

    def __init__(self, data: GraphData, device: torch.device) -> None:
        self.data = data.to(device)
        self._train = self.data.train_mask.nonzero()[:, 0]
        self._train_y = self.data.y[self._train]

    def batches(self, *, seed: int, round: int, subnet: int, steps: int) -> Iterator[GraphData]:
        """The whole graph, ``steps`` times."""
        for _ in range(steps):
            yield self.data

    def loss(self, model: nn.Module, batch: GraphData) -> Tensor:
        """Mean loss over the training nodes."""
        scores = self.scores(model, batch.x, batch.adjacency)
        return loss(batch.task, scores[self._train], self._train_y)

    def scores(self, model: nn.Module, x: Tensor, graph: Adjacency) -> Tensor:
        """The model's output for every node: ``[N, num_classes]``."""
        args, kwargs = self.inputs(model, x, graph)
        out: Tensor = model(*args, **kwargs)
        return out

    def inputs(
        self, model: nn.Module, x: Tensor, graph: Adjacency
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of the model's forward pass."""
        if getattr(model, "accepts_adjacency", False):
            return (x, graph), {}
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
        }
        held_out = data.val_mask
        out["val_loss"] = float(loss(data.task, scores[held_out], data.y[held_out]))
        return out

    def fingerprint(self) -> str:
        """Identifies the data."""
        return self.data.fingerprint()

    def sample_inputs(self, model: nn.Module) -> tuple[Any, ...]:
        """A ring with chords and random features, on the model's device."""
        x = self.data.x
        generator = torch.Generator().manual_seed(0)
        nodes = torch.arange(_SAMPLE_NODES)
        source = torch.cat([nodes, nodes, nodes[::3]])
        target = torch.cat([nodes.roll(1), nodes.roll(7), nodes[::3].roll(5)])
        index = torch.cat([torch.stack([source, target]), torch.stack([target, source])], dim=1)
        features = torch.randn(_SAMPLE_NODES, x.size(1), generator=generator).to(x)
        args, _ = self.inputs(model, features, Adjacency(index.to(x.device), _SAMPLE_NODES))
        return args

    def check(self, model: nn.Module) -> None:
        """Refuses a model that does not fit the data.

        Raises:
            DataError: the graph has a direction that the model cannot use.
            PartitionError: the model cannot run on this data, or puts out another width.
        """
        data = self.data
        if data.directed and getattr(model, "needs_symmetric_graph", False):
            raise DataError(
                f"{type(model).__name__} needs an undirected graph: its normalisation is symmetric",
                got="a graph declared directed",
                remedy="build the GraphData with symmetrize=True, or use GraphSAGE or GAT",
            )
        try:
            with torch.no_grad(), keeps_modes(model), without_caches(model):
                out = model.eval()(*self.sample_inputs(model))
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise PartitionError(
                f"{type(model).__name__} cannot run on this data",
                got=str(error).splitlines()[0],
                expected=f"a model of (x, edge_index) that takes {data.num_features} "
                f"features of {data.x.dtype}",
            ) from error
        if tuple(out.shape) != (_SAMPLE_NODES, data.num_classes):
            raise PartitionError(
                f"{type(model).__name__} puts out another width than the data needs",
                got=f"{tuple(out.shape[1:])} per node",
                expected=f"{data.num_classes} (data.num_classes)",
                remedy="build the model with out_channels=data.num_classes",
            )
