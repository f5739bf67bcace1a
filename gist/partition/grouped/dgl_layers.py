"""Grouped forms of DGL's layers: one product by its kernels for all subnets.

Shape legend: ``n`` nodes, ``e`` edges, ``m`` subnets, ``k`` input features and ``o`` output
features of one, ``H`` heads and ``C`` channels of one; see :mod:`gist.partition.grouped.grouping`.

Attention puts out ``[n, m, H, C]`` where one subnet puts out ``[n, H, C]``, so a model that counts
dims from the end, ``flatten(-2)`` or ``mean(-2)``, keeps the subnets apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import dgl
import dgl.function as fn
from dgl.nn import GraphConv
from torch import Tensor, nn

from gist.partition.grouped.grouping import Grouping
from gist.partition.grouped.product import grouped_product

Graph = Any
"""A ``DGLGraph``."""


def _received(graph: Graph, x: Tensor, how: str, edge_weight: Tensor | None) -> Tensor:
    """The ``"sum"``, ``"mean"`` or ``"max"`` over in-neighbours: ``[n, ...] -> [n, ...]``."""
    message = fn.copy_u("x", "message")
    with graph.local_scope():
        graph.srcdata["x"] = x.flatten(1)
        if edge_weight is not None:
            graph.edata["weight"] = edge_weight
            message = fn.u_mul_e("x", "weight", "message")
        graph.update_all(message, getattr(fn, how)("message", "received"))
        return cast(Tensor, graph.dstdata["received"].view(x.shape))


def _project_where_narrow(
    x: Tensor, weight: Tensor, aggregate: Callable[[Tensor], Tensor]
) -> Tensor:
    """``aggregate(x) W^T``, ``[n, m, o]``, with the weight ``[m, o, k]`` on its narrower side."""
    m, outputs, inputs = weight.shape
    if inputs < m * outputs if x.dim() == 2 else inputs <= outputs:
        return grouped_product(aggregate(x), weight)
    return aggregate(grouped_product(x, weight))


def _then(out: Tensor, *steps: Any) -> Tensor:
    """Applies what a layer does with its output, of which any may be None."""
    for step in steps:
        out = out if step is None else step(out)
    return out


class _Grouped(nn.Module):
    """What makes the grouped form of the small parts of a layer."""

    takes_dgl_graph = True

    def take_parts(self, conv: nn.Module, grouping: Grouping, *names: str) -> None:
        """Modules in their grouped form; functions, and what is None, as they are."""
        for name in names:
            part = getattr(conv, name)
            setattr(self, name, grouping.layer(part) if isinstance(part, nn.Module) else part)


class GroupedGraphConv(_Grouped):
    """m graph convolutions, normalised as the layer has it (Kipf & Welling, 2017)."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    _activation: Any

    def __init__(self, conv: Any, grouping: Grouping) -> None:
        super().__init__()
        self._messages = GraphConv(
            conv._in_feats,
            conv._out_feats,
            norm=conv._norm,
            weight=False,
            bias=False,
            allow_zero_in_degree=conv._allow_zero_in_degree,
        )
        for name in ("weight", "bias"):
            grouping.tensor_of(conv, name, self)
        self.take_parts(conv, grouping, "_activation")

    def forward(self, graph: Graph, feat: Tensor, *, edge_weight: Tensor | None = None) -> Tensor:
        """``[n, m, k]`` or shared ``[n, k]`` -> ``[n, m, o]``."""

        def aggregate(x: Tensor) -> Tensor:
            return cast(Tensor, self._messages(graph, x, edge_weight=edge_weight))

        if self.weight is None:
            out = aggregate(feat)
        else:
            out = _project_where_narrow(feat, self.weight.transpose(1, 2), aggregate)
        if self.bias is not None:
            out = (out if out.dim() == 3 else out.unsqueeze(1)) + self.bias
        return _then(out, self._activation)


