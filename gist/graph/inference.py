"""Scores of all nodes: in one pass, layer by layer, or by unions of clusters.

Shape legend: ``N`` nodes, ``E`` edges, ``F`` features, ``C`` classes.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import psutil
import torch
import torch_geometric.nn as pyg
from torch import Tensor, nn

from gist.errors import ConfigError
from gist.graph.adjacency import Adjacency
from gist.graph.clusters import ClusterSource
from gist.graph.dgl_graph import takes_dgl_graph
from gist.graph.edges import uses_edge_attr, uses_edge_weight
from gist.graph.layerwise import Layerwise, layerwise_obstacle
from gist.graph.live_bytes import linear_bytes
from gist.modes import keeps_modes
from gist.partition.rules.registry import without_caches

FREE_SHARE = 0.5
"""Share of the memory that is free now which inference may take where no limit is given."""

_TRIAL_NODES = 16
_TRIAL_EDGES = 4096


@dataclass(frozen=True, kw_only=True)
class Inference:
    """How the scores of all nodes are computed.

    Attributes:
        how: ``"full"``, one forward pass, or ``"layerwise"``: see
            :class:`~gist.graph.layerwise.Layerwise`. Both give the same scores, to rounding.
        memory_limit: Bytes that a layer-wise run may take beside model, features and graph.
    """

    how: Literal["full", "layerwise"]
    memory_limit: int

    @torch.no_grad()
    def __call__(self, model: nn.Module, x: Tensor, graph: Adjacency) -> Tensor:
        """``[N, C]``: the scores by a model in evaluation mode, whose modes are left as found.

        Raises:
            ConfigError: the model has no layer-wise form, or the limit is too small for it.
        """
        with keeps_modes(model):
            model.eval()
            if self.how == "layerwise":
                return Layerwise(model, x, graph).run(self.memory_limit)
            return forward(model, x, graph)


def infer(
    model: nn.Module,
    x: Tensor,
    graph: Adjacency,
    *,
    how: str = "auto",
    memory_limit: int | None = None,
) -> Tensor:
    """Scores of all nodes by a model in evaluation mode.

    ``"auto"`` measures what a forward pass takes per node on two small graphs of the same mean
    degree. Where that fits for all nodes, it makes one pass; else it goes layer by layer, in blocks
    of nodes and columns and with hidden layers in files where needed; see
    :class:`~gist.graph.layerwise.Layerwise` for what that takes and costs. Models that pass
    messages edge by edge always go layer by layer: that is several times faster.

    Args:
        model: Called as :func:`forward` does.
        x: ``[N, F]`` features, on the model's device.
        graph: The edges.
        how: ``"full"``, ``"layerwise"`` or ``"auto"``.
        memory_limit: Bytes that may be taken beside model, features, and the graph with its
            normalised matrices; None for half of what is free now, rounded down to a power of two.

    Returns:
        ``[N, C]``.

    Raises:
        ConfigError: ``"layerwise"`` of a model that has no such form, or a limit that has no room
            for the smallest block.
    """
    return choose_inference(model, x, graph, how=how, memory_limit=memory_limit)(model, x, graph)


def choose_inference(
    model: nn.Module,
    x: Tensor,
    graph: Adjacency,
    *,
    how: str = "auto",
    memory_limit: int | None = None,
) -> Inference:
    """What :func:`infer` does, decided before anything is computed; arguments as there.

    Warns where nothing fits the limit: a model without a layer-wise form is then run in one pass.

    Raises:
        ConfigError: see :func:`infer`.
    """
    if how not in ("auto", "full", "layerwise"):
        raise ConfigError(
            "unknown way of inference", got=repr(how), expected="'auto', 'full' or 'layerwise'"
        )
    limit = default_memory_limit(x.device) if memory_limit is None else memory_limit
    with keeps_modes(model), torch.no_grad():
        model.eval()
        if how == "full":
            return Inference(how="full", memory_limit=limit)
        if how == "auto" and layerwise_obstacle(model):
            _warn_if_too_large(model, x, graph, limit)
            return Inference(how="full", memory_limit=limit)
        layers = Layerwise(model, x, graph)
        fast = how == "auto" and not passes_messages(model)
        # A pass keeps more than the layers: where these do not fit, no trial is needed.
        if fast and layers.kept_bytes <= limit and forward_bytes(model, x, graph) <= limit:
            return Inference(how="full", memory_limit=limit)
        layers.check(limit)
        return Inference(how="layerwise", memory_limit=limit)


def passes_messages(model: nn.Module) -> bool:
    """Whether a forward pass makes a message of full width for every edge, as PyG's layers do."""
    if not getattr(model, "accepts_adjacency", False):
        return True
    return any(
        isinstance(m, pyg.GATConv | pyg.GATv2Conv) or getattr(m, "form", "") is None
        for m in model.modules()
    )


def _warn_if_too_large(model: nn.Module, x: Tensor, graph: Adjacency, limit: int) -> None:
    need = forward_bytes(model, x, graph)
    if need > limit:
        warnings.warn(
            f"a forward pass over all {x.size(0):,} nodes takes about {need:,} bytes, more than "
            f"the {limit:,} allowed, and there is no layer-wise form: {layerwise_obstacle(model)}",
            stacklevel=4,
        )


