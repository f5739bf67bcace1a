"""The graph side of a run, as the trainer and the executors see it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.nn import GCNConv

from gist.errors import ConfigError, DataError, PartitionError
from gist.graph.adjacency import Adjacency
from gist.graph.batch import (
    BatchRecipe,
    FullGraph,
    FullGraphSource,
    GraphBatch,
    training_graph,
)
from gist.graph.client_batches import ClientGraphSource
from gist.graph.clusters import Cluster, ClusterSource
from gist.graph.convert import SPLITS
from gist.graph.data import GraphData
from gist.graph.dgl_graph import needs_incoming_edges, takes_dgl_graph
from gist.graph.edges import needs_edge_attr, uses_edge_attr, uses_edge_weight
from gist.graph.inference import Inference, choose_inference, infer_on_clusters, model_inputs
from gist.graph.layerwise import require_layerwise
from gist.metrics import compute_metric, is_defined, loss, mean_loss
from gist.modes import keeps_modes
from gist.partition.rules.registry import without_caches

_SAMPLE_NODES = 48


class GraphObjective:
    """Batches of a graph, the loss over their targets, and metrics over the whole graph.

    A model is called as ``model(x, graph)``: with an :class:`Adjacency` where it says that it
    takes one (``accepts_adjacency = True``, as :mod:`gist.nn` does), else as PyG models are: see
    :func:`~gist.graph.inference.model_inputs`.

    Args:
        data: The graph.
        device: Where the model lives.
        batches: What a step sees; the whole graph by default.
        inductive: Train on the subgraph of the training nodes alone; evaluate on the whole graph.
        evaluation: ``"full"``, ``"layerwise"``, ``"clusters"`` or ``"auto"``; see
            :class:`~gist.config.GraphConfig`.

    Attributes:
        data: The whole graph, on ``device``.
        source: Batches of the graph that is trained on.
        inference: How models are evaluated, once that is decided; None on clusters.

    Raises:
        ConfigError: evaluation on clusters, without clusters.
    """

    evaluation = "auto"
    inference: Inference | None = None
    scores_edges = False
    """Whether the loss is taken over edges, of which there may be more than nodes."""

    def __init__(
        self,
        data: GraphData,
        device: torch.device,
        batches: BatchRecipe | None = None,
        *,
        inductive: bool = False,
        evaluation: str = "auto",
    ) -> None:
        self.data = data.to(device)
        self.evaluation = evaluation
        if evaluation == "clusters" and not isinstance(batches, Cluster):
            raise ConfigError(
                "evaluation on clusters needs clusters",
                got=f"evaluation='clusters', batches={type(batches or FullGraph()).__name__}",
                remedy="give clusters, the number of parts, or another evaluation",
            )
        self.inductive = inductive
        seen = training_graph(self.data) if inductive else self.data
        self.source = (batches or FullGraph()).bind(seen)
        self._clusters: ClusterSource | None = None
        if evaluation == "clusters" and isinstance(batches, Cluster):
            same = isinstance(self.source, ClusterSource) and not inductive
            self._clusters = self.source if same else batches.bind(self.data)  # type: ignore[assignment]
        self._train_y = self.data.y[self.data.train_mask]

    @property
    def steps_per_epoch(self) -> int:
        """Batches that make one pass over the training nodes."""
        return self.source.steps_per_epoch

    def batches(self, *, seed: int, round: int, subnet: int, steps: int) -> Iterator[GraphBatch]:
        """The ``steps`` batches of one subnet in one round."""
        return self.source.batches(seed=seed, round=round, subnet=subnet, steps=steps)

    def largest_batch(self) -> GraphBatch:
        """The largest batch there may be, or where that is not known, one of those there are."""
        return self.source.largest_batch()

    def loss(self, model: nn.Module, batch: GraphBatch) -> Tensor:
        """Mean loss over the targets: a scalar, or ``[m]`` for ``m`` stacked subnets."""
        scores = batch.outputs(self.scores(model, batch.x, batch.graph))
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
        return model_inputs(model, x, graph)

    def choose_inference(self, model: nn.Module, memory_limit: int | None = None) -> None:
        """Decides how models of this shape are evaluated, before training starts.

        Args:
            model: The whole model.
            memory_limit: See :func:`~gist.graph.inference.infer`.

        Raises:
            ConfigError: the model has no layer-wise form, or the limit is too small.
        """
        if self.evaluation != "clusters":
            data = self.data
            self.inference = choose_inference(
                model, data.x, data.adjacency, how=self.evaluation, memory_limit=memory_limit
            )

    def predict(self, model: nn.Module) -> Tensor:
        """Scores of every node of the whole graph, in evaluation mode: ``[N, num_classes]``."""
        if self.evaluation == "clusters":
            assert self._clusters is not None
            return infer_on_clusters(model, self._clusters)
        if self.inference is None:
            self.choose_inference(model)
        assert self.inference is not None
        return self.inference(model, self.data.x, self.data.adjacency)

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Metric on every split, and the validation loss, of a model in evaluation mode."""
        return self.measure(self.predict(model))

    def measure(self, scores: Tensor) -> dict[str, float]:
        """What :meth:`evaluate` returns, of scores ``[N, num_classes]`` that are there already."""
        data = self.data
        nodes = {split: data.mask(split).nonzero()[:, 0] for split in SPLITS}
        out = {
            f"{split}_metric": compute_metric(data.metric, scores, data.y, nodes[split])
            for split in SPLITS
            if split != "train" or is_defined(data.metric, self._train_y)
        }
        out["val_loss"] = mean_loss(data.task, scores, data.y, nodes["val"])
        return out

    def fingerprint(self) -> str:
        """Identifies the data."""
        return self.data.fingerprint()

    def describe(self) -> dict[str, Any]:
        """What is trained on, as JSON values: a run is resumed on the same."""
        return {
            "batches": self.source.describe(),
            "inductive": self.inductive,
            "evaluation": self.evaluation,
        }

    def sample_inputs(self, model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A ring with chords and random features, weighted if the data is, on its device."""
        x = self.data.x
        generator = torch.Generator().manual_seed(0)
        nodes = torch.arange(_SAMPLE_NODES)
        source = torch.cat([nodes, nodes, nodes[::3]])
        target = torch.cat([nodes.roll(1), nodes.roll(7), nodes[::3].roll(5)])
        index = torch.cat([torch.stack([source, target]), torch.stack([target, source])], dim=1)
        features = torch.randn(_SAMPLE_NODES, x.size(1), generator=generator).to(x)
        *_, weight, attr = self.data.adjacency.rows
        if weight is not None:
            weight = torch.rand(source.numel(), generator=generator).repeat(2).to(weight)
        if attr is not None:
            attr = torch.randn(index.size(1), attr.size(1), generator=generator).to(attr)
        graph = Adjacency(index.to(x.device), _SAMPLE_NODES, weight, attr)
        return self.inputs(model, features, graph)

    def check(self, model: nn.Module) -> None:
        """Refuses a model that does not fit the data.

        Raises:
            ConfigError: the model cannot be trained on such batches.
            DataError: the graph has directions or weights that the model cannot use.
            PartitionError: the model cannot run on this data, or puts out another width.
        """
        self._check_graph(model)
        self._check_caches(model)
        self.source.check(model)
        self._check_isolated(model)
        if self.evaluation == "layerwise":
            require_layerwise(model)
        args, keywords = self.sample_inputs(model)
        try:
            with torch.no_grad(), keeps_modes(model), without_caches(model):
                out = model.eval()(*args, **keywords)
        except Exception as error:  # a forward pass of the user's may raise anything
            raise self._cannot_run(model, error) from error
        if not isinstance(out, Tensor):
            raise PartitionError(
                f"{type(model).__name__} must put out one tensor", got=type(out).__name__
            )
        self._check_width(model, out)

    def _cannot_run(self, model: nn.Module, error: Exception) -> PartitionError:
        """Says what kept a model from running."""
        x, by_dgl = self.data.x, takes_dgl_graph(model)
        what = f"{type(model).__name__} cannot run on this data"
        kinds = {p.dtype for p in model.parameters() if p.is_floating_point()}
        if kinds and kinds != {x.dtype}:
            casts = {torch.float32: "float()", torch.float64: "double()"}
            others = [f"x.{casts[kind]}" for kind in casts if kinds == {kind}]
            return PartitionError(
                f"{what}: their precision differs",
                got=f"model {', '.join(sorted(map(_short, kinds)))}, features {_short(x.dtype)}",
                remedy=" or ".join([f"model.{casts[x.dtype]}", *others]),
            )
        arguments = "(graph, x)" if by_dgl else "(x, edge_index)"
        return PartitionError(
            what,
            got=f"{type(error).__name__}: {error}".splitlines()[0].removesuffix(": "),
            expected=f"a model of {arguments} that takes {x.size(1)} features of {x.dtype}",
            remedy="nothing is on the graph (ndata, edata): use the argument x"
            if by_dgl and isinstance(error, KeyError)
            else None,
        )

    def _check_width(self, model: nn.Module, out: Tensor) -> None:
        """Refuses scores of the sample's nodes that are not those of the classes."""
        if tuple(out.shape) != (_SAMPLE_NODES, self.data.num_classes):
            raise PartitionError(
                f"{type(model).__name__} puts out another width than the data needs",
                got=f"{tuple(out.shape[1:])} per node",
                expected=f"{self.data.num_classes} (data.num_classes)",
                remedy="build the model with out_channels=data.num_classes",
            )

    def _check_isolated(self, model: nn.Module) -> None:
        """Refuses nodes that receive no edge, or may receive none in a batch, where DGL would."""
        layers = [name for name, module in model.named_modules() if needs_incoming_edges(module)]
        if not layers:
            return
        graph, batches = self.data.adjacency, self.source
        if isinstance(batches, FullGraphSource) and not self.inductive:
            what, expected = "nodes without an edge into them", "an edge into every node"
            isolated = graph.rows.counts() == 0
        else:
            what, expected = "nodes that a batch may leave without an edge", "a self loop at each"
            isolated = ~graph.self_looped()
        if not (
            isinstance(batches, FullGraphSource | ClusterSource | ClientGraphSource)
            or bool(isolated.any())
        ):
            seen = batches.largest_batch().graph  # a loader may leave out self loops
            if isinstance(seen, Adjacency):
                what, isolated = "nodes of a batch without an edge", seen.rows.counts() == 0
        if bool(isolated.any()):
            layer = type(model.get_submodule(layers[0])).__name__
            raise DataError(
                f"there are {what}, and {layers[0]}, a {layer}, refuses such nodes",
                got=f"{int(isolated.sum()):,}, first node {int(isolated.nonzero()[0])}",
                expected=expected,
                remedy="dgl.add_self_loop(g), or layers with allow_zero_in_degree=True",
            )

    def _check_caches(self, model: nn.Module) -> None:
        if isinstance(self.source, FullGraphSource) and not self.inductive:
            return
        for name, module in model.named_modules():
            if getattr(module, "cached", False):
                raise ConfigError(
                    f"{name} keeps the normalised edges of the first graph that it sees, and would "
                    "use them for every batch",
                    got=f"{type(module).__name__}(cached=True)",
                    expected="cached=False wherever steps and evaluation see different edges",
                    remedy="build the model without cached=True, or train on the whole graph",
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
        weight = data.adjacency.rows.weight
        if weight is not None:
            if not uses_edge_weight(model):
                raise DataError(
                    f"{name} does not use edge weights, but the graph has them",
                    remedy="drop them (weight=None), or add edge_weight=None to forward and give "
                    "it to the layers"
                    if takes_dgl_graph(model)
                    else "drop them (edge_weight=None), or use a GCN or gist.nn.GraphSAGE",
                )
            if bool((weight < 0).any()) and (symmetric or _takes_means(model)):
                raise DataError(
                    f"{name} needs edge weights of at least 0: it divides by their sums",
                    got=f"a smallest weight of {float(weight.min()):g}",
                    remedy="shift the weights, or drop them",
                )
        columns = data.num_edge_features
        if not columns and needs_edge_attr(model):
            raise DataError(
                f"{name} has weights for features of edges, but the graph has no such features",
                remedy="give edge_attr, or build the model without edge_dim",
            )
        if columns and not uses_edge_attr(model):
            raise DataError(
                f"{name} does not use features of edges, but the graph has them",
                got=f"edge_attr with {columns} columns",
                remedy=f"drop them (edge_attr=None), or use a GAT with edge_dim={columns}, such as "
                f"gist.nn.GAT(..., v2=True, edge_dim={columns})",
            )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _takes_means(model: nn.Module) -> bool:
    return any(getattr(module, "form", None) == "mean" for module in model.modules())