class GroupedSAGEConv(_Grouped):
    """m GraphSAGE layers (Hamilton et al., 2017), by mean, maximum or with the node itself."""

    bias: nn.Parameter | None
    feat_drop: nn.Module
    fc_neigh: Any
    fc_self: Any
    fc_pool: Any
    activation: Any
    norm: Any

    def __init__(self, conv: Any, grouping: Grouping) -> None:
        super().__init__()
        self.aggregator = conv._aggre_type
        linears = {"mean": ("fc_self",), "pool": ("fc_pool", "fc_self"), "gcn": ()}
        self.take_parts(conv, grouping, *linears[self.aggregator], "fc_neigh")
        if self.aggregator == "gcn":
            grouping.tensor_of(conv, "bias", self)
        self.take_parts(conv, grouping, "feat_drop", "activation", "norm")

    def forward(self, graph: Graph, feat: Tensor, edge_weight: Tensor | None = None) -> Tensor:
        """``[n, m, k]`` or shared ``[n, k]`` -> ``[n, m, o]``."""
        x = self.feat_drop(feat)

        def mean(x: Tensor) -> Tensor:
            return _received(graph, x, "mean", edge_weight)

        def mean_with_itself(x: Tensor) -> Tensor:
            degree: Tensor = graph.in_degrees().to(x).view(-1, *[1] * (x.dim() - 1))
            return (_received(graph, x, "sum", edge_weight) + x) / (degree + 1)

        if self.aggregator == "pool":
            received = _received(graph, self.fc_pool(x).relu(), "max", edge_weight)
            out = self.fc_neigh(received) + self.fc_self(x)
        elif self.aggregator == "mean":
            out = _project_where_narrow(x, self.fc_neigh.weight, mean) + self.fc_self(x)
        else:
            out = _project_where_narrow(x, self.fc_neigh.weight, mean_with_itself)
            out = out if self.bias is None else out + self.bias
        return _then(out, self.activation, self.norm)


class _GroupedAttention(_Grouped):
    """m attention layers of ``H`` heads are one of ``m * H`` heads.

    Args:
        conv: The layer.
        grouping: Of its model.
        linears: Names of its linears to ``H * C`` features.
        vectors: Names of its attention vectors ``[1, H, C]``.
    """

    feat_drop: nn.Module
    attn_drop: nn.Module
    bias: nn.Parameter | None
    res_fc: Any
    activation: Any

    def __init__(
        self, conv: Any, grouping: Grouping, linears: tuple[str, ...], vectors: tuple[str, ...]
    ) -> None:
        super().__init__()
        self.heads, self.channels = conv._num_heads, conv._out_feats
        self.leaky_relu = conv.leaky_relu
        self.take_parts(conv, grouping, *linears, "feat_drop", "attn_drop", "activation")
        for name in vectors:
            grouping.tensor_of(conv, name, self)
        has_weight = isinstance(conv.res_fc, nn.Linear)
        self.res_fc = grouping.layer(conv.res_fc) if has_weight else conv.res_fc

    def by_head(self, linear: nn.Module, x: Tensor) -> Tensor:
        """Projected features of all subnets: ``[n, m * H, C]``."""
        return cast(Tensor, linear(x).view(len(x), -1, self.channels))

    def attend(
        self,
        graph: Graph,
        x: Tensor,
        sources: Tensor,
        scores: Tensor,
        edge_weight: Tensor | None = None,
    ) -> Tensor:
        """The mean of what neighbours send, by attention, and what follows: ``[n, m, H, C]``.

        Args:
            graph: The graph.
            x: Input of the layer.
            sources: ``[n, m * H, C]``: what nodes send.
            scores: ``[e, m * H, 1]``: of edges, before the softmax.
            edge_weight: ``[e]``, factors of what is sent.
        """
        attention = self.attn_drop(dgl.ops.edge_softmax(graph, scores))
        if edge_weight is not None:
            attention = attention * edge_weight.view(-1, 1, 1)
        out = dgl.ops.u_mul_e_sum(graph, sources, attention)
        out = out.view(len(x), -1, self.heads, self.channels)
        if self.res_fc is not None:
            out = out + self.res_fc(x).reshape(len(x), -1, self.heads, self.channels)
        if self.bias is not None:
            out = out + self.bias.view(-1, self.heads, self.channels)
        if isinstance(self.activation, nn.Module):  # whose grouped form takes [n, m, k]
            return cast(Tensor, self.activation(out.flatten(2)).view(out.shape))
        return cast(Tensor, self.activation(out) if self.activation else out)


