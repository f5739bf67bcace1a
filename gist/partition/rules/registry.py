"""One rule per exact layer type: how its tensors follow the units, and how it is narrowed."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn

from gist.errors import PartitionError
from gist.partition.spec import Axis

if TYPE_CHECKING:
    from gist.partition.builder import Layer
    from gist.partition.grouped.grouping import Grouping


class Rule(ABC):
    """How one layer type follows its units. Subclass, and register with :func:`register_rule`.

    A rule is stateless. The forms of a layer that it describes are the whole one (the module as it
    is), the narrowed one (in a subnet), the grouped one (in m subnets side by side) and, for layers
    that mix units, the masked one (the whole layer with units switched off: what
    :mod:`gist.verify` compares a subnet with).
    """

    contracts: bool = False
    """The layer sums over its input features, so that a subnet's sums are shorter."""

    normalizes: bool = False
    """The layer rescales features by statistics of them or of the batch."""

    caches: tuple[str, ...] = ()
    """Attributes that must not travel into subnets; they start as None there."""

    @abstractmethod
    def connect(self, layer: Layer) -> Axis | None:
        """Declares the layout of the layer's tensors and returns its output axis.

        Use ``layer.input`` (None: whole), ``layer.produce(size)``, ``layer.follow(name, ...)``,
        ``layer.child(...)`` and ``layer.refuse(...)``.
        """

    def produces(self, module: Any) -> bool:
        """Whether the output features are new units, rather than the input features handed on."""
        return self.contracts

    def chain(self, module: Any) -> Sequence[str] | None:
        """Names of submodules that, one after the other, are all that the module does.

        None for everything else. A model that is such a chain needs no wiring.
        """
        return None

    def resize(  # noqa: B027  # layers that keep no sizes need not
        self, module: Any, input: int | None, output: int | None
    ) -> None:
        """Corrects the attributes of a narrowed copy whose tensors are already in place.

        Args:
            module: The copy.
            input: Narrowed number of input features; None where these are whole.
            output: Narrowed number of output features; None where these are whole.
        """

    def grouped(self, module: Any, grouping: Grouping) -> nn.Module | None:
        """m copies of a narrowed layer as one, for features ``[n, m, k]``.

        Args:
            module: The layer as one subnet holds it; may be changed and returned.
            grouping: Gives the grouped form of its tensors and submodules
                (:class:`~gist.partition.grouped.grouping.Grouping`).

        Returns:
            A layer whose tensors are named as those of ``module``, with a leading dim ``m``; it
            takes features ``[n, m, k]``, or ``[n, k]`` where all subnets share them. None where
            there is no such form: subnets then run one after the other.
        """
        return None

    def masked(self, module: Any, narrowed: Any, held: Tensor | None) -> nn.Module | None:
        """The whole layer with units off, where zeroing idle entries does not say it.

        Args:
            module: The whole layer; idle entries of its tensors are zero already.
            narrowed: The layer as the subnet holds it.
            held: Input positions that the subnet holds, ascending; None where it holds all.

        Returns:
            A replacement for ``module``, or None where zeroed entries are enough.
        """
        return None


HOW_TO_REGISTER = "register one: @gist.register_rule(YourLayer) on a subclass of gist.Rule"

_RULES: dict[type[nn.Module], Rule] = {}

_ON_DEMAND = {
    "dgl": "gist.partition.rules.dgl_layers",
    "timm": "gist.partition.rules.timm_layers",
    "torchvision": "gist.partition.rules.vision",
}
"""Rules of optional packages: the module that registers them, imported when a layer is met."""

R = TypeVar("R", bound=type[Rule])


def register_rule(*types: type[nn.Module], replace: bool = False) -> Callable[[R], R]:
    """Class decorator that makes a rule the rule of exactly these layer types.

    Args:
        *types: Layer types; subclasses of these are not meant.
        replace: Whether an existing rule may be replaced.

    Raises:
        PartitionError: a type has a rule already.
    """

    def decorate(rule: R) -> R:
        for kind in types:
            if _find(kind) is not None and not replace:
                raise PartitionError(
                    f"{kind.__module__}.{kind.__qualname__} has a rule already",
                    got=type(_RULES[kind]).__name__,
                    remedy="pass replace=True to register_rule",
                )
        _RULES.update(dict.fromkeys(types, rule()))
        return rule

    return decorate


def rule_of(module: nn.Module) -> Rule:
    """The rule of a module's exact type.

    Raises:
        PartitionError: there is none; lists the known types and how to register one.
    """
    kind = type(module)
    rule = _find(kind)
    if rule is None:
        raise PartitionError(
            f"no partition rule for layer type {kind.__module__}.{kind.__qualname__}",
            expected=f"one of {known_types()}",
            remedy=HOW_TO_REGISTER,
        )
    return rule


def _find(kind: type[nn.Module]) -> Rule | None:
    package = kind.__module__.partition(".")[0]
    if kind not in _RULES and package in _ON_DEMAND:
        importlib.import_module(_ON_DEMAND[package])
    return _RULES.get(kind)


def known_types() -> str:
    """Names of the layer types that have a rule."""
    return ", ".join(sorted({kind.__name__ for kind in _RULES}))


def has_rule(module: nn.Module) -> bool:
    """Whether the module's exact type has a rule."""
    return _find(type(module)) is not None


@contextmanager
def without_caches(model: nn.Module) -> Iterator[None]:
    """Empties the caches of a model's layers, and puts back what was in them on leaving.

    What a layer keeps between calls (GCNConv's normalised edges with ``cached=True``) belongs to
    one graph: it must neither travel into subnets nor be filled by a trial run.
    """
    found = [
        (module, name, getattr(module, name, None))
        for module in model.modules()
        if has_rule(module)
        for name in _RULES[type(module)].caches
    ]
    for module, name, _ in found:
        setattr(module, name, None)
    try:
        yield
    finally:
        for module, name, cache in found:
            setattr(module, name, cache)
