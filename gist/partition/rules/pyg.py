"""Rules for the layers of PyTorch Geometric, and the wiring of its model zoo."""

from __future__ import annotations

from typing import Any

import torch_geometric.nn as pyg
from torch import Tensor, nn
from torch_geometric.nn.models import MLP
from torch_geometric.nn.models.basic_gnn import BasicGNN

from gist.errors import PartitionError
from gist.partition.builder import Layer, SpecBuilder
from gist.partition.grouped.grouping import Grouping
from gist.partition.grouped.layers import GroupedLayerNorm, GroupedLinear
from gist.partition.grouped.pyg import (
    GroupedAttentionConv,
    GroupedGCNConv,
    GroupedGINConv,
    GroupedSAGEConv,
)
from gist.partition.rules.registry import Rule, register_rule
from gist.partition.rules.torch import LayerNormRule, connect_chain
from gist.partition.spec import Axis

ELEMENTWISE_AGGREGATIONS = ("add", "sum", "mean", "min", "max", "mul", "var", "std", "median")


def _single_width(layer: Layer, in_channels: Any) -> int:
    widths = set(in_channels) if isinstance(in_channels, tuple | list) else {in_channels}
    if len(widths) > 1:
        layer.refuse(f"bipartite input of widths {in_channels} cannot be partitioned")
    return int(widths.pop())


def _require_elementwise_aggregation(layer: Layer) -> None:
    aggregation = layer.module.aggr
    if aggregation not in ELEMENTWISE_AGGREGATIONS:
        layer.refuse(
            f"aggregation {aggregation!r} mixes features or changes their number; "
            f"expected one of {', '.join(ELEMENTWISE_AGGREGATIONS)}"
        )


@register_rule(pyg.Linear)
class LinearRule(Rule):
    """``y = x Wᵀ + b``; a lazy one is refused by the spec builder."""

    contracts = True

    def connect(self, layer: Layer) -> Axis | None:
        """See :meth:`Rule.connect`."""
        linear = layer.module
        out = layer.produce(linear.out_channels)
        layer.follow("weight", (0, out), (1, layer.expect_input(linear.in_channels)))
        layer.follow("bias", (0, out))
        return out

    def resize(self, module: Any, input: int | None, output: int | None) -> None:
        """See :meth:`Rule.resize`."""
        module.out_channels, module.in_channels = module.weight.shape

    def grouped(self, module: Any, grouping: Grouping) -> nn.Module | None:
        """See :meth:`Rule.grouped`."""
        return GroupedLinear(module, grouping)


class _ConvRule(Rule):
    """What PyG's convolutions share: they sum over input features and know their widths."""

    contracts = True

    def resize(self, module: Any, input: int | None, output: int | None) -> None:
        """See :meth:`Rule.resize`."""
        if input is not None:
            pair = isinstance(module.in_channels, tuple | list)
            module.in_channels = (input, input) if pair else input
        if output is not None:
            module.out_channels = output


@register_rule(pyg.GCNConv)
class GCNConvRule(_ConvRule):
    """``ÂXW + b`` (Kipf & Welling, 2017): the bias sits on the convolution, not on its linear."""

    caches = ("_cached_edge_index", "_cached_adj_t")

    def connect(self, layer: Layer) -> Axis | None:
        """See :meth:`Rule.connect`."""
        _require_elementwise_aggregation(layer)
        out = layer.produce(layer.module.out_channels)
        layer.follow("lin.weight", (0, out), (1, layer.expect_input(layer.module.in_channels)))
        layer.follow("bias", (0, out))
        return out

    def grouped(self, module: Any, grouping: Grouping) -> nn.Module | None:
        """See :meth:`Rule.grouped`."""
        return GroupedGCNConv(module, grouping)


@register_rule(pyg.SAGEConv)
class SAGEConvRule(_ConvRule):
    """``W_r x_i + W_l mean_j x_j`` (Hamilton et al., 2017): both linears follow the same units."""

    def connect(self, layer: Layer) -> Axis | None:
        """See :meth:`Rule.connect`."""
        conv = layer.module
        _require_elementwise_aggregation(layer)
        inp = layer.expect_input(_single_width(layer, conv.in_channels))
        if conv.project:
            # The projected features are units of their own: each linear is a layer by itself.
            layer.contracts = False
            neighbours = layer.inner("lin", inp)
            out = layer.child("lin_l", neighbours, produces=True)
            if conv.root_weight:
                layer.child("lin_r", inp, produces=True)
            return out
        out = layer.produce(conv.out_channels)
        layer.follow("lin_l.weight", (0, out), (1, inp))
        layer.follow("lin_l.bias", (0, out))
        if conv.root_weight:
            layer.follow("lin_r.weight", (0, out), (1, inp))
        return out

    def grouped(self, module: Any, grouping: Grouping) -> nn.Module | None:
        """See :meth:`Rule.grouped`."""
        return GroupedSAGEConv(module, grouping)


