"""Entries on their way between global tensors and subnets: what is held, extract, merge."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gist.errors import PartitionError
from gist.partition.assignment import Assignment
from gist.partition.blocks import are_plain, gather_block, scatter_block
from gist.partition.spec import Axis, ParamLayout, PartitionSpec, Slot

Index = tuple[Tensor | None, ...]
"""Positions kept along each dim of a tensor, ascending; None keeps the whole dim."""


class Selection:
    """What one subnet holds of every tensor in one round; positions are computed once and kept."""

    def __init__(self, spec: PartitionSpec, assignment: Assignment, subnet: int) -> None:
        self.spec, self.assignment, self.subnet = spec, assignment, subnet
        self._positions: dict[tuple[int, tuple[tuple[str, Any], ...]], Tensor | None] = {}
        self._indices: dict[str, Index] = {}

    def holds(self, layout: ParamLayout) -> bool:
        """Whether the subnet holds any of a tensor: only tensors of absent units are left out."""
        if layout.owner is None:
            return True
        group, unit = layout.owner
        return self.subnet in self.assignment.holders(group, unit)

    def index(self, layout: ParamLayout) -> Index:
        """Positions kept along each dim of the layout's tensor."""
        if layout.name not in self._indices:
            by_dim: dict[int, list[Slot]] = {}
            for slot in layout.slots:
                by_dim.setdefault(slot.dim, []).append(slot)
            self._indices[layout.name] = tuple(
                self.positions(Axis(size=n, parts=tuple((s.group, s.map) for s in by_dim[dim])))
                if dim in by_dim
                else None
                for dim, n in enumerate(layout.shape)
            )
        return self._indices[layout.name]

    def positions(self, axis: Axis) -> Tensor | None:
        """Positions of an axis that the subnet holds, ascending; None where it holds all."""
        key = (axis.size, axis.parts)
        if key not in self._positions:
            self._positions[key] = self._compute(axis)
        return self._positions[key]

    def _compute(self, axis: Axis) -> Tensor | None:
        if len(axis.parts) == 1:
            (group, index), size = axis.parts[0], self.spec.groups[axis.parts[0][0]].size
            if size * index.positions_per_unit == axis.size:  # no position of no unit
                held = self.assignment.held[group][self.subnet]
                return None if held.numel() == size else index.forward(held).sort().values
        kept = torch.ones(axis.size, dtype=torch.bool)
        for group, index in axis.parts:
            units = torch.arange(self.spec.groups[group].size)
            kept[index.forward(units)] = False
        for group, index in axis.parts:
            kept[index.forward(self.assignment.held[group][self.subnet])] = True
        return None if bool(kept.all()) else kept.nonzero()[:, 0]

    def shape(self, layout: ParamLayout) -> tuple[int, ...]:
        """Shape of what the subnet holds of a tensor."""
        index = self.index(layout)
        return tuple(
            n if i is None else i.numel() for n, i in zip(layout.shape, index, strict=True)
        )

    def numel(self, layout: ParamLayout) -> int:
        """Number of entries of a tensor that the subnet holds."""
        return math.prod(self.shape(layout))

    def size(self, axis: Axis | None) -> int | None:
        """Number of positions of an axis that the subnet holds; None for a whole one."""
        if axis is None:
            return None
        positions = self.positions(axis)
        return axis.size if positions is None else positions.numel()


def gather(tensor: Tensor, index: Index, out: Tensor | None = None) -> Tensor:
    """The kept entries of a tensor: fresh and contiguous, or written to ``out``."""
    kept = [(dim, i.to(tensor.device)) for dim, i in enumerate(index) if i is not None]
    if not kept:
        return tensor.clone() if out is None else out.copy_(tensor)
    if [dim for dim, _ in kept] == [0, 1]:
        (_, rows), (_, columns) = kept
        if out is None:
            out = tensor.new_empty(rows.numel(), columns.numel(), *tensor.shape[2:])
        if are_plain(tensor, out, rows, columns):
            gather_block(tensor, rows, columns, out)
            return out
        grid = [rows[:, None], columns]
        return torch.ops.aten.index.Tensor_out(tensor, grid, out=out)  # type: ignore[no-any-return]
    for dim, positions in kept[:-1]:
        tensor = tensor.index_select(dim, positions)
    dim, positions = kept[-1]
    return torch.index_select(tensor, dim, positions, out=out)


def scatter_(tensor: Tensor, index: Index, part: Tensor) -> None:
    """Writes ``part`` to the kept entries of ``tensor``: the reverse of :func:`gather`."""
    kept = [(dim, i.to(tensor.device)) for dim, i in enumerate(index) if i is not None]
    if not kept:
        tensor.copy_(part)
    elif len(kept) == 1:
        tensor.index_copy_(kept[0][0], kept[0][1], part)
    elif are_plain(tensor, part, kept[0][1], kept[1][1]):
        scatter_block(tensor, kept[0][1], kept[1][1], part)
    else:
        last = kept[-1][0]
        grid: list[Tensor] = []
        for dim in range(last + 1):
            positions = index[dim]
            if positions is None:
                positions = torch.arange(tensor.size(dim))
            grid.append(positions.to(tensor.device).view(-1, *[1] * (last - dim)))
        tensor[tuple(grid)] = part


def extract(
    tensors: Mapping[str, Tensor], spec: PartitionSpec, assignment: Assignment, subnet: int
) -> dict[str, Tensor]:
    """The entries of every tensor that a subnet holds (GIST, Algorithm 1: ``subGCNs``).

    Args:
        tensors: The global parameters and buffers by full name, or some of them.
        spec: How they follow the units.
        assignment: Which units each subnet holds.
        subnet: Index of the subnet.

    Returns:
        Fresh tensors by full name, units in ascending order; tensors of absent units are left out.
    """
    selection = Selection(spec, assignment, subnet)
    return {
        name: gather(tensors[name].detach(), selection.index(layout))
        for name, layout in spec.layouts.items()
        if name in tensors and selection.holds(layout)
    }


