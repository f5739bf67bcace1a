"""Rules for the layers of ``torch.nn``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gist.partition.builder import Layer
from gist.partition.grouped.grouping import Grouping
from gist.partition.grouped.layers import (
    GroupedBatchNorm,
    GroupedDropout,
    GroupedEmbedding,
    GroupedLayerNorm,
    GroupedLinear,
    GroupedPReLU,
)
from gist.partition.rules.registry import Rule, register_rule, rule_of
from gist.partition.spec import Axis


class OnHeld(nn.Module):
    """A layer that sees only the held features; the others come out as zero.

    Turns a layer over ``k`` held features into one over all ``d``, which lie along ``dim``:
    ``[..., d, ...] -> [..., d, ...]``.
    """

    def __init__(self, narrowed: nn.Module, held: Tensor, dim: int = -1) -> None:
        super().__init__()
        self.narrowed, self.held, self.dim = narrowed, held, dim

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Applies the layer to the held features."""
        out = self.narrowed(x.index_select(self.dim, self.held), *args, **kwargs)
        return torch.zeros_like(x).index_copy(self.dim, self.held, out)

    def __getattr__(self, name: str) -> Any:
        """What a model reads of the layer besides calling it is the narrowed layer's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("narrowed"), name)


@register_rule(nn.Linear)
class LinearRule(Rule):
    """``y = x Wᵀ + b``: rows of W and b follow the output units, columns the input units."""

    contracts = True

    def connect(self, layer: Layer) -> Axis | None:
        """See :meth:`Rule.connect`. An input of several positions per unit was flattened."""
        rows, columns = layer.module.weight.shape
        inp = layer.input
        if inp is not None and columns % inp.size == 0:
            inp = inp.widen(columns // inp.size)
        else:
            inp = layer.expect_input(columns)
        out = layer.produce(rows)
        layer.follow("weight", (0, out), (1, inp))
        layer.follow("bias", (0, out))
        return out

    def resize(self, module: Any, input: int | None, output: int | None) -> None:
        """See :meth:`Rule.resize`."""
        module.out_features, module.in_features = module.weight.shape

    def grouped(self, module: Any, grouping: Grouping) -> nn.Module | None:
        """See :meth:`Rule.grouped`."""
        return GroupedLinear(module, grouping)


@register_rule(nn.Conv2d)
class Conv2dRule(Rule):
    """Units are filters: output channels, with the next layer's input channels."""

    contracts = True

    def connect(self, layer: Layer) -> Axis | None:
        """See :meth:`Rule.connect`. Grouped convolutions are refused."""
        conv = layer.module
        if conv.groups != 1:
            layer.refuse(f"grouped convolutions cannot be partitioned (groups={conv.groups})")
        out = layer.produce(conv.out_channels)
        layer.follow("weight", (0, out), (1, layer.expect_input(conv.in_channels)))
        layer.follow("bias", (0, out))
        return out

    def resize(self, module: Any, input: int | None, output: int | None) -> None:
        """See :meth:`Rule.resize`."""
        module.out_channels, module.in_channels = module.weight.shape[:2]


@register_rule(nn.BatchNorm1d, nn.BatchNorm2d)
class BatchNormRule(Rule):
    """Affine parameters and running statistics follow their feature; the step count is shared."""

    normalizes = True

    def connect(self, layer: Layer) -> Axis | None:
        """See :meth:`Rule.connect`."""
        norm = layer.module
        axis = layer.expect_input(norm.num_features)
        for name in ("weight", "bias", "running_mean", "running_var"):
            layer.follow(name, (0, axis))
        layer.follow("num_batches_tracked")
        return axis

    def resize(self, module: Any, input: int | None, output: int | None) -> None:
        """See :meth:`Rule.resize`."""
        if input is not None:
            module.num_features = input

    def grouped(self, module: Any, grouping: Grouping) -> nn.Module | None:
        """See :meth:`Rule.grouped`."""
        if isinstance(module, nn.BatchNorm2d):
            return None
        return GroupedBatchNorm(module, grouping)


@register_rule(nn.LayerNorm)
class LayerNormRule(Rule):
    """Normalises over the features a subnet holds; affine parameters follow their feature."""

    normalizes = True

    def connect(self, layer: Layer) -> Axis | None:
        """See :meth:`Rule.connect`. Only the last dimension may be normalised."""
        norm = layer.module
        if len(norm.normalized_shape) != 1:
            layer.refuse(f"normalises over {norm.normalized_shape}; only the last dim can be")
        axis = layer.expect_input(norm.normalized_shape[0])
        layer.follow("weight", (0, axis))
        layer.follow("bias", (0, axis))
        return axis

    def resize(self, module: Any, input: int | None, output: int | None) -> None:
        """See :meth:`Rule.resize`."""
        if input is not None:
            module.normalized_shape = (input,)

    def grouped(self, module: Any, grouping: Grouping) -> nn.Module | None:
        """See :meth:`Rule.grouped`."""
        return GroupedLayerNorm(module, module.normalized_shape[0], grouping)

    def masked(self, module: Any, narrowed: Any, held: Tensor | None) -> nn.Module | None:
        """See :meth:`Rule.masked`: statistics are taken over the held features alone."""
        return None if held is None else OnHeld(narrowed, held)