class _AttentionRule(_ConvRule):
    """Heads x channels. Units are channels within every head (default), or whole heads.

    With ``concat=True`` the output is ``[N, H * C]``: a head owns a block of C positions, a channel
    one position in each of the H copies. With ``concat=False`` heads are averaged: channels are
    the output units; heads are units inside the layer, and a subnet averages those it holds.
    """

    projections: tuple[str, ...] = ()
    """Linears to ``H * C`` features; those that are None are passed over."""

    attention: tuple[str, ...] = ()
    """Vectors of shape ``[1, H, C]``."""

    def connect(self, layer: Layer) -> Axis | None:
        """See :meth:`Rule.connect`."""
        conv = layer.module
        heads, channels = conv.heads, conv.out_channels
        units = layer.units or "channels"
        if units not in ("heads", "channels"):
            layer.refuse(f"units of an attention layer are 'heads' or 'channels', not {units!r}")
        inp = layer.expect_input(_single_width(layer, conv.in_channels))

        per_head: Axis | None = None  # along [H] of the attention vectors
        per_channel: Axis | None = None  # along [C]
        flat: Axis | None = None  # along [H * C] of the linears
        out: Axis | None = None  # along the output features
        if units == "heads" and (layer.is_partitioned or layer.units):
            averaged = not conv.concat
            per_head = layer.group("heads", heads) if averaged else layer.produce(heads)
            flat = None if per_head is None else per_head.widen(channels)
            out = None if averaged else flat
        elif layer.is_partitioned:
            per_channel = layer.produce(channels)
            flat = None if per_channel is None else per_channel.repeat(heads)
            out = flat if conv.concat else per_channel

        for name in self.projections:
            if getattr(conv, name) is not None:
                layer.follow(f"{name}.weight", (0, flat), (1, inp))
                layer.follow(f"{name}.bias", (0, flat))
        for name in self.attention:
            layer.follow(name, (1, per_head), (2, per_channel))
        if conv.lin_edge is not None:
            layer.follow("lin_edge.weight", (0, flat))
        if conv.res is not None:
            layer.follow("res.weight", (0, out), (1, inp))
        layer.follow("bias", (0, out))
        return out

    def resize(self, module: Any, input: int | None, output: int | None) -> None:
        """See :meth:`Rule.resize`."""
        super().resize(module, input, None)
        _, module.heads, module.out_channels = getattr(module, self.attention[0]).shape

    def grouped(self, module: Any, grouping: Grouping) -> nn.Module | None:
        """See :meth:`Rule.grouped`."""
        return GroupedAttentionConv(module, grouping, self.projections, self.attention)

    def masked(self, module: Any, narrowed: Any, held: Tensor | None) -> nn.Module | None:
        """See :meth:`Rule.masked`: averaged heads are averaged over those held."""
        if module.concat or narrowed.heads == module.heads:
            return None
        return _MeanOfHeldHeads(module, module.heads / narrowed.heads)


