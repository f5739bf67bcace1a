"""PyTorch Geometric's convolutions, multiplying with a cached sparse matrix where they can.

Each class is its PyG parent: same parameters, same state dict, same result. Given an
:class:`~gist.graph.adjacency.Adjacency` instead of an ``edge_index``, the forward pass is a sparse
product with a normalisation that was computed once, on the narrower side of the weight.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg
from torch import Tensor, nn

from gist.errors import DataError
from gist.graph.adjacency import Adjacency, Form
from gist.graph.blockwise import Product
from gist.graph.blockwise_rules import Maker, blockwise_gcn, blockwise_sage, register_blockwise
from gist.graph.stages import ConvStage, as_registered, gcn_stages, register_stages, sage_stages
from gist.partition.builder import Layer
from gist.partition.grouped.grouping import Grouping
from gist.partition.grouped.pyg import GroupedSAGEConcatConv
from gist.partition.rules.pyg import GCNConvRule, SAGEConvRule
from gist.partition.rules.registry import Rule, register_rule
from gist.partition.spec import Axis

Graph = Adjacency | Tensor
"""An :class:`Adjacency`, or whatever PyG's layers take as ``edge_index``."""


def _weighted(edges: Graph, weight: Tensor | None, x: Tensor) -> Adjacency:
    """The graph with its weights, which an :class:`Adjacency` has already.

    Raises:
        DataError: they are given twice.
    """
    if not isinstance(edges, Adjacency):
        return Adjacency(edges, x.size(0), weight)
    if weight is not None:
        raise DataError(
            "edge weights are given twice",
            got="an Adjacency and edge_weight",
            remedy="put the weights into the Adjacency",
        )
    return edges


class GCNConv(pyg.GCNConv):  # type: ignore[misc]  # PyG is untyped
    """``Â X Wᵀ + b`` (Kipf & Welling, 2017), with ``Â`` from the adjacency where one is given.

    Takes the arguments of :class:`torch_geometric.nn.GCNConv`.

    Shapes:
        ``x`` [N, in_channels] -> [N, out_channels].
    """

    @property
    def form(self) -> Form | None:
        """The matrix that it multiplies with; None where it passes messages, as PyG does."""
        plain = self.normalize and self.add_self_loops and not self.improved
        plain = plain and self.aggr == "add" and self.flow == "source_to_target"
        return "gcn" if plain else None

    def forward(self, x: Tensor, edge_index: Graph, edge_weight: Tensor | None = None) -> Tensor:
        """Convolves ``x`` over the graph; edge weights are part of an adjacency."""
        # PyG reads the signature of its message passing from the next comment.
        # propagate_type: (x: Tensor, edge_weight: OptTensor)
        out: Tensor
        if not isinstance(edge_index, Adjacency):
            out = super().forward(x, edge_index, edge_weight)
            return out
        graph = _weighted(edge_index, edge_weight, x)
        if self.form is None:
            out = super().forward(x, graph.edge_index, graph.edge_weight)
            return out
        if graph.is_constant(x) or self.in_channels < self.out_channels:
            return graph.project("gcn", x, self.lin.weight, self.bias)
        out = graph.propagate("gcn", self.lin(x))
        return out if self.bias is None else out + self.bias


class SAGEConv(pyg.SAGEConv):  # type: ignore[misc]  # PyG is untyped
    """``W_r x_i + W_l mean_j x_j + b`` (Hamilton et al., 2017).

    Takes the arguments of :class:`torch_geometric.nn.SAGEConv`. On weighted edges, which PyG's does
    not take, the mean is ``Σ_j w_ij x_j / Σ_j w_ij``.

    Shapes:
        ``x`` [N, in_channels] -> [N, out_channels].
    """

    @property
    def form(self) -> Form | None:
        """The matrix that it multiplies with; None where it passes messages, as PyG does."""
        plain = self.aggr == "mean" and self.flow == "source_to_target" and not self.project
        return "mean" if plain else None

    def forward(
        self, x: Tensor, edge_index: Graph, size: Any = None, edge_weight: Tensor | None = None
    ) -> Tensor:
        """Convolves ``x`` over the graph; edge weights are part of an adjacency.

        Raises:
            DataError: weights for an aggregation other than the mean, or given twice.
        """
        # PyG reads the signature of its message passing from the next comment.
        # propagate_type: (x: OptPairTensor)
        out: Tensor
        if not isinstance(edge_index, Adjacency) and edge_weight is None:
            out = super().forward(x, edge_index, size)
            return out
        graph = _weighted(edge_index, edge_weight, x)
        if self.form is None:
            if graph.is_weighted:
                raise DataError(
                    "SAGEConv takes edge weights for a mean alone",
                    got=f"aggr={self.aggr!r}, project={self.project}, flow={self.flow!r}",
                    remedy="use aggr='mean', or drop the weights",
                )
            out = super().forward(x, graph.edge_index, size)
            return out
        weight, bias = self.lin_l.weight, self.lin_l.bias
        if graph.is_constant(x) or self.lin_l.in_channels <= self.out_channels:
            out = graph.project("mean", x, weight, bias)
        else:
            out = graph.propagate("mean", F.linear(x, weight))
            out = out if bias is None else out + bias
        if self.root_weight:
            out = out + graph.project("identity", x, self.lin_r.weight)
        return F.normalize(out, dim=-1) if self.normalize else out


