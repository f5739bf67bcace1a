"""How each type of convolution is computed block by block: a registry, and PyG's convolutions.

As with the rules of the partition engine, a type is registered exactly: a subclass may compute
something else.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg
from torch import Tensor, nn
from torch_geometric.nn.conv.gcn_conv import gcn_norm
from torch_geometric.utils import add_self_loops, remove_self_loops

from gist.graph.adjacency import Adjacency, Form
from gist.graph.attention import Attention
from gist.graph.blockwise import Aggregation, Blockwise, Neighbourhood, Product
from gist.graph.rowwise import RowFunction, is_row_wise
from gist.graph.sparse import CSR
from gist.partition.rules.pyg import ELEMENTWISE_AGGREGATIONS

Maker = Callable[[Adjacency, Tensor], Blockwise]
"""Makes one convolution's form for a graph, and a tensor like its input: dtype, device, width."""

SUMS: dict[Any, Form] = {"mean": "mean", "add": "sum", "sum": "sum"}
"""Aggregations that are products with a matrix."""

_BLOCKWISE: dict[type[nn.Module], Callable[[Any], Maker | None]] = {}

_T = TypeVar("_T", bound=Callable[[Any], Maker | None])


def register_blockwise(*conv_types: type[nn.Module]) -> Callable[[_T], _T]:
    """Registers how convolutions of exactly these types are computed block by block.

    The decorated function takes the convolution and returns what makes its form for a graph, or
    None where this one has no form.
    """

    def register(function: _T) -> _T:
        _BLOCKWISE.update(dict.fromkeys(conv_types, function))
        return function

    return register


def find_blockwise(conv: nn.Module) -> Maker | None:
    """What makes the form of a convolution; None where it has none."""
    function = _BLOCKWISE.get(type(conv))
    return None if function is None else function(conv)


_kept: WeakKeyDictionary[Adjacency, dict[Hashable, Any]] = WeakKeyDictionary()

_V = TypeVar("_V")


def _once(graph: Adjacency, key: Hashable, build: Callable[[], _V]) -> _V:
    """What is built of a graph on first use and kept as long as the graph lives."""
    kept = _kept.setdefault(graph, {})
    if key not in kept:
        kept[key] = build()
    value: _V = kept[key]
    return value


def directed(graph: Adjacency, conv: Any) -> Adjacency:
    """The graph whose rows hold the edges that a convolution gathers from."""
    if not is_flipped(conv):
        return graph
    flip = partial(Adjacency, graph.edge_index.flip(0), graph.num_nodes, graph.edge_weight)
    return _once(graph, "flipped", flip)


def is_flipped(conv: Any) -> bool:
    """Whether a convolution gathers from the nodes that edges lead to."""
    return bool(conv.flow == "target_to_source")


@register_blockwise(pyg.GCNConv)
def blockwise_gcn(conv: Any) -> Maker | None:
    """``Â X Wᵀ + b`` (Kipf & Welling, 2017), with every normalisation that PyG has."""
    if conv.aggr not in SUMS:
        return None  # not linear, and normalised by degrees that a block does not know

    def make(graph: Adjacency, x: Tensor) -> Blockwise:
        matrix = _gcn_matrix(conv, graph, x.dtype)
        return Product(matrix=matrix, weight=conv.lin.weight, bias=conv.bias)

    return make


def _gcn_matrix(conv: Any, graph: Adjacency, dtype: torch.dtype) -> CSR:
    usual = conv.normalize and conv.add_self_loops and not conv.improved
    if usual and conv.aggr != "mean" and not is_flipped(conv):
        return graph.matrix("gcn", dtype).rows
    settings = (conv.normalize, conv.improved, conv.add_self_loops, conv.flow)

    def build() -> CSR:
        index, weight = graph.edge_index, graph.edge_weight
        if conv.normalize:
            index, weight = gcn_norm(
                index, weight, graph.num_nodes, conv.improved, conv.add_self_loops, conv.flow, dtype
            )
        index = index.flip(0) if is_flipped(conv) else index
        indptr, indices, weight, _ = Adjacency(index, graph.num_nodes, weight).rows
        values = torch.ones_like(indices, dtype=dtype) if weight is None else weight
        if conv.aggr == "mean":
            counts = indptr.diff()
            shares = counts.clamp(min=1).to(dtype).reciprocal()
            values = values * shares.repeat_interleave(counts, output_size=values.numel())
        return CSR(indptr, indices, values, graph.num_nodes)

    return _once(graph, ("gcn", *settings, conv.aggr == "mean", dtype), build)


