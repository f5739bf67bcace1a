"""From a model and its wiring to the partition spec: declared, known, or given by the user."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import nn
from torch_geometric.nn.models.basic_gnn import BasicGNN

from gist.errors import ConfigError, PartitionError
from gist.partition.builder import SpecBuilder
from gist.partition.chain import chain_of, how_to_wire, wire_chain
from gist.partition.rules.pyg import wire_basic_gnn
from gist.partition.spec import Axis, PartitionSpec

Wiring = (
    Sequence[str | tuple[str, str]]
    | Mapping[str, Mapping[str, Any]]
    | Callable[[Any, SpecBuilder], None]
)
"""A chain of layer names, named unit groups, or a function; see :func:`partition_spec`."""


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
            are known; a model with ``declare_wiring``; a ``nn.Sequential`` of layers, nested or
            not, which is wired as the chain that it is; or any other together with ``wiring``.
        wiring: Whose output units are whose input units. Either a chain, the names of the layers in
            the order of the data flow: ``["conv1", "norm1", "conv2"]``, where every layer that sums
            over features starts a unit group, but for the last, whose output stays whole; a pair
            ``("conv1", "heads")`` also says what the units of an attention layer are. Or named
            groups, for layers that share their units, as residual connections do::

                {"hidden": {"out": ["embed", "conv"], "through": ["norm"], "in": ["conv", "head"]}}

            where ``out`` names the layers whose outputs are these units, ``through`` those that
            pass them on one by one (norms), ``in`` those that take them in, and ``units`` is
            optional. Or a function of the model and a :class:`~gist.partition.builder.SpecBuilder`,
            such as :func:`~gist.partition.residual_wiring.wire_blocks`.

    Raises:
        PartitionError: the wiring is not known, or with every finding about a model that cannot be
            partitioned as wired.
    """
    builder = SpecBuilder(model)
    if isinstance(wiring, str) or not (
        wiring is None or callable(wiring) or isinstance(wiring, Sequence | Mapping)
    ):
        raise ConfigError(
            "wiring must be a sequence of layer names, a mapping of groups or a function",
            got=repr(wiring),
        )
    if callable(wiring):
        wiring(model, builder)
    elif isinstance(wiring, Mapping):
        _wire_groups(builder, wiring)
    elif wiring is not None:
        _wire_steps(builder, wiring)
    elif isinstance(model, DeclaresWiring):
        model.declare_wiring(builder)
    elif chain := chain_of(model):
        wire_chain(builder, [(path, None) for path in chain])
    else:
        known = next((wire for kind, wire in _KNOWN.items() if isinstance(model, kind)), None)
        if known is None:
            raise PartitionError(
                f"the wiring of {type(model).__name__} is not known",
                expected="a gist.nn model, a PyG GCN, GraphSAGE, GAT or GIN, or a nn.Sequential",
                remedy=f"{how_to_wire(model)}; "
                "or wiring=gist.wire_filters, wiring=gist.wire_blocks for residual networks, whose "
                "blocks have a gist.ResidualRule",
            )
        known(model, builder)
    return builder.build()


def _wire_steps(builder: SpecBuilder, wiring: Sequence[str | tuple[str, str]]) -> None:
    steps = [(step, None) if isinstance(step, str) else step for step in wiring]
    for step in steps:
        if not (isinstance(step, tuple | list) and len(step) == 2 and isinstance(step[0], str)):
            raise ConfigError(
                "a step of the wiring must be a layer name or a pair (layer name, units)",
                got=repr(step),
                expected="such as 'conv1' or ('conv1', 'heads')",
            )
    wire_chain(builder, steps)


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
