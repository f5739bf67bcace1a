"""Chains of layers: every layer takes in what the one before it puts out."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from gist.errors import PartitionError
from gist.partition.builder import SpecBuilder
from gist.partition.rules.registry import has_rule, rule_of
from gist.partition.spec import Axis


def chain_of(model: nn.Module) -> list[str] | None:
    """Full names of the layers of a model that is a chain, in order; None for any other.

    Chains are ``nn.Sequential``, subclasses of it that leave its forward pass alone, and types
    whose rule says so (:meth:`~gist.partition.rules.registry.Rule.chain`); parts of a chain that
    are chains themselves are taken apart.
    """
    names = _parts(model)
    if names is None:
        return None
    layers: list[str] = []
    for name in names:
        inner = chain_of(model.get_submodule(name))
        layers += [name] if inner is None else [f"{name}.{path}" for path in inner]
    return layers


def _parts(module: nn.Module) -> Sequence[str] | None:
    if has_rule(module):
        return rule_of(module).chain(module)
    is_sequential = isinstance(module, nn.Sequential)
    if is_sequential and type(module).forward is nn.Sequential.forward:
        return tuple(module._modules)
    return None


def how_to_wire(model: nn.Module) -> str:
    """What to do where the wiring of a model is not known."""
    layers = [name for name, _ in model.named_children()]
    return f"pass wiring=[...] with the layers in order of the data flow, of {layers}"


def wire_chain(
    builder: SpecBuilder,
    steps: Sequence[tuple[str, str | None]],
    *,
    types: tuple[type[nn.Module], ...] = (nn.Module,),
) -> None:
    """Wires layers one after the other; the output of the last that has units stays whole.

    Args:
        builder: Collects the layers.
        steps: Layer names, each with what its units are where the layer leaves a choice, or None.
        types: Layer types whose outputs become unit groups, named as the layer; others stay whole.
    """
    producing = [path for path, _ in steps if _has_units(builder.model, path)]
    axis: Axis | None = None
    for path, units in steps:
        starts = path in producing[:-1] and isinstance(builder.model.get_submodule(path), types)
        axis = builder.layer(path, axis, produces=path if starts else None, units=units)


def _has_units(model: nn.Module, path: str) -> bool:
    try:
        module = model.get_submodule(path)
        return rule_of(module).produces(module)
    except (AttributeError, PartitionError):
        return False  # the builder names what is wrong with it