@register_blockwise(pyg.SAGEConv)
def blockwise_sage(conv: Any) -> Maker | None:
    """``W_l aggr_j x_j + W_r x_i + b`` (Hamilton et al., 2017), for any elementwise aggregation."""
    if conv.aggr not in SUMS or (conv.project and is_flipped(conv)):
        return _one_hop(conv)

    def make(graph: Adjacency, x: Tensor) -> Blockwise:
        before = None
        if conv.project:
            before = RowFunction([conv.lin, torch.relu], x.size(1), x)
        normalize = partial(F.normalize, p=2.0, dim=-1)
        return Product(
            matrix=directed(graph, conv).matrix(SUMS[conv.aggr], x.dtype).rows,
            weight=conv.lin_l.weight,
            root=conv.lin_r.weight if conv.root_weight else None,
            bias=conv.lin_l.bias,
            before=before,
            after=(normalize,) if conv.normalize else (),
        )

    return make


@register_blockwise(pyg.GINConv)
def blockwise_gin(conv: Any) -> Maker | None:
    """``g(Σ_j x_j + (1 + ε) x_i)`` (Xu et al., 2019)."""
    if not is_row_wise(conv.nn):
        return None
    if conv.aggr not in SUMS:
        return _one_hop(conv)

    def make(graph: Adjacency, x: Tensor) -> Blockwise:
        return Aggregation(
            matrix=directed(graph, conv).matrix(SUMS[conv.aggr], x.dtype).rows,
            eps=1 + conv.eps.detach(),
            network=RowFunction([conv.nn], x.size(1), x),
            width=x.size(1),
        )

    return make


@register_blockwise(pyg.GATConv, pyg.GATv2Conv)
def blockwise_attention(conv: Any) -> Maker | None:
    """Graph attention (Veličković et al., 2018; Brody et al., 2022)."""
    if isinstance(conv.in_channels, tuple | list):
        return None
    if conv.aggr not in ("add", "sum") or is_flipped(conv):
        return None if conv.lin_edge is not None else _one_hop(conv)

    def make(graph: Adjacency, x: Tensor) -> Blockwise:
        pattern: Form = "gcn" if conv.add_self_loops else "sum"
        attr = _attention_attr(conv, graph)
        return Attention(conv, graph.matrix(pattern, x.dtype).rows, x.size(1), attr=attr)

    return make


def _attention_attr(conv: Any, graph: Adjacency) -> Tensor | None:
    """Features of the edges that a layer attends over, in the order of its matrix."""
    if conv.lin_edge is None or graph.rows.attr is None:
        return None
    if not conv.add_self_loops:
        return graph.rows.attr

    def build() -> Tensor:
        by_row = Adjacency.from_csr(*graph.rows)
        index, attr = remove_self_loops(by_row.edge_index, by_row.edge_attr)
        index, attr = add_self_loops(index, attr, conv.fill_value, graph.num_nodes)
        # The loops were added at the end; in the matrix each is the last entry of its row.
        in_rows: Tensor = attr.index_select(0, torch.argsort(index[1], stable=True))
        return in_rows

    return _once(graph, ("attr", str(conv.fill_value)), build)


def _one_hop(conv: Any) -> Maker | None:
    """Runs the convolution as it is, on blocks, unless a node may take more than its edges tell."""
    if conv.aggr not in ELEMENTWISE_AGGREGATIONS:
        return None
    return lambda graph, x: Neighbourhood(conv, directed(graph, conv), x)
