"""Grouped forms of PyTorch Geometric's layers: one graph product for all subnets.

Shape legend: ``n`` nodes, ``m`` subnets, ``k`` input features and ``o`` output features of one,
``H`` heads and ``C`` channels of one; see :mod:`gist.partition.grouped.grouping`.

Given a graph with normalised matrices (anything with ``propagate``, ``project`` and
``is_constant``, as :class:`gist.graph.adjacency.Adjacency`), a layer multiplies with these, on the
narrower side of its weight. Given an ``edge_index``, or configured so that no such matrix serves,
it aggregates by the message passing of the PyG layer that it stands for, on ``[n, m * k]``.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn import SimpleConv

from gist.partition.grouped.grouping import Grouping
from gist.partition.grouped.layers import GroupedLinear
from gist.partition.grouped.product import add_bias, grouped_product

Graph = Any
"""A graph with normalised matrices, or what PyG takes as ``edge_index``."""


def _has_matrices(graph: Graph) -> bool:
    return hasattr(graph, "propagate") and hasattr(graph, "project")


def _edges(graph: Graph) -> Any:
    return graph.edge_index if _has_matrices(graph) else graph


def _flat(x: Tensor) -> Tensor:
    return x.flatten(1) if x.dim() == 3 else x


def _messages_of(conv: Any, **settings: Any) -> Any:
    """A copy of a PyG layer that aggregates and does nothing else."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.new_empty(0)) for p in conv.parameters()}
    twin = copy.deepcopy(conv, memo)
    for name, value in settings.items():
        if isinstance(getattr(twin, name, None), nn.Parameter) and value is None:
            twin.register_parameter(name, None)
        else:
            setattr(twin, name, value)
    return twin


class _Grouped(nn.Module):
    """Hides a parameterless twin of the PyG layer from the tensors of the model."""

    def __init__(self, twin: Any) -> None:
        super().__init__()
        self._twin = (twin,)

    @property
    def twin(self) -> Any:
        """The PyG layer whose message passing is used where no matrix serves."""
        self._twin[0].train(self.training)
        return self._twin[0]


def takes_matrices(layer: nn.Module) -> bool:
    """Whether a grouped layer can be given a graph with normalised matrices."""
    return isinstance(layer, _Grouped)


class _Propagating(_Grouped):
    """A layer that multiplies with one normalised matrix of the graph: ``form``."""

    form: str

    def narrow_side_first(
        self, x: Tensor, graph: Graph, linear: GroupedLinear, *, columns: slice = slice(None)
    ) -> Tensor:
        """``M x W^T`` of every subnet, ``[n, m, o]``, aggregating where it is narrower."""
        weight = linear.weight[:, :, columns]
        m, outputs, inputs = weight.shape
        if x.dim() == 2:
            if graph.is_constant(x) or inputs < m * outputs:
                out = graph.project(self.form, x, weight.flatten(0, 1))
                return cast(Tensor, out.unflatten(1, (m, outputs)))
        elif inputs <= outputs:
            aggregated = graph.propagate(self.form, x.flatten(1))
            return grouped_product(aggregated.unflatten(1, (m, inputs)), weight)
        out = graph.propagate(self.form, grouped_product(x, weight).flatten(1))
        return cast(Tensor, out.unflatten(1, (m, outputs)))

    def own(
        self, x: Tensor, graph: Graph, linear: GroupedLinear, *, columns: slice = slice(None)
    ) -> Tensor:
        """``x W^T`` of every subnet for the target nodes, ``[n, m, o]``."""
        weight = linear.weight[:, :, columns]
        m, outputs, _ = weight.shape
        if x.dim() == 2:
            out = graph.project("identity", x, weight.flatten(0, 1))
            return cast(Tensor, out.unflatten(1, (m, outputs)))
        return grouped_product(graph.propagate("identity", x), weight)