@register_rule(nn.GroupNorm)
class GroupNormRule(Rule):
    """With one group, normalises over the channels a subnet holds; with one for each, each alone.

    Affine parameters follow their channel.
    """

    normalizes = True

    def connect(self, layer: Layer) -> Axis | None:
        """See :meth:`Rule.connect`. Other groups would fall apart where channels are left out."""
        norm = layer.module
        axis = layer.expect_input(norm.num_channels)
        if axis is not None and norm.num_groups not in (1, norm.num_channels):
            layer.refuse(
                f"normalises {norm.num_groups} groups of {norm.num_channels} channels; only one "
                "group, or one for each channel, can be partitioned"
            )
        layer.follow("weight", (0, axis))
        layer.follow("bias", (0, axis))
        return axis

    def resize(self, module: Any, input: int | None, output: int | None) -> None:
        """See :meth:`Rule.resize`."""
        if input is not None:
            module.num_groups = 1 if module.num_groups == 1 else input
            module.num_channels = input

    def masked(self, module: Any, narrowed: Any, held: Tensor | None) -> nn.Module | None:
        """See :meth:`Rule.masked`: statistics are taken over the held channels alone."""
        return None if held is None else OnHeld(narrowed, held, dim=1)


@register_rule(nn.Embedding)
class EmbeddingRule(Rule):
    """Columns of the table are the output units."""

    def produces(self, module: Any) -> bool:
        """See :meth:`Rule.produces`."""
        return True

    def connect(self, layer: Layer) -> Axis | None:
        """See :meth:`Rule.connect`. ``max_norm`` mixes the columns and is refused."""
        table = layer.module
        if table.max_norm is not None:
            layer.refuse("max_norm rescales rows by all their columns, which mixes units")
        out = layer.produce(table.embedding_dim)
        layer.follow("weight", (1, out))
        return out

    def resize(self, module: Any, input: int | None, output: int | None) -> None:
        """See :meth:`Rule.resize`."""
        module.embedding_dim = module.weight.size(1)

    def grouped(self, module: Any, grouping: Grouping) -> nn.Module | None:
        """See :meth:`Rule.grouped`."""
        if module.sparse or module.scale_grad_by_freq:
            return None
        return GroupedEmbedding(module, grouping)


_MIX_DIMS = (
    nn.Dropout2d,
    nn.Flatten,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
)
"""Layers that tell one dim of their input from another, so that they would see subnets as one."""


@register_rule(
    nn.Identity,
    nn.Dropout,
    nn.Dropout2d,
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.ELU,
    nn.SELU,
    nn.CELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Tanh,
    nn.Sigmoid,
    nn.LogSigmoid,
    nn.Softplus,
    nn.Softsign,
    nn.Hardswish,
    nn.Hardtanh,
    nn.Hardsigmoid,
    nn.Flatten,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
)
class ElementwiseRule(Rule):
    """Treats every feature alike and on its own, and has no parameters: hands its input on."""

    def connect(self, layer: Layer) -> Axis | None:
        """See :meth:`Rule.connect`."""
        return layer.input

    def grouped(self, module: Any, grouping: Grouping) -> nn.Module | None:
        """See :meth:`Rule.grouped`."""
        if isinstance(module, nn.Dropout):
            return GroupedDropout(module, grouping)
        return None if isinstance(module, _MIX_DIMS) else module


@register_rule(nn.PReLU)
class PReLURule(Rule):
    """One slope for all features is shared; one per feature follows it."""

    def connect(self, layer: Layer) -> Axis | None:
        """See :meth:`Rule.connect`."""
        slopes = layer.module.weight.numel()
        layer.follow("weight", (0, layer.expect_input(slopes) if slopes > 1 else None))
        return layer.input

    def resize(self, module: Any, input: int | None, output: int | None) -> None:
        """See :meth:`Rule.resize`."""
        module.num_parameters = module.weight.numel()

    def grouped(self, module: Any, grouping: Grouping) -> nn.Module | None:
        """See :meth:`Rule.grouped`."""
        return GroupedPReLU(module, grouping)


@register_rule(nn.Sequential)
class SequentialRule(Rule):
    """A chain: inner layers that contract get unit groups of their own, the last is the output."""

    def produces(self, module: Any) -> bool:
        """See :meth:`Rule.produces`."""
        return any(rule_of(child).produces(child) for child in module.children())

    def chain(self, module: Any) -> Sequence[str]:
        """See :meth:`Rule.chain`."""
        return tuple(module._modules)

    def connect(self, layer: Layer) -> Axis | None:
        """See :meth:`Rule.connect`."""
        return connect_chain(layer, list(self.chain(layer.module)))

    def grouped(self, module: Any, grouping: Grouping) -> nn.Module | None:
        """See :meth:`Rule.grouped`."""
        return grouping.children(module)


def connect_chain(layer: Layer, names: list[str]) -> Axis | None:
    """Connects submodules in a row; the last that produces units produces the layer's own."""
    # Where the output stays whole, so does an inner layer that is no wider than it.
    modules = {name: layer.module.get_submodule(name) for name in names}
    producers = [name for name in names if rule_of(modules[name]).produces(modules[name])]
    least = 0 if layer.is_partitioned or not producers else _rows(modules[producers[-1]])
    axis = layer.input
    for name in names:
        if name in producers[:-1] and not _rows(modules[name]) <= least:
            axis = layer.inner(name, axis)
        else:
            axis = layer.child(name, axis, produces=name == producers[-1] if producers else False)
    return axis


def _rows(module: nn.Module) -> float:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or is_lazy(weight) or weight.dim() < 2:
        return float("inf")
    return weight.size(0)
