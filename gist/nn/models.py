"""Reference graph networks: PyG's model zoo on the faster convolutions of :mod:`gist.nn.conv`."""

from __future__ import annotations

from typing import Any, Literal

import torch_geometric.nn.models as zoo
from torch import Tensor, nn
from torch_geometric.nn.resolver import normalization_resolver

from gist.errors import ConfigError
from gist.graph.adjacency import Adjacency
from gist.graph.edges import uses_edge_attr
from gist.graph.layerwise import register_composition
from gist.nn.conv import GCNConv, Graph, SAGEConcatConv, SAGEConv
from gist.nn.dropout import Dropout

Norm = nn.Module | str | None
Graphs = Graph | tuple[Adjacency, ...]


def _norm(norm: Norm, width: int) -> nn.Module | None:
    if norm is None or isinstance(norm, nn.Module):
        return norm
    if norm == "layer":  # without affine parameters, as in the GIST paper
        return nn.LayerNorm(width, elementwise_affine=False)
    if norm == "batch":
        return nn.BatchNorm1d(width)
    try:
        layer: nn.Module = normalization_resolver(norm, width)
    except ValueError as error:
        raise ConfigError(
            "unknown norm",
            got=repr(norm),
            expected="'layer', 'batch', None, a module, or a name that PyG knows",
        ) from error
    return layer


class _Layered:
    """A forward pass over one graph, or over one graph per layer, as layer sampling gives them."""

    num_layers: int
    convs: nn.ModuleList
    norms: nn.ModuleList
    jk_mode: str | None
    act: Any
    act_first: bool
    dropout: nn.Module

    def forward(self, x: Tensor, edge_index: Graphs, *args: Any, **kwargs: Any) -> Tensor:
        """Scores of every node, or of the last layer's targets.

        Args:
            x: ``[N, in_channels]``; of the first layer's sources where layers are sampled.
            edge_index: An ``Adjacency``; one for each layer, first layer first; or what PyG's
                models take.
            *args: Further arguments of PyG's models.
            **kwargs: Further arguments of PyG's models.

        Raises:
            ConfigError: a wrong number of graphs, or graphs per layer together with jumping
                knowledge, which joins what every layer says about the same nodes.
        """
        if not isinstance(edge_index, tuple):
            out: Tensor = super().forward(x, edge_index, *args, **kwargs)  # type: ignore[misc]
            return out
        name, graphs = type(self).__name__, edge_index
        if len(graphs) != self.num_layers:
            raise ConfigError(
                f"{name} needs one graph per layer",
                got=f"{len(graphs)} graphs",
                expected=f"{self.num_layers}",
                remedy="sample as many layers as the model has",
            )
        if self.jk_mode is not None:
            raise ConfigError(
                f"{name} with jumping knowledge needs the same nodes in every layer",
                got=f"one graph per layer, jk={self.jk_mode!r}",
                remedy="use jk=None, or clusters as batches",
            )
        for i, (conv, norm, graph) in enumerate(zip(self.convs, self.norms, graphs, strict=True)):
            x = conv(x, graph)
            if i < self.num_layers - 1:
                x = self.act(x) if self.act is not None and self.act_first else x
                x = norm(x)
                x = self.act(x) if self.act is not None and not self.act_first else x
                x = self.dropout(x)
        return x


@register_composition
class GCN(_Layered, zoo.GCN):  # type: ignore[misc]  # PyG is untyped
    """Graph convolutional network (Kipf & Welling, 2017), any depth.

    Between layers: convolution, normalisation, activation, dropout, as in PyG's ``GCN``, whose
    state dict and call it shares. ``forward(x, graph)`` also takes an ``Adjacency``, or a tuple
    with one for each layer.

    Args:
        in_channels: Input features.
        hidden_channels: Width of every hidden layer.
        out_channels: Outputs per node.
        num_layers: Number of convolutions.
        dropout: Probability after every hidden layer.
        norm: ``"layer"`` (without affine parameters, as in the GIST paper), ``"batch"``, None, or
            what PyG's models take: a module or a name such as ``"batch_norm"``.
        **kwargs: Further arguments of :class:`torch_geometric.nn.models.GCN` (``act``, ``jk``, …).

    Shapes:
        ``x`` [N, in_channels] -> [N, out_channels].
    """

    accepts_adjacency = True

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        out_channels: int,
        num_layers: int = 2,
        *,
        dropout: float = 0.5,
        norm: Norm = "layer",
        **kwargs: Any,
    ) -> None:
        norm_layer = _norm(norm, hidden_channels)
        super().__init__(
            in_channels,
            hidden_channels,
            num_layers,
            out_channels,
            dropout,
            norm=norm_layer,
            **kwargs,
        )
        self.dropout = Dropout(dropout)

    def init_conv(self, in_channels: int, out_channels: int, **kwargs: Any) -> nn.Module:
        """One convolution."""
        return GCNConv(in_channels, out_channels, **kwargs)