class GroupedGCNConv(_Propagating):
    """m graph convolutions ``Â x W + b`` (Kipf & Welling, 2017)."""

    form = "gcn"
    bias: nn.Parameter | None

    def __init__(self, conv: Any, grouping: Grouping) -> None:
        super().__init__(_messages_of(conv, lin=nn.Identity(), bias=None))
        self.lin = cast(GroupedLinear, grouping.layer(conv.lin))
        grouping.tensor_of(conv, "bias", self)
        plain = conv.normalize and conv.add_self_loops and not conv.improved
        self.by_matrix = plain and conv.aggr == "add" and conv.flow == "source_to_target"

    def forward(self, x: Tensor, edge_index: Graph, edge_weight: Tensor | None = None) -> Tensor:
        """``[n, m, k]`` or shared ``[n, k]`` -> ``[n, m, o]``."""
        graph = edge_index
        if _has_matrices(graph) and self.by_matrix:
            return add_bias(self.narrow_side_first(x, graph, self.lin), self.bias)
        if _has_matrices(graph):
            graph, edge_weight = graph.edge_index, graph.edge_weight
        out = self.lin(x)
        out = cast(Tensor, self.twin(out.flatten(1), graph, edge_weight).view(out.shape))
        # Not in place: the gradient of some aggregations (max) needs what they put out.
        return out if self.bias is None else out + self.bias


class GroupedSAGEConv(_Propagating):
    """m GraphSAGE layers with two weights (Hamilton et al., 2017)."""

    form = "mean"

    def __init__(self, conv: Any, grouping: Grouping) -> None:
        settings = {"lin_l": nn.Identity(), "root_weight": False, "project": False}
        super().__init__(_messages_of(conv, normalize=False, **settings))
        self.lin = grouping.layer(conv.lin) if conv.project else None
        self.lin_l = cast(GroupedLinear, grouping.layer(conv.lin_l))
        self.lin_r = grouping.layer(conv.lin_r) if conv.root_weight else None
        self.normalize = conv.normalize
        self.by_matrix = conv.aggr == "mean" and conv.flow == "source_to_target"

    def forward(
        self, x: Tensor, edge_index: Graph, size: Any = None, edge_weight: Tensor | None = None
    ) -> Tensor:
        """``[n, m, k]`` or shared ``[n, k]`` -> ``[n, m, o]``."""
        assert edge_weight is None, "they are part of the matrices"
        graph = edge_index
        if self.lin is None and self.by_matrix and _has_matrices(graph):
            out = self.narrow_side_first(x, graph, self.lin_l)
            if self.lin_r is not None:
                out = out + self.own(x, graph, cast(GroupedLinear, self.lin_r))
            out = add_bias(out, self.lin_l.bias)
        else:
            sources = x if self.lin is None else self.lin(x).relu()
            aggregated = self._aggregate(_flat(sources), graph, size)
            out = self.lin_l(aggregated.view(-1, *sources.shape[1:]))
            if self.lin_r is not None:
                out = out + self.lin_r(x)
        return F.normalize(out, dim=-1) if self.normalize else out

    def _aggregate(self, x: Tensor, graph: Graph, size: Any) -> Tensor:
        if self.by_matrix and _has_matrices(graph):
            return cast(Tensor, graph.propagate(self.form, x))
        return cast(Tensor, self.twin(x, _edges(graph), size))


class GroupedSAGEConcatConv(_Propagating):
    """m GraphSAGE layers with one weight on ``[x_i, mean_j x_j]``."""

    form = "mean"

    def __init__(self, conv: Any, grouping: Grouping) -> None:
        super().__init__(SimpleConv(aggr="mean"))
        self.lin = cast(GroupedLinear, grouping.layer(conv.lin))
        self.width = conv.lin.weight.size(1) // 2

    def forward(self, x: Tensor, edge_index: Graph, edge_weight: Tensor | None = None) -> Tensor:
        """``[n, m, k]`` or shared ``[n, k]`` -> ``[n, m, o]``."""
        assert edge_weight is None, "they are part of the matrices"
        if not _has_matrices(edge_index):
            mean = self.twin(_flat(x), edge_index).view(x.shape)
            return cast(Tensor, self.lin(torch.cat([x, mean], dim=-1)))
        neighbours = slice(self.width, None)
        out = self.narrow_side_first(x, edge_index, self.lin, columns=neighbours)
        out = out + self.own(x, edge_index, self.lin, columns=slice(self.width))
        return add_bias(out, self.lin.bias)


