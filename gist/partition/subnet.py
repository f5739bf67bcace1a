"""Cuts subnets out of a model and puts them back: extract, build, merge."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gist.errors import PartitionError
from gist.partition.assignment import Assignment
from gist.partition.rules.registry import has_rule, rule_of, without_caches
from gist.partition.spec import Axis, ParamLayout, PartitionSpec, Slot, model_tensors

Index = tuple[Tensor | None, ...]
"""Positions kept along each dim of a tensor, ascending; None keeps the whole dim."""


class Selection:
    """What one subnet holds of every tensor in one round; positions are computed once and kept."""

    def __init__(self, spec: PartitionSpec, assignment: Assignment, subnet: int) -> None:
        self.spec, self.assignment, self.subnet = spec, assignment, subnet
        self._positions: dict[tuple[int, tuple[tuple[str, Any], ...]], Tensor | None] = {}

    def holds(self, layout: ParamLayout) -> bool:
        """Whether the subnet holds any of a tensor: only tensors of absent units are left out."""
        if layout.owner is None:
            return True
        group, unit = layout.owner
        return self.subnet in self.assignment.holders(group, unit)

    def index(self, layout: ParamLayout) -> Index:
        """Positions kept along each dim of the layout's tensor."""
        by_dim: dict[int, list[Slot]] = {}
        for slot in layout.slots:
            by_dim.setdefault(slot.dim, []).append(slot)
        return tuple(
            self.positions(Axis(size=n, parts=tuple((s.group, s.map) for s in by_dim[dim])))
            if dim in by_dim
            else None
            for dim, n in enumerate(layout.shape)
        )

    def positions(self, axis: Axis) -> Tensor | None:
        """Positions of an axis that the subnet holds, ascending; None where it holds all."""
        key = (axis.size, axis.parts)
        if key not in self._positions:
            self._positions[key] = self._compute(axis)
        return self._positions[key]

    def _compute(self, axis: Axis) -> Tensor | None:
        kept = torch.ones(axis.size, dtype=torch.bool)
        for group, index in axis.parts:
            units = torch.arange(self.spec.groups[group].size)
            kept[index.forward(units)] = False
        for group, index in axis.parts:
            kept[index.forward(self.assignment.held[group][self.subnet])] = True
        return None if bool(kept.all()) else kept.nonzero()[:, 0]

    def numel(self, layout: ParamLayout) -> int:
        """Number of entries of a tensor that the subnet holds."""
        index = self.index(layout)
        return math.prod(
            n if i is None else i.numel() for n, i in zip(layout.shape, index, strict=True)
        )

    def size(self, axis: Axis | None) -> int | None:
        """Number of positions of an axis that the subnet holds; None for a whole one."""
        if axis is None:
            return None
        positions = self.positions(axis)
        return axis.size if positions is None else positions.numel()


def gather(tensor: Tensor, index: Index) -> Tensor:
    """The kept entries of a tensor, as a fresh contiguous tensor."""
    kept = [(dim, i.to(tensor.device)) for dim, i in enumerate(index) if i is not None]
    if [dim for dim, _ in kept] == [0, 1]:
        return tensor[kept[0][1][:, None], kept[1][1]]
    for dim, positions in kept:
        tensor = tensor.index_select(dim, positions)
    return tensor if kept else tensor.clone()


def scatter_(tensor: Tensor, index: Index, part: Tensor) -> None:
    """Writes ``part`` to the kept entries of ``tensor``: the reverse of :func:`gather`."""
    kept = [(dim, i.to(tensor.device)) for dim, i in enumerate(index) if i is not None]
    if not kept:
        tensor.copy_(part)
    elif len(kept) == 1:
        tensor.index_copy_(kept[0][0], kept[0][1], part)
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


@torch.no_grad()
def merge(
    tensors: Mapping[str, Tensor],
    spec: PartitionSpec,
    assignment: Assignment,
    parts: Sequence[Mapping[str, Tensor]],
) -> None:
    """Puts trained subnets back, in place (GIST, Algorithm 1: ``subAgg``).

    An entry that one subnet holds is copied, one that several hold becomes their mean, one that
    none holds stays. Means are taken in the order of the subnets, by a running mean, so that they
    do not depend on where the subnets ran, and equal copies average to themselves bit for bit.

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
    selections = [Selection(spec, assignment, i) for i in range(len(parts))]
    for name, tensor in tensors.items():
        layout = spec.layouts[name]
        held = [
            (selection.index(layout), part[name])
            for selection, part in zip(selections, parts, strict=True)
            if selection.holds(layout)
        ]
        if len(held) == 1 or _is_exclusive(layout, spec, assignment):
            for index, part in held:
                scatter_(tensor, index, part)
        elif held:
            _merge_mean(tensor, held)


_MEAN_IN = {
    torch.bool: torch.int8,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
}
"""Kinds that means are taken in, where it is not the tensor's own."""