class _MeanOfHeldHeads(nn.Module):
    """An averaging attention layer with heads switched off, averaged over the others."""

    def __init__(self, conv: Any, ratio: float) -> None:
        super().__init__()
        self.conv, self.ratio = conv, ratio

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Rescales the mean over heads, leaving residual and bias as they are."""
        rest = x.new_zeros(())
        if self.conv.bias is not None:
            rest = rest + self.conv.bias
        if self.conv.res is not None:
            rest = rest + self.conv.res(x)
        out: Tensor = self.conv(x, *args, **kwargs)
        return (out - rest) * self.ratio + rest


@register_rule(pyg.GATConv)
class GATConvRule(_AttentionRule):
    """Graph attention (Veličković et al., 2018)."""

    projections = ("lin", "lin_src", "lin_dst")
    attention = ("att_src", "att_dst", "att_edge")


@register_rule(pyg.GATv2Conv)
class GATv2ConvRule(_AttentionRule):
    """Graph attention with dynamic scores (Brody et al., 2022); shared weights stay shared."""

    projections = ("lin_l", "lin_r")
    attention = ("att",)


@register_rule(pyg.GINConv)
class GINConvRule(Rule):
    """``nn((1 + ε) x_i + Σ_j x_j)`` (Xu et al., 2019): aggregation keeps the features apart."""

    def produces(self, module: Any) -> bool:
        """See :meth:`Rule.produces`."""
        return True

    def connect(self, layer: Layer) -> Axis | None:
        """See :meth:`Rule.connect`. The inner network is connected by its own rule."""
        _require_elementwise_aggregation(layer)
        layer.follow("eps")
        return layer.child("nn", layer.input, produces=layer.is_partitioned)

    def grouped(self, module: Any, grouping: Grouping) -> nn.Module | None:
        """See :meth:`Rule.grouped`."""
        return GroupedGINConv(module, grouping)


@register_rule(MLP)
class MLPRule(Rule):
    """PyG's MLP: linears with norms and activations between; every inner layer is a unit group."""

    def produces(self, module: Any) -> bool:
        """See :meth:`Rule.produces`."""
        return True

    def connect(self, layer: Layer) -> Axis | None:
        """See :meth:`Rule.connect`."""
        mlp = layer.module
        names: list[str] = []
        for i in range(len(mlp.lins)):
            names.append(f"lins.{i}")
            if i < len(mlp.norms):
                names.append(f"norms.{i}")
        if isinstance(mlp.act, nn.Module):
            layer.child("act", None)
        return connect_chain(layer, names)

    def resize(self, module: Any, input: int | None, output: int | None) -> None:
        """See :meth:`Rule.resize`."""
        widths = [linear.weight.shape for linear in module.lins]
        module.channel_list = [widths[0][1], *(width[0] for width in widths)]

    def grouped(self, module: Any, grouping: Grouping) -> nn.Module | None:
        """See :meth:`Rule.grouped`."""
        return grouping.children(module)


@register_rule(pyg.BatchNorm)
class BatchNormRule(Rule):
    """A wrapper of ``torch.nn.BatchNorm1d``."""

    normalizes = True

    def connect(self, layer: Layer) -> Axis | None:
        """See :meth:`Rule.connect`."""
        return layer.child("module", layer.input)

    def resize(self, module: Any, input: int | None, output: int | None) -> None:
        """See :meth:`Rule.resize`."""
        if input is not None:
            module.in_channels = input

    def grouped(self, module: Any, grouping: Grouping) -> nn.Module | None:
        """See :meth:`Rule.grouped`."""
        return grouping.children(module)


@register_rule(pyg.LayerNorm)
class PyGLayerNormRule(LayerNormRule):
    """Normalises each node, or the whole graph, over the features a subnet holds."""

    def connect(self, layer: Layer) -> Axis | None:
        """See :meth:`Rule.connect`."""
        axis = layer.expect_input(layer.module.in_channels)
        layer.follow("weight", (0, axis))
        layer.follow("bias", (0, axis))
        return axis

    def resize(self, module: Any, input: int | None, output: int | None) -> None:
        """See :meth:`Rule.resize`."""
        if input is not None:
            module.in_channels = input

    def grouped(self, module: Any, grouping: Grouping) -> nn.Module | None:
        """See :meth:`Rule.grouped`."""
        if module.mode != "node":
            return None  # "graph": over the nodes too
        return GroupedLayerNorm(module, module.in_channels, grouping)


def wire_basic_gnn(model: BasicGNN, builder: SpecBuilder) -> None:
    """The wiring of PyG's ``BasicGNN`` family: GCN, GraphSAGE, GIN, GAT.

    Hidden layer ``i`` is unit group ``hidden.i``. Jumping knowledge ``"cat"`` lays the groups one
    after the other; ``"max"`` compares feature with feature, so all layers share one group.

    Raises:
        PartitionError: jumping knowledge ``"lstm"``, which mixes all units.
    """
    if model.jk_mode == "lstm":
        raise PartitionError(
            "jumping knowledge 'lstm' mixes the features of all layers and cannot be partitioned",
            expected="jk of None, 'last', 'cat' or 'max'",
        )
    units = getattr(model, "partition_units", None)
    axis: Axis | None = None
    hidden: list[Axis] = []
    for i in range(model.num_layers):
        last = i == model.num_layers - 1
        if last and model.jk_mode is None:
            builder.layer(f"convs.{i}", axis)
            break
        group = "hidden" if model.jk_mode == "max" else f"hidden.{i}"
        axis = builder.layer(f"convs.{i}", axis, produces=group, units=units)
        axis = builder.layer(f"norms.{i}", axis)
        if isinstance(model.act, nn.Module):
            builder.layer("act", axis)
        if axis is not None:
            hidden.append(axis)
    if model.jk_mode is not None:
        builder.layer("lin", Axis.concat(hidden) if model.jk_mode == "cat" else axis)
