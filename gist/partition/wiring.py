"""From a model and its wiring to the partition spec: declared, known, or given by the user."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import nn
from torch_geometric.nn.models.basic_gnn import BasicGNN

from gist.errors import ConfigError, PartitionError
from gist.partition.builder import SpecBuilder
from gist.partition.rules.pyg import wire_basic_gnn
from gist.partition.rules.registry import rule_of
from gist.partition.spec import Axis, PartitionSpec

Wiring = Sequence[str | tuple[str, str]] | Mapping[str, Mapping[str, Any]]
"""A chain of layer names, or named unit groups; see :func:`partition_spec`."""


@runtime_checkable
class DeclaresWiring(Protocol):
    """A model that knows its own wiring."""

    def declare_wiring(self, builder: SpecBuilder) -> None:
        """Calls ``builder.layer`` for every layer, in the order of the data flow."""


_KNOWN: dict[type[nn.Module], Callable[[Any, SpecBuilder], None]] = {BasicGNN: wire_basic_gnn}


def partition_spec(model: nn.Module, wiring: Wiring | None = None) -> PartitionSpec:
    """The partition spec of a model.

    Args:
        model: A :mod:`gist.nn` model or another of PyG's ``BasicGNN`` family, which
            are known; a model with ``declare_wiring``; or any other together with ``wiring``.
        wiring: Whose output units are whose input units. Either a chain, the names of the layers in
            the order of the data flow: ``["conv1", "norm1", "conv2"]``, where every layer that sums
            over features starts a unit group, but for the last, whose output stays whole; a pair
            ``("conv1", "heads")`` also says what the units of an attention layer are. Or named
            groups, for layers that share their units, as residual connections do::

                {"hidden": {"out": ["embed", "conv"], "through": ["norm"], "in": ["conv", "head"]}}

            where ``out`` names the layers whose outputs are these units, ``through`` those that
            pass them on one by one (norms), ``in`` those that take them in, and ``units`` is
            optional.

    Raises:
        PartitionError: the wiring is not known, or with every finding about a model that cannot be
            partitioned as wired.
    """
    builder = SpecBuilder(model)
    if isinstance(wiring, str) or (
        wiring is not None and not isinstance(wiring, Sequence | Mapping)
    ):
        raise ConfigError(
            "wiring must be a sequence of layer names or a mapping of groups", got=repr(wiring)
        )
    if isinstance(wiring, Mapping):
        _wire_groups(builder, wiring)
    elif wiring is not None:
        _wire_chain(builder, wiring)
    elif isinstance(model, DeclaresWiring):
        model.declare_wiring(builder)
    else:
        known = next((wire for kind, wire in _KNOWN.items() if isinstance(model, kind)), None)
        if known is None:
            layers = [name for name, _ in model.named_children()]
            raise PartitionError(
                f"the wiring of {type(model).__name__} is not known",
                expected="a gist.nn model or a PyG GCN, GraphSAGE, GAT or GIN",
                remedy=f"pass wiring=[...] with the layers in order of the data flow, of {layers}",
            )
        known(model, builder)
    return builder.build()


def _wire_chain(builder: SpecBuilder, wiring: Sequence[str | tuple[str, str]]) -> None:
    steps = [(step, None) if isinstance(step, str) else step for step in wiring]
    for step in steps:
        if not (isinstance(step, tuple | list) and len(step) == 2 and isinstance(step[0], str)):
            raise ConfigError(
                "a step of the wiring must be a layer name or a pair (layer name, units)",
                got=repr(step),
                expected="such as 'conv1' or ('conv1', 'heads')",
            )
    producing = [path for path, _ in steps if _starts_group(builder.model, path)]
    axis: Axis | None = None
    for path, units in steps:
        produces = path if path in producing[:-1] else None
        axis = builder.layer(path, axis, produces=produces, units=units)


def _starts_group(model: nn.Module, path: str) -> bool:
    try:
        module = model.get_submodule(path)
        return rule_of(module).produces(module)
    except (AttributeError, PartitionError):
        return False  # the builder names what is wrong with it


def _wire_groups(builder: SpecBuilder, wiring: Mapping[str, Mapping[str, Any]]) -> None:
    roles = ("out", "through", "in")
    for group, entry in wiring.items():
        fits = isinstance(entry, Mapping) and set(entry) <= {*roles, "units"} and entry.get("out")
        if not fits or any(isinstance(entry.get(role), str) for role in roles):
            raise ConfigError(
                f"group {group!r} of the wiring must say which layers put out its units",
                got=repr(entry),
                expected="lists 'out' (not empty), 'in', where needed 'through', and 'units'",
            )
    out_of = {path: group for group, entry in wiring.items() for path in entry["out"]}
    into: dict[str, list[str]] = {}
    for group, entry in wiring.items():
        for path in entry.get("in", ()):
            into.setdefault(path, []).append(group)
    names = [name for name, _ in builder.model.named_modules()]
    layers = sorted({*out_of, *into}, key=lambda p: names.index(p) if p in names else -1)

    axes: dict[str, Axis] = {}
    for path in layers:  # sizes of the groups, from the layers that put them out
        produced = out_of.get(path)
        if produced is not None and produced not in axes:
            scratch = SpecBuilder(builder.model)
            units = wiring[produced].get("units")
            axis = scratch.layer(path, None, produces=produced, units=units)
            if axis is not None:
                axes[produced] = axis
    for path in layers:
        sources = [axes[group] for group in into.get(path, ()) if group in axes]
        produced = out_of.get(path)
        units = wiring[produced].get("units") if produced is not None else None
        axis = Axis.concat(sources) if sources else None
        builder.layer(path, axis, produces=produced, units=units)
    for group, entry in wiring.items():
        for path in entry.get("through", ()):
            builder.layer(path, axes.get(group))
