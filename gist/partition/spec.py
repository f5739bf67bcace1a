"""What of a model follows which units: groups, layouts of every parameter and buffer; pure data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gist.errors import PartitionError
from gist.partition.index_map import ONE_POSITION, IndexMap


@dataclass(frozen=True, kw_only=True)
class UnitGroup:
    """Units that are exchangeable: the features of one hidden layer, the blocks of one stage.

    Attributes:
        name: Unique within a spec, such as ``hidden.0``.
        size: Number of units.
    """

    name: str
    size: int

    def __post_init__(self) -> None:
        if not self.name or self.size < 1:
            raise PartitionError("a unit group needs a name and at least one unit", got=self)


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One dimension of one parameter that a unit group indexes.

    Attributes:
        dim: The dimension, counted from 0.
        group: Name of the unit group.
        map: Where its units sit along that dimension.
    """

    dim: int
    group: str
    map: IndexMap = ONE_POSITION


@dataclass(frozen=True, kw_only=True)
class Axis:
    """The feature dimension between two layers: which units sit where on it.

    Attributes:
        size: Number of positions.
        parts: ``(group, map)`` pairs; positions of no part are held by every subnet.
    """

    size: int
    parts: tuple[tuple[str, IndexMap], ...]

    @classmethod
    def concat(cls, axes: Iterable[Axis]) -> Axis:
        """The axes one after the other, as ``torch.cat`` along the features lays them out."""
        size, parts = 0, []
        for axis in axes:
            parts += [(group, index.shift(size)) for group, index in axis.parts]
            size += axis.size
        return cls(size=size, parts=tuple(parts))

    def widen(self, by: int) -> Axis:
        """Every position became ``by`` consecutive ones, as flattening ``[C, H, W]`` does."""
        return Axis(size=self.size * by, parts=tuple((g, i.widen(by)) for g, i in self.parts))

    def repeat(self, times: int) -> Axis:
        """The same axis ``times`` times in a row: ``[h, h]`` for ``times=2``."""
        starts = range(0, times * self.size, self.size)
        parts = tuple((group, index.copy_at(starts)) for group, index in self.parts)
        return Axis(size=times * self.size, parts=parts)

    def once(self, size: int) -> Axis | None:
        """The axis of ``size`` positions that :meth:`repeat` made this one of, if there is one."""
        first = [
            (group, index.width, tuple(offset for offset in index.offsets if offset < size))
            for group, index in self.parts
        ]
        if size >= self.size or not all(offsets for _, _, offsets in first):
            return None
        parts = ((group, IndexMap(width=w, offsets=offsets)) for group, w, offsets in first)
        axis = Axis(size=size, parts=tuple(parts))
        return axis if axis.repeat(self.size // size) == self else None

    def slots(self, dim: int) -> tuple[Slot, ...]:
        """The slots of a parameter whose dimension ``dim`` runs along this axis."""
        return tuple(Slot(dim=dim, group=group, map=index) for group, index in self.parts)

    @property
    def groups(self) -> frozenset[str]:
        """Names of the groups on this axis."""
        return frozenset(group for group, _ in self.parts)


@dataclass(frozen=True, kw_only=True)
class ParamLayout:
    """How the dimensions of one parameter or buffer follow the units.

    Attributes:
        name: Full name in the model.
        shape: Its full shape.
        slots: The dimensions that units index; all others are held whole by every subnet.
        owner: ``(group, unit)`` where the tensor as a whole belongs to one unit, as the parameters
            of a residual block do; such a tensor has no slots.
    """

    name: str
    shape: tuple[int, ...]
    slots: tuple[Slot, ...] = ()
    owner: tuple[str, int] | None = None

    @property
    def is_shared(self) -> bool:
        """Whether every subnet holds all of it."""
        return not self.slots and self.owner is None

    @property
    def groups(self) -> frozenset[str]:
        """Names of the groups that this tensor follows."""
        return frozenset(s.group for s in self.slots) | (
            frozenset({self.owner[0]}) if self.owner else frozenset()
        )

    def findings(self, groups: Mapping[str, UnitGroup]) -> list[str]:
        """Everything that is wrong with this layout, one sentence each."""
        out = []
        if self.owner is not None:
            group, unit = self.owner
            if group not in groups:
                out.append(f"{self.name}: owner group {group!r} is not declared")
            elif not 0 <= unit < groups[group].size:
                out.append(
                    f"{self.name}: owner unit {unit} is not in {group!r} of {groups[group].size}"
                )
            if self.slots:
                out.append(f"{self.name}: belongs to one unit as a whole and has slots as well")
        taken: dict[int, Tensor] = {}
        for slot in self.slots:
            if slot.group not in groups:
                out.append(f"{self.name}: group {slot.group!r} is not declared")
                continue
            if not 0 <= slot.dim < len(self.shape):
                out.append(f"{self.name}: dim {slot.dim} does not exist in shape {self.shape}")
                continue
            positions = slot.map.forward(torch.arange(groups[slot.group].size))
            length = self.shape[slot.dim]
            if int(positions.max()) >= length:
                out.append(
                    f"{self.name}: dim {slot.dim} has {length} positions, but units of "
                    f"{slot.group!r} reach position {int(positions.max())}"
                )
                continue
            counts = taken.setdefault(slot.dim, torch.zeros(length, dtype=torch.long))
            counts.index_add_(0, positions, torch.ones_like(positions))
            if int(counts.max()) > 1:
                where = int((counts > 1).nonzero()[0])
                out.append(
                    f"{self.name}: position {where} of dim {slot.dim} is claimed more than once"
                )
        return out


@dataclass(frozen=True, kw_only=True)
class Port:
    """One layer's place in the wiring.

    Attributes:
        path: Full name of the module.
        input: Axis of the features it takes in; None where these are whole.
        output: Axis of the features it puts out; None where these are whole.
        contracts: Whether it sums over input features, as a linear layer does.
        normalizes: Whether it normalises its features (LayerNorm, BatchNorm).
    """

    path: str
    input: Axis | None
    output: Axis | None
    contracts: bool = False
    normalizes: bool = False


@dataclass(frozen=True, kw_only=True)
class PartitionSpec:
    """All unit groups of one model and the layout of each of its parameters and buffers.

    Attributes:
        groups: Unit groups by name.
        layouts: Layouts by full parameter or buffer name.
        ports: The partitioned layers by module path: what changes size in a subnet.
        blocks: Modules that belong to one unit as a whole, ``path -> (group, unit)``.

    Raises:
        PartitionError: with every finding, where the parts do not fit together.
    """

    groups: Mapping[str, UnitGroup]
    layouts: Mapping[str, ParamLayout]
    ports: Mapping[str, Port] = field(default_factory=dict)
    blocks: Mapping[str, tuple[str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        found = [f"group {n!r} is filed as {k!r}" for k, n in self._misfiled()]
        for layout in self.layouts.values():
            found += layout.findings(self.groups)
        for path, (group, unit) in self.blocks.items():
            if group not in self.groups or not 0 <= unit < self.groups[group].size:
                found.append(f"{path}: belongs to unit {unit} of {group!r}, which is not declared")
        for port in self.ports.values():
            for axis in (port.input, port.output):
                unknown = sorted((axis.groups if axis else frozenset()) - set(self.groups))
                found += [f"{port.path}: group {group!r} is not declared" for group in unknown]
        used = frozenset[str]().union(*(layout.groups for layout in self.layouts.values()))
        found += [f"group {g!r} indexes no parameter" for g in self.groups if g not in used]
        raise_findings("the partition spec does not hold together", found)

    def _misfiled(self) -> list[tuple[str, str]]:
        named = [(key, group.name) for key, group in self.groups.items()]
        named += [(key, layout.name) for key, layout in self.layouts.items()]
        return [(key, name) for key, name in named if key != name]

    @property
    def sizes(self) -> dict[str, int]:
        """Units per group."""
        return {name: group.size for name, group in self.groups.items()}

    @property
    def has_normalization(self) -> bool:
        """Whether any partitioned features pass through a normalisation layer."""
        return any(port.normalizes for port in self.ports.values())

    def unnormalized(self) -> frozenset[str]:
        """Paths of layers that sum over partitioned features and whose output no norm rescales."""
        normalized = frozenset[str]().union(
            *(p.input.groups for p in self.ports.values() if p.normalizes and p.input)
        )
        return frozenset(
            path
            for path, port in self.ports.items()
            if port.contracts
            and port.input is not None
            and not (port.output is not None and port.output.groups & normalized)
        )

    def check(self, model: nn.Module) -> None:
        """Compares the spec with a model's parameters and buffers.

        Raises:
            PartitionError: once, with every parameter that is undeclared, missing, lazy or of
                another shape.
        """
        found = []
        tensors = model_tensors(model)
        for name, tensor in tensors.items():
            if is_lazy(tensor):
                found.append(
                    f"{name}: is lazy (its size is not known yet); give in_channels, or run the "
                    "model once before training"
                )
            elif name not in self.layouts:
                found.append(f"{name}: has no layout (shape {tuple(tensor.shape)})")
            elif tuple(tensor.shape) != self.layouts[name].shape:
                found.append(
                    f"{name}: has shape {tuple(tensor.shape)}, declared {self.layouts[name].shape}"
                )
        found += [
            f"{name}: is declared, but not in the model" for name in self.layouts.keys() - tensors
        ]
        raise_findings(f"the partition spec does not fit {type(model).__name__}", found)

    def __str__(self) -> str:
        rows = [("group", "units", "")]
        rows += [(g.name, str(g.size), "") for g in self.groups.values()]
        rows += [("", "", ""), ("parameter or buffer", "shape", "follows")]
        for layout in self.layouts.values():
            follows = ", ".join(f"dim {s.dim}: {s.group} ({s.map})" for s in layout.slots)
            if layout.owner is not None:
                follows = f"as a whole: unit {layout.owner[1]} of {layout.owner[0]}"
            rows.append(
                (layout.name, "x".join(map(str, layout.shape)) or "()", follows or "shared")
            )
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        lines = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}".rstrip() for a, b, c in rows]
        return "\n".join(lines)


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by full name; a tied tensor appears once, under its first name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def raise_findings(headline: str, findings: list[str]) -> None:
    """Raises one error that lists all findings; does nothing where there are none."""
    if findings:
        raise PartitionError(f"{headline}:\n  - " + "\n  - ".join(findings))