@register_composition
class GraphSAGE(_Layered, zoo.GraphSAGE):  # type: ignore[misc]  # PyG is untyped
    """GraphSAGE with mean aggregation (Hamilton et al., 2017), any depth.

    ``forward(x, graph)`` also takes an ``Adjacency``, or a tuple with one for each layer.

    Args:
        in_channels: Input features.
        hidden_channels: Width of every hidden layer.
        out_channels: Outputs per node.
        num_layers: Number of convolutions.
        dropout: Probability after every hidden layer.
        norm: ``"layer"`` (without affine parameters, as in the GIST paper), ``"batch"``, None, or
            what PyG's models take: a module or a name such as ``"batch_norm"``.
        concat: True concatenates ``[h, mean of h]`` under one weight, as the GIST paper does; False
            has two weights, as PyG does, and PyG's state dict.
        **kwargs: Further arguments of :class:`torch_geometric.nn.models.GraphSAGE`.

    Shapes:
        ``x`` [N, in_channels] -> [N, out_channels].
    """

    accepts_adjacency = True

    @property
    def supports_edge_weight(self) -> bool:  # a constant in PyG
        """Whether all of its convolutions take a mean, which may be weighted."""
        return all(conv.form is not None for conv in self.convs)

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        out_channels: int,
        num_layers: int = 2,
        *,
        dropout: float = 0.5,
        norm: Norm = "layer",
        concat: bool = False,
        **kwargs: Any,
    ) -> None:
        self._concat = concat
        norm_layer = _norm(norm, hidden_channels)
        super().__init__(
            in_channels,
            hidden_channels,
            num_layers,
            out_channels,
            dropout,
            norm=norm_layer,
            **kwargs,
        )
        self.dropout = Dropout(dropout)

    def init_conv(self, in_channels: Any, out_channels: int, **kwargs: Any) -> nn.Module:
        """One convolution."""
        if not self._concat:
            return SAGEConv(in_channels, out_channels, **kwargs)
        if not isinstance(in_channels, int) or kwargs.keys() - {"bias"}:
            raise ConfigError(
                "GraphSAGE(concat=True) has one weight for [h, mean of h] and no other options",
                got=f"in_channels={in_channels}, {', '.join(kwargs)}",
                expected="an int and at most bias",
                remedy="use concat=False",
            )
        return SAGEConcatConv(in_channels, out_channels, **kwargs)


@register_composition
class GAT(zoo.GAT):  # type: ignore[misc]  # PyG is untyped
    """Graph attention network (Veličković et al., 2018; with ``v2=True`` Brody et al., 2022).

    Args:
        in_channels: Input features.
        hidden_channels: Width of every hidden layer, heads times channels.
        out_channels: Outputs per node.
        num_layers: Number of convolutions.
        heads: Attention heads; concatenated in hidden layers, averaged in the last.
        units: What a subnet is dealt: ``"channels"`` within every head, or whole ``"heads"``.
        dropout: Probability after every hidden layer and on attention weights.
        norm: As for :class:`GCN`.
        **kwargs: Further arguments of :class:`torch_geometric.nn.models.GAT`; ``edge_dim=D`` for
            graphs whose edges have ``D`` features, which attention then depends on.

    Shapes:
        ``x`` [N, in_channels] -> [N, out_channels].
    """

    accepts_adjacency = True

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        out_channels: int,
        num_layers: int = 2,
        *,
        heads: int = 8,
        units: Literal["channels", "heads"] = "channels",
        dropout: float = 0.5,
        norm: Norm = "layer",
        **kwargs: Any,
    ) -> None:
        self.partition_units = units
        super().__init__(
            in_channels,
            hidden_channels,
            num_layers,
            out_channels,
            dropout,
            norm=_norm(norm, hidden_channels),
            heads=heads,
            **kwargs,
        )
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, edge_index: Graph, *args: Any, **kwargs: Any) -> Tensor:
        """Scores of every node.

        Raises:
            ConfigError: a graph per layer, which attention does not define.
        """
        if isinstance(edge_index, tuple):
            raise ConfigError(
                f"{type(self).__name__} cannot train on sampled layers: importance weights are "
                "those of a fixed matrix, and attention has none",
                got=f"{len(edge_index)} graphs, one per layer",
                remedy="use clusters, or a GCN or GraphSAGE of gist.nn",
            )
        if isinstance(edge_index, Adjacency):
            if uses_edge_attr(self):
                kwargs["edge_attr"] = edge_index.edge_attr
            edge_index = edge_index.edge_index
        out: Tensor = super().forward(x, edge_index, *args, **kwargs)
        return out