class SAGEConcatConv(nn.Module):
    """``W [x_i, mean_j x_j] + b``: GraphSAGE as in the GIST paper, with one weight.

    On weighted edges the mean is ``Σ_j w_ij x_j / Σ_j w_ij``. A hidden unit owns two columns of the
    next layer's weight: its own and its neighbourhood's.

    Args:
        in_channels: Width of the input.
        out_channels: Width of the output.
        bias: Whether to add a bias.

    Shapes:
        ``x`` [N, in_channels] -> [N, out_channels]; weight [out_channels, 2 * in_channels].
    """

    form: Form = "mean"

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.lin = nn.Linear(2 * in_channels, out_channels, bias=bias)

    def reset_parameters(self) -> None:
        """Draws new parameters."""
        self.lin.reset_parameters()

    def forward(self, x: Tensor, edge_index: Graph, edge_weight: Tensor | None = None) -> Tensor:
        """Convolves ``x`` over the graph; edge weights are part of an adjacency."""
        graph = _weighted(edge_index, edge_weight, x)
        if graph.is_constant(x):
            own, neighbours = torch.split(self.lin.weight, self.in_channels, dim=1)
            out = graph.project("mean", x, neighbours, self.lin.bias)
            return out + graph.project("identity", x, own)
        own = graph.propagate("identity", x)
        out = torch.cat([own, graph.propagate("mean", x)], dim=-1)
        return F.linear(out, self.lin.weight, self.lin.bias)

    def extra_repr(self) -> str:
        """Widths, for printing."""
        return f"{self.in_channels}, {self.out_channels}"


register_rule(GCNConv)(GCNConvRule)
register_rule(SAGEConv)(SAGEConvRule)
register_blockwise(GCNConv)(blockwise_gcn)
register_blockwise(SAGEConv)(blockwise_sage)
register_stages(GCNConv)(gcn_stages)
register_stages(SAGEConv)(sage_stages)


@register_blockwise(SAGEConcatConv)
def blockwise_sage_concat(conv: SAGEConcatConv) -> Maker:
    """The two halves of its weight as two weights."""

    def make(graph: Adjacency, x: Tensor) -> Product:
        own, neighbours = torch.split(conv.lin.weight, conv.in_channels, dim=1)
        matrix = graph.matrix("mean", x.dtype).rows
        return Product(matrix=matrix, weight=neighbours, root=own, bias=conv.lin.bias)

    return make


@register_stages(SAGEConcatConv)
def sage_concat_stages(conv: SAGEConcatConv) -> list[ConvStage]:
    """One: a column has a row of the weight."""
    cut, width = tuple(conv.parameters()), conv.out_channels
    return [ConvStage(module=conv, cut=cut, width=width, make=as_registered)]


@register_rule(SAGEConcatConv)
class SAGEConcatConvRule(Rule):
    """A unit owns two columns of the weight: ``u`` and ``u + in_channels``."""

    contracts = True

    def connect(self, layer: Layer) -> Axis | None:
        """See :meth:`Rule.connect`."""
        inp = layer.expect_input(layer.module.in_channels)
        out = layer.produce(layer.module.out_channels)
        layer.follow("lin.weight", (0, out), (1, None if inp is None else inp.repeat(2)))
        layer.follow("lin.bias", (0, out))
        return out

    def resize(self, module: Any, input: int | None, output: int | None) -> None:
        """See :meth:`Rule.resize`."""
        linear = module.lin
        linear.out_features, linear.in_features = linear.weight.shape
        module.out_channels, module.in_channels = linear.out_features, linear.in_features // 2

    def grouped(self, module: Any, grouping: Grouping) -> nn.Module | None:
        """See :meth:`Rule.grouped`."""
        return GroupedSAGEConcatConv(module, grouping)