def _is_exclusive(layout: ParamLayout, spec: PartitionSpec, assignment: Assignment) -> bool:
    """Whether no entry can be held twice: some dim runs along units that are dealt once each."""
    disjoint = assignment.disjoint_groups
    if layout.owner is not None:
        return layout.owner[0] in disjoint
    for dim in {slot.dim for slot in layout.slots}:
        slots = [slot for slot in layout.slots if slot.dim == dim]
        covered = sum(spec.groups[s.group].size * s.map.positions_per_unit for s in slots)
        if covered == layout.shape[dim] and all(s.group in disjoint for s in slots):
            return True
    return False


def _merge_mean(tensor: Tensor, held: list[tuple[Index, Tensor]]) -> None:
    # A running mean of what was held; whole numbers are rounded, equal copies stay as they are.
    kind = _MEAN_IN.get(tensor.dtype, tensor.dtype)
    mean = tensor.to(kind, copy=True)
    count = torch.zeros_like(tensor, dtype=torch.int32)
    for index, part in held:
        part = part.to(kind)
        seen = gather(count, index) + 1
        so_far = gather(mean, index)
        step = (part - so_far) / seen
        if not (tensor.is_floating_point() or tensor.is_complex()):
            step = step.round()
        later = torch.where(part == so_far, so_far, so_far + step.to(kind))
        scatter_(mean, index, torch.where(seen == 1, part, later))
        scatter_(count, index, seen)
    tensor.copy_(mean)


def build_subnet(
    model: nn.Module,
    spec: PartitionSpec,
    assignment: Assignment,
    subnet: int,
    *,
    width_correction: bool | None = None,
) -> nn.Module:
    """The narrow model that one subnet trains, with the entries it holds.

    The copy shares nothing with ``model``: tensors are cut, sizes corrected by the rules, caches
    dropped, modules of absent units replaced by the identity. Mode, ``requires_grad``, dtype,
    device and ties are those of the model.

    Args:
        model: The global model; left as it is.
        spec: Its partition spec.
        assignment: Which units each subnet holds.
        subnet: Index of the subnet.
        width_correction: See :func:`corrected_paths`.
    """
    parts = extract(model_tensors(model), spec, assignment, subnet)
    selection = Selection(spec, assignment, subnet)
    memo: dict[int, Any] = {}
    for path, (group, unit) in spec.blocks.items():
        if subnet not in assignment.holders(group, unit):
            memo[id(model.get_submodule(path))] = Absent()
    for name, tensor in model_tensors(model).items():
        if name in parts:
            part = parts[name]
            if isinstance(tensor, nn.Parameter):
                part = nn.Parameter(part, requires_grad=tensor.requires_grad)
            memo[id(tensor)] = part
    with without_caches(model):
        narrow = copy.deepcopy(model, memo)

    scaled = corrected_paths(spec, width_correction)
    for path, module in narrow.named_modules():
        port = spec.ports.get(path)
        inner = None if port is None else selection.size(port.input)
        outer = None if port is None else selection.size(port.output)
        if has_rule(module):
            rule_of(module).resize(module, inner, outer)
        whole = port.input.size if port is not None and port.input is not None else None
        if path in scaled and whole and inner and inner != whole:
            scale = partial(_scale_input, whole / inner)
            module.register_forward_pre_hook(scale, with_kwargs=True)
    return narrow


class Absent(nn.Identity):
    """A module whose units the subnet does not hold: hands on its first argument."""

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Returns ``input``."""
        return input


def _scale_input(
    factor: float, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (args[0] * factor, *args[1:]), kwargs
    features = next(iter(inspect.signature(module.forward).parameters))
    return args, {**kwargs, features: kwargs[features] * factor}


def corrected_paths(spec: PartitionSpec, width_correction: bool | None) -> frozenset[str]:
    """The layers whose narrowed inputs are scaled by (whole width) / (held width).

    A subnet sums over 1/m of the inputs that the whole model sums over; scaling makes the sums
    alike in expectation, as dropout does. A normalisation layer behind takes care of it by itself.

    Args:
        spec: The partition spec.
        width_correction: True corrects every layer whose output is not normalised; False none;
            None (the default) does as True, but leaves out the last layer of a model that has
            normalisation layers, where the correction was measured to do harm.
    """
    paths = spec.unnormalized() if width_correction is not False else frozenset()
    if width_correction is None and spec.has_normalization:
        return frozenset(path for path in paths if spec.ports[path].output is not None)
    return paths