class GroupedGINConv(_Grouped):
    """m graph isomorphism layers ``nn((1 + eps) x_i + sum_j x_j)`` (Xu et al., 2019)."""

    eps: Tensor

    def __init__(self, conv: Any, grouping: Grouping) -> None:
        super().__init__(_messages_of(conv, nn=nn.Identity()))
        self.nn = grouping.layer(conv.nn)
        grouping.tensor_of(conv, "eps", self)
        self.twin.eps = None  # only its message passing is used
        self.by_matrix = conv.aggr in ("add", "sum") and conv.flow == "source_to_target"

    def forward(self, x: Tensor, edge_index: Graph, size: Any = None) -> Tensor:
        """``[n, m, k]`` or shared ``[n, k]`` -> ``[n, m, o]``."""
        graph, flat = edge_index, _flat(x)
        if _has_matrices(graph) and self.by_matrix:
            out = graph.propagate("sum", flat).view(-1, *x.shape[1:])
            x = graph.propagate("identity", x)
        else:
            out = self.twin.propagate(_edges(graph), x=(flat, flat), size=size).view(x.shape)
        if x.dim() == 2 and not isinstance(self.eps, nn.Parameter):
            return cast(Tensor, self.nn(out + (1 + self.eps[0]) * x))  # a constant, shared
        if x.dim() == 2:
            out, x = out.unsqueeze(1), x.unsqueeze(1)
        return cast(Tensor, self.nn(out + (1 + self.eps) * x))


class GroupedAttentionConv(_Grouped):
    """m attention layers of ``H`` heads are one of ``m * H`` heads (GAT, GATv2).

    Args:
        conv: The PyG layer.
        grouping: Of its model.
        projections: Names of its linears to ``H * C`` features; those that are None are left out.
        attention: Names of its attention vectors ``[1, H, C]``.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        conv: Any,
        grouping: Grouping,
        projections: tuple[str, ...],
        attention: tuple[str, ...],
    ) -> None:
        self.heads, self.channels = conv.heads, conv.out_channels
        present = tuple(name for name in projections if getattr(conv, name) is not None)
        vectors = tuple(name for name in attention if getattr(conv, name) is not None)
        super().__init__(
            _messages_of(conv, heads=grouping.num_subnets * conv.heads, concat=True, bias=None)
        )
        twin = self._twin[0]
        twin.res = None
        for name in vectors:  # views of the parameters, set at each call
            delattr(twin, name)
        for name in present:
            self.add_module(name, grouping.layer(getattr(conv, name)))
            setattr(twin, name, _Given())
        for name in vectors:
            grouping.tensor_of(conv, name, self)
        self.lin_edge = None if conv.lin_edge is None else grouping.layer(conv.lin_edge)
        twin.lin_edge = None if self.lin_edge is None else _Flat(self.lin_edge)
        self.res = None if conv.res is None else grouping.layer(conv.res)
        grouping.tensor_of(conv, "bias", self)
        self.projections, self.attention, self.concat = present, vectors, conv.concat

    def forward(self, x: Tensor, edge_index: Graph, edge_attr: Any = None, size: Any = None) -> Any:
        """``[n, m, k]`` or shared ``[n, k]`` -> ``[n, m, H * C]``, or ``[n, m, C]`` averaged."""
        twin = self.twin
        done: dict[int, Tensor] = {}
        for name in self.projections:
            linear = getattr(self, name)
            if id(linear) not in done:
                done[id(linear)] = linear(x).flatten(1)
            getattr(twin, name).output = done[id(linear)]
        for name in self.attention:
            setattr(twin, name, getattr(self, name).view(1, -1, self.channels))
        out: Tensor = twin(_flat(x), _edges(edge_index), edge_attr)
        for name in self.projections:
            getattr(twin, name).output = None  # what autograd needs it keeps itself
        out = out.view(x.size(0), -1, self.heads, self.channels)
        out = out.flatten(2) if self.concat else out.mean(dim=2)
        if self.res is not None:
            out = out + self.res(x)
        return out if self.bias is None else out + self.bias


class _Flat(nn.Module):
    """A grouped layer whose outputs lie side by side: ``[e, k]`` -> ``[e, m * o]``."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Of all subnets."""
        out: Tensor = self.layer(x)
        return out.flatten(1)


class _Given(nn.Module):
    """Stands for a linear whose output was computed before."""

    output: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor | None:
        """What was computed."""
        return self.output
