"""Rules for the layers of ``dgl.nn``; the registry imports them when it first meets one.

Attention layers put out ``[N, H, C]``, and what becomes of the heads is the model's choice. In
``[N, H * C]`` a head owns a block of C positions, and a channel one in each of the H copies. The
mean over heads leaves the channels; heads cannot be units then.
"""

from __future__ import annotations

from typing import Any

from dgl.nn import GATConv, GATv2Conv, GINConv, GraphConv, SAGEConv
from torch import Tensor, nn

from gist.partition.builder import Layer
from gist.partition.grouped.dgl_layers import (
    GroupedGATConv,
    GroupedGATv2Conv,
    GroupedGINConv,
    GroupedGraphConv,
    GroupedSAGEConv,
)
from gist.partition.grouped.grouping import Grouping
from gist.partition.rules.registry import Rule, register_rule, rule_of
from gist.partition.spec import Axis


def _input_of(layer: Layer) -> Axis | None:
    """The input axis of a layer that may take the features of sources and targets apart."""
    source, target = layer.module._in_src_feats, layer.module._in_dst_feats
    if source != target:
        layer.refuse(f"bipartite input of widths {(source, target)} cannot be partitioned")
    return layer.expect_input(source)


def _then(layer: Layer, axis: Axis | None, *names: str) -> Axis | None:
    """Connects what a layer does with its output, where that is a module and not a function."""
    for name in names:
        if isinstance(getattr(layer.module, name), nn.Module):
            axis = layer.child(name, axis)
    return axis


class _ConvRule(Rule):
    """What layers share that tell the widths of sources and targets apart."""

    contracts = True

    def resize(self, module: Any, input: int | None, output: int | None) -> None:
        """See :meth:`Rule.resize`."""
        if input is not None:
            module._in_src_feats = module._in_dst_feats = input
        if output is not None:
            module._out_feats = output


@register_rule(GraphConv)
class GraphConvRule(Rule):
    """``D^-1/2 A D^-1/2 X W + b`` (Kipf & Welling, 2017), without self loops of its own.

    Degrees count edges, so that no form of the normalisation mixes features: sources are divided by
    (the root of) what they send, targets by what they receive, on directed graphs too. Without a
    weight the layer passes its features on.
    """

    contracts = True

    def produces(self, module: Any) -> bool:
        """See :meth:`Rule.produces`."""
        return module.weight is not None

    def connect(self, layer: Layer) -> Axis | None:
        """See :meth:`Rule.connect`."""
        conv = layer.module
        out = inp = layer.expect_input(conv._in_feats)
        if conv.weight is not None:
            out = layer.produce(conv._out_feats)
            layer.follow("weight", (0, inp), (1, out))
        elif conv._in_feats != conv._out_feats:
            layer.refuse("a weight that is given at each call cannot be partitioned")
        else:
            layer.contracts = False
        layer.follow("bias", (0, out))
        return _then(layer, out, "_activation")

    def resize(self, module: Any, input: int | None, output: int | None) -> None:
        """See :meth:`Rule.resize`."""
        if input is not None:
            module._in_feats = input
        if output is not None:
            module._out_feats = output

    def grouped(self, module: Any, grouping: Grouping) -> nn.Module | None:
        """See :meth:`Rule.grouped`."""
        return GroupedGraphConv(module, grouping)


@register_rule(SAGEConv)
class SAGEConvRule(_ConvRule):
    """``W_s x_i + W_n agg_j x_j`` (Hamilton et al., 2017): all weights follow the same units.

    The aggregator ``"pool"`` takes the maximum of projected features, which are units of their own.
    """

    def connect(self, layer: Layer) -> Axis | None:
        """See :meth:`Rule.connect`. The aggregator ``"lstm"`` is refused."""
        conv, inp = layer.module, _input_of(layer)
        aggregator = conv._aggre_type
        if aggregator == "lstm":
            layer.refuse(
                "the aggregator 'lstm' mixes the features of neighbours; "
                "expected 'mean', 'gcn' or 'pool'"
            )
        if aggregator == "pool":  # each linear is a layer by itself
            layer.contracts = False
            out = layer.child("fc_neigh", layer.inner("fc_pool", inp), produces=True)
            layer.child("fc_self", inp, produces=True)
            return _then(layer, out, "activation", "norm")
        out = layer.produce(conv._out_feats)
        layer.follow("fc_neigh.weight", (0, out), (1, inp))
        if aggregator == "gcn":
            layer.follow("bias", (0, out))
        else:
            layer.follow("fc_self.weight", (0, out), (1, inp))
            layer.follow("fc_self.bias", (0, out))
        return _then(layer, out, "activation", "norm")

    def grouped(self, module: Any, grouping: Grouping) -> nn.Module | None:
        """See :meth:`Rule.grouped`."""
        return GroupedSAGEConv(module, grouping)