class GroupedGATConv(_GroupedAttention):
    """m layers of graph attention (Veličković et al., 2018), with one linear each."""

    fc: nn.Module
    attn_l: nn.Parameter
    attn_r: nn.Parameter

    def __init__(self, conv: Any, grouping: Grouping) -> None:
        super().__init__(conv, grouping, ("fc",), ("attn_l", "attn_r", "bias"))

    def forward(self, graph: Graph, feat: Tensor, edge_weight: Tensor | None = None) -> Tensor:
        """``[n, m, k]`` or shared ``[n, k]`` -> ``[n, m, H, C]``."""
        x = self.feat_drop(feat)
        sent = self.by_head(self.fc, x)
        left, right = (
            (sent * vector.view(1, -1, self.channels)).sum(dim=-1, keepdim=True)
            for vector in (self.attn_l, self.attn_r)
        )
        scores = self.leaky_relu(dgl.ops.u_add_v(graph, left, right))
        return self.attend(graph, x, sent, scores, edge_weight)


class GroupedGATv2Conv(_GroupedAttention):
    """m layers of graph attention with dynamic scores (Brody et al., 2022)."""

    fc_src: nn.Module
    fc_dst: nn.Module
    attn: nn.Parameter

    def __init__(self, conv: Any, grouping: Grouping) -> None:
        super().__init__(conv, grouping, ("fc_src", "fc_dst"), ("attn",))
        self.register_parameter("bias", None)  # its linears have them

    def forward(self, graph: Graph, feat: Tensor) -> Tensor:
        """``[n, m, k]`` or shared ``[n, k]`` -> ``[n, m, H, C]``."""
        x = self.feat_drop(feat)
        sent = asked = self.by_head(self.fc_src, x)
        if self.fc_dst is not self.fc_src:
            asked = self.by_head(self.fc_dst, x)
        scores = self.leaky_relu(dgl.ops.u_add_v(graph, sent, asked))
        scores = (scores * self.attn.view(1, -1, self.channels)).sum(dim=-1, keepdim=True)
        return self.attend(graph, x, sent, scores)


class GroupedGINConv(_Grouped):
    """m graph isomorphism layers ``f((1 + eps) x_i + agg_j x_j)`` (Xu et al., 2019)."""

    eps: Tensor
    apply_func: Any
    activation: Any

    def __init__(self, conv: Any, grouping: Grouping) -> None:
        super().__init__()
        self.aggregator = conv._aggregator_type
        grouping.tensor_of(conv, "eps", self)
        self.take_parts(conv, grouping, "apply_func", "activation")

    def forward(self, graph: Graph, feat: Tensor, edge_weight: Tensor | None = None) -> Tensor:
        """``[n, m, k]`` or shared ``[n, k]`` -> ``[n, m, o]``."""
        received = _received(graph, feat, self.aggregator, edge_weight)
        if feat.dim() == 3:
            out = (1 + self.eps) * feat + received
        elif isinstance(self.eps, nn.Parameter):
            out = (1 + self.eps) * feat.unsqueeze(1) + received.unsqueeze(1)
        else:  # a constant, shared
            out = (1 + self.eps[0]) * feat + received
        return _then(out, self.apply_func, self.activation)