def held_entries(
    spec: PartitionSpec, assignment: Assignment, subnet: int, names: Iterable[str]
) -> int:
    """How many entries of the named tensors a subnet holds."""
    selection = Selection(spec, assignment, subnet)
    layouts = (spec.layouts[name] for name in names)
    return sum(selection.numel(layout) for layout in layouts if selection.holds(layout))


class Merge:
    """Puts trained subnets back, one after the other (GIST, Algorithm 1: ``subAgg``).

    An entry that one subnet holds is copied, one that several hold becomes their mean, one that
    none holds stays. What can be held only once is written as soon as its subnet is added; means
    are written at the end, so that no subnet of the round reads them. A mean is a running one in
    the order of the subnets: it does not depend on where they ran, and equal copies average to
    themselves bit for bit.

    Args:
        tensors: The global parameters and buffers by full name, or some of them.
        spec: How they follow the units.
        assignment: Which units each subnet held.
        selections: What each holds of ``tensors``, where these are not the whole ones.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        spec: PartitionSpec,
        assignment: Assignment,
        selections: Sequence[Selection] | None = None,
    ) -> None:
        self.tensors, self.spec, self.assignment = tensors, spec, assignment
        self.selections = selections or [
            Selection(spec, assignment, i) for i in range(assignment.num_subnets)
        ]
        self._exclusive = {
            name: is_exclusive(spec.layouts[name], spec, assignment) for name in tensors
        }
        self._means: dict[str, RunningMean] = {}
        self._added = 0

    @torch.no_grad()
    def add(self, part: Mapping[str, Tensor]) -> None:
        """Takes the next subnet's tensors, as :func:`extract` gave them, trained."""
        selection = self.selections[self._added]
        self._added += 1
        for name, tensor in self.tensors.items():
            layout = self.spec.layouts[name]
            if not selection.holds(layout):
                continue
            if self._exclusive[name]:
                self.write(name, selection.index(layout), part[name])
            else:
                if name not in self._means:
                    self._means[name] = RunningMean(tensor)
                self._means[name].add(selection.index(layout), part[name])

    @torch.no_grad()
    def finish(self) -> None:
        """Writes the means.

        Raises:
            PartitionError: a number of parts other than the assignment's subnets.
        """
        if self._added != self.assignment.num_subnets:
            raise PartitionError(
                "merge needs every subnet once",
                got=self._added,
                expected=self.assignment.num_subnets,
            )
        for name, mean in self._means.items():
            self.tensors[name].copy_(mean.value)

    def write(self, name: str, index: Index, part: Tensor) -> None:
        """Puts entries into their tensor; a store that is not in memory has its own way."""
        scatter_(self.tensors[name], index, part)


def merge(
    tensors: Mapping[str, Tensor],
    spec: PartitionSpec,
    assignment: Assignment,
    parts: Sequence[Mapping[str, Tensor]],
) -> None:
    """Puts trained subnets back, in place; see :class:`Merge`.

    Args:
        tensors: The global parameters and buffers by full name, or some of them; changed in place.
        spec: How they follow the units.
        assignment: Which units each subnet held.
        parts: What :func:`extract` gave, trained, one per subnet.

    Raises:
        PartitionError: a number of parts other than the assignment's subnets.
    """
    if len(parts) != assignment.num_subnets:
        raise PartitionError(
            "merge needs every subnet once", got=len(parts), expected=assignment.num_subnets
        )
    merging = Merge(tensors, spec, assignment)
    for part in parts:
        merging.add(part)
    merging.finish()


_MEAN_IN = {
    torch.bool: torch.int8,
    torch.uint8: torch.int16,  # differences are signed
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
}
"""Kinds that means are taken in, where it is not the tensor's own."""


def is_exclusive(layout: ParamLayout, spec: PartitionSpec, assignment: Assignment) -> bool:
    """Whether no entry can be held twice: some dim runs along units that are dealt once each."""
    if assignment.num_subnets == 1:
        return True
    disjoint = assignment.disjoint_groups
    if layout.owner is not None:
        return layout.owner[0] in disjoint
    for dim in {slot.dim for slot in layout.slots}:
        slots = [slot for slot in layout.slots if slot.dim == dim]
        covered = sum(spec.groups[s.group].size * s.map.positions_per_unit for s in slots)
        if covered == layout.shape[dim] and all(s.group in disjoint for s in slots):
            return True
    return False


class RunningMean:
    """A running mean of what subnets hold; whole numbers are rounded, equal copies stay.

    Every entry is a mean of its own, so a tensor may be averaged piece by piece.

    Args:
        tensor: The entries before; those that nobody holds stay as they are.

    Attributes:
        value: The means so far, in a kind of number that means are taken in.
    """

    def __init__(self, tensor: Tensor) -> None:
        kind = _MEAN_IN.get(tensor.dtype, tensor.dtype)
        self.value = tensor.to(kind, copy=True)
        self.count = torch.zeros_like(tensor, dtype=torch.int32)
        self.rounds = not (tensor.is_floating_point() or tensor.is_complex())

    def add(self, index: Index, part: Tensor) -> None:
        """Takes one more copy of the entries at ``index``."""
        part = part.to(self.value.dtype)
        seen = gather(self.count, index) + 1
        so_far = gather(self.value, index)
        step = (part - so_far) / seen
        if self.rounds:
            step = step.round()
        later = torch.where(part == so_far, so_far, so_far + step.to(self.value.dtype))
        scatter_(self.value, index, torch.where(seen == 1, part, later))
        scatter_(self.count, index, seen)