class _AttentionRule(_ConvRule):
    """Heads x channels. Units are channels within every head (default), or whole heads.

    A residual without a weight adds the input to the output, so both must be the same units, and
    no width correction is made: it would scale the residual too.
    """

    projections: tuple[str, ...] = ()
    """Linears to ``H * C`` features, of which a layer may lack some."""

    attention: tuple[str, ...] = ()
    """Vectors of shape ``[1, H, C]``."""

    def connect(self, layer: Layer) -> Axis | None:
        """See :meth:`Rule.connect`."""
        conv, inp = layer.module, _input_of(layer)
        heads, channels = conv._num_heads, conv._out_feats
        units = layer.units or "channels"
        if units not in ("heads", "channels"):
            layer.refuse(f"units of an attention layer are 'heads' or 'channels', not {units!r}")
        if units == "heads" and not layer.is_partitioned:
            layer.refuse("heads cannot be units where the output of the layer stays whole")
        per_head = layer.produce(heads) if units == "heads" else None
        per_channel = layer.produce(channels) if units == "channels" else None
        out = None if per_channel is None else per_channel.repeat(heads)
        if per_head is not None:
            out = per_head.widen(channels)

        for name in self.projections:
            if hasattr(conv, name):
                layer.follow(f"{name}.weight", (0, out), (1, inp))
                layer.follow(f"{name}.bias", (0, out))
        for name in self.attention:
            layer.follow(name, (1, per_head), (2, per_channel))
        if isinstance(conv.res_fc, nn.Linear):
            layer.follow("res_fc.weight", (0, out), (1, inp))
            layer.follow("res_fc.bias", (0, out))
        elif conv.res_fc is not None:
            layer.contracts = False
            if inp != out:
                layer.refuse(
                    "residual=True adds the input to the output here, so both must be the same "
                    "units; name them as one group of the wiring, with the layer in 'out' and 'in'"
                )
        if isinstance(conv.bias, Tensor):  # in a GATv2Conv it says whether there are any
            layer.follow("bias", (0, out))
        return _then(layer, out, "activation")

    def resize(self, module: Any, input: int | None, output: int | None) -> None:
        """See :meth:`Rule.resize`."""
        super().resize(module, input, None)
        _, module._num_heads, module._out_feats = getattr(module, self.attention[0]).shape


@register_rule(GATConv)
class GATConvRule(_AttentionRule):
    """Graph attention (Veličković et al., 2018)."""

    projections = ("fc", "fc_src", "fc_dst")
    attention = ("attn_l", "attn_r")

    def grouped(self, module: Any, grouping: Grouping) -> nn.Module | None:
        """See :meth:`Rule.grouped`: not with weights of their own for sources and targets."""
        return GroupedGATConv(module, grouping) if hasattr(module, "fc") else None


@register_rule(GATv2Conv)
class GATv2ConvRule(_AttentionRule):
    """Graph attention with dynamic scores (Brody et al., 2022); shared weights stay shared."""

    projections = ("fc_src", "fc_dst")
    attention = ("attn",)

    def grouped(self, module: Any, grouping: Grouping) -> nn.Module | None:
        """See :meth:`Rule.grouped`."""
        return GroupedGATv2Conv(module, grouping)


@register_rule(GINConv)
class GINConvRule(Rule):
    """``f((1 + ε) x_i + agg_j x_j)`` (Xu et al., 2019): aggregation keeps the features apart."""

    def produces(self, module: Any) -> bool:
        """See :meth:`Rule.produces`."""
        inner = module.apply_func
        return isinstance(inner, nn.Module) and rule_of(inner).produces(inner)

    def connect(self, layer: Layer) -> Axis | None:
        """See :meth:`Rule.connect`. The inner network is connected by its own rule."""
        layer.follow("eps")
        out = layer.input
        if isinstance(layer.module.apply_func, nn.Module):
            out = layer.child("apply_func", layer.input, produces=layer.is_partitioned)
        return _then(layer, out, "activation")

    def grouped(self, module: Any, grouping: Grouping) -> nn.Module | None:
        """See :meth:`Rule.grouped`."""
        return GroupedGINConv(module, grouping)