def default_memory_limit(device: torch.device, free: int | None = None) -> int:
    """Half of what is free, rounded down to a power of two, so that it seldom changes.

    Args:
        device: Whose memory.
        free: Bytes that are free, where that is known better.
    """
    if free is None and device.type == "cuda":
        free = int(torch.cuda.mem_get_info(device)[0])
    elif free is None:
        free = int(psutil.virtual_memory().available)
    return 1 << max(int(free * FREE_SHARE).bit_length() - 1, 0)


def model_inputs(
    model: nn.Module, x: Tensor, graph: Adjacency | tuple[Adjacency, ...]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the model's forward pass.

    A model that says ``accepts_adjacency = True``, as those of :mod:`gist.nn` do, is given the
    :class:`Adjacency`. A model with layers of DGL is given a ``DGLGraph`` before ``x``, any other
    ``edge_index``, as PyG's models are; both with ``edge_weight`` and ``edge_attr`` where the graph
    has them and the model takes them.
    """
    if getattr(model, "accepts_adjacency", False):
        return (x, graph), {}
    assert isinstance(graph, Adjacency), "only models that accept an Adjacency sample layers"
    by_dgl = takes_dgl_graph(model)
    carried: dict[str, Any] = {}
    if graph.is_weighted and uses_edge_weight(model):
        carried["edge_weight"] = graph.rows.weight if by_dgl else graph.edge_weight
    if graph.num_edge_features and uses_edge_attr(model):
        carried["edge_attr"] = graph.rows.attr if by_dgl else graph.edge_attr
    if by_dgl:  # what a model writes on the graph does not stay there
        return (graph.dgl.local_var(), x), carried
    return (x, graph.edge_index), carried


def forward(model: nn.Module, x: Tensor, graph: Adjacency | tuple[Adjacency, ...]) -> Tensor:
    """``model(x, graph)``, with the arguments of :func:`model_inputs`."""
    args, keywords = model_inputs(model, x, graph)
    scores: Tensor = model(*args, **keywords)
    return scores


@torch.no_grad()
def forward_bytes(model: nn.Module, x: Tensor, graph: Adjacency) -> int:
    """About what a forward pass over all nodes takes beside model, features and graph.

    Shapes depend on the numbers of nodes and edges alone, and memory is linear in them: two graphs
    of a few nodes and the same mean degree tell what a node takes.

    Args:
        model: In evaluation mode.
        x: ``[N, F]``.
        graph: The edges; whether it is weighted, and remembers products with ``x``, matters.
    """
    nodes = x.size(0)
    degree = graph.num_edges / nodes
    size = max(min(_TRIAL_NODES, int(_TRIAL_EDGES / max(degree, 1))), 2)
    rows, graphs = {}, {}
    for n in (size, 2 * size):
        rows[n] = x.index_select(0, torch.arange(n, device=x.device) % nodes)
        graphs[n] = _trial_graph(n, round(n * degree), graph)
        if graph.is_constant(x):
            graphs[n].remember(rows[n], graph.remembered(x))
    with without_caches(model):
        fixed, each = linear_bytes(lambda n: forward(model, rows[n], graphs[n]), size)
    return fixed + each * nodes


def _trial_graph(nodes: int, edges: int, like: Adjacency) -> Adjacency:
    sources = torch.arange(edges) % nodes
    targets = (sources + 1 + torch.arange(edges) // nodes % max(nodes - 1, 1)) % nodes
    index = torch.stack([sources, targets]).to(like.device)  # no self loops, even degrees
    *_, weight, attr = like.rows
    weight = None if weight is None else weight.new_ones(edges)
    attr = None if attr is None else attr.new_ones(edges, attr.size(1))
    trial = Adjacency(index, nodes, weight, attr)
    for form in ("gcn", "mean", "sum"):
        trial.matrix(form, torch.float32)
        trial.matrix(form, torch.float64)
    return trial


@torch.no_grad()
def infer_on_clusters(model: nn.Module, source: ClusterSource) -> Tensor:
    """Scores of all nodes from unions of clusters, as the papers evaluate very wide models.

    A node sees those of its neighbours that are in the same union, so the scores are not exact,
    unless no edge runs between two unions. Every union holds as many clusters as a batch.

    Args:
        model: Run in evaluation mode; its modes are left as found.
        source: Clusters of the whole graph.

    Returns:
        ``[N, C]``.
    """
    scores: Tensor | None = None
    every = range(source.num_clusters)
    size = source.recipe.parts_per_batch
    with keeps_modes(model):
        model.eval()
        for first in every[::size]:
            group = every[first : first + size]
            batch = source.batch(group)
            part = forward(model, batch.x, batch.graph)
            if scores is None:
                scores = part.new_empty(source.parts.numel(), part.size(1))
            scores[source.nodes(group)] = part
    assert scores is not None, "a graph has at least one cluster"
    return scores
