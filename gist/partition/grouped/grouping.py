"""From m subnets of one shape to one grouped model that computes them side by side.

Shape legend: ``n`` nodes (or samples), ``m`` subnets, ``k`` features of one subnet.

Features that differ from subnet to subnet are ``[n, m, k]``: subnet ``i`` owns ``[:, i]``, and the
flat view ``[n, m * k]`` is what a graph product runs on, once for all subnets. Features that all
subnets share, as the input's, stay ``[n, k]``. Every parameter and buffer of a grouped layer has
the name that it has in one subnet, and a leading dim ``m``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from gist.errors import PartitionError
from gist.partition.rules.registry import Rule, has_rule, rule_of
from gist.partition.spec import PartitionSpec


class NotGroupableError(PartitionError):
    """A layer has no grouped form; the executor falls back to one subnet after the other."""


def never_grouped(model: nn.Module, spec: PartitionSpec) -> bool:
    """Whether subnets of a model surely run one after the other.

    That is so where subnets lack whole modules, and where a layer's rule gives no grouped form.

    Args:
        model: The whole model.
        spec: Its partition spec.
    """
    return bool(spec.blocks) or any(
        type(rule_of(layer)).grouped is Rule.grouped for layer in _layers(model)
    )


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules that have a rule."""
    if has_rule(module):
        yield module
    else:
        for child in module.children():
            yield from _layers(child)


class Grouping:
    """What a rule sees when it makes the grouped form of a layer.

    Ties survive: a tensor or module that occurs twice in a subnet occurs twice in the group.

    Args:
        num_subnets: m.
    """

    def __init__(self, num_subnets: int) -> None:
        self.num_subnets = num_subnets
        self._parameters: dict[int, nn.Parameter] = {}
        self._buffers: dict[int, Tensor] = {}
        self._modules: dict[int, nn.Module] = {}
        self._alive: list[Any] = []  # ids stay unique while their objects live

    def parameter(self, of: nn.Parameter | None) -> nn.Parameter | None:
        """The parameter of all subnets, ``[m, *shape]``, not yet filled; None for None."""
        if of is None:
            return None
        if id(of) not in self._parameters:
            self._alive.append(of)
            stacked = of.new_empty((self.num_subnets, *of.shape))
            self._parameters[id(of)] = nn.Parameter(stacked, requires_grad=of.requires_grad)
        return self._parameters[id(of)]

    def buffer(self, of: Tensor | None) -> Tensor | None:
        """The buffer of all subnets, ``[m, *shape]``, not yet filled; None for None."""
        if of is None:
            return None
        if id(of) not in self._buffers:
            self._alive.append(of)
            self._buffers[id(of)] = of.new_zeros((self.num_subnets, *of.shape))
        return self._buffers[id(of)]

    def tensor_of(self, module: nn.Module, name: str, to: nn.Module) -> None:
        """Registers the grouped form of ``module``'s tensor ``name`` on ``to``."""
        tensor = getattr(module, name)
        if tensor is None or isinstance(tensor, nn.Parameter):
            to.register_parameter(name, self.parameter(tensor))
        else:
            to.register_buffer(name, self.buffer(tensor))

    def layer(self, module: nn.Module) -> nn.Module:
        """The grouped form of a layer, by its rule.

        Raises:
            NotGroupableError: its rule gives none.
        """
        if id(module) not in self._modules:
            grouped = rule_of(module).grouped(module, self)
            if grouped is None:
                raise NotGroupableError(
                    f"layer type {type(module).__qualname__} has no grouped form",
                    got=str(module).splitlines()[0],
                    remedy="give its rule a `grouped` method, or use executor='serial'",
                )
            self._alive.append(module)
            self._modules[id(module)] = grouped.train(module.training)
        return self._modules[id(module)]

    def children(self, module: nn.Module) -> nn.Module:
        """``module`` with the grouped form of every layer in it; changed in place."""
        for name, child in module._modules.items():  # a module under two names is met twice
            if child is None:
                continue
            if has_rule(child):
                setattr(module, name, self.layer(child))
            else:
                self.children(child)
        return module
