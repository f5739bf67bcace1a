"""Scores of units, by what of the model belongs to them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from gist.errors import ConfigError, PartitionError
from gist.partition.spec import ParamLayout, PartitionSpec, model_tensors
from gist.partition.transfer import Selection

_ENTRIES_AT_ONCE = 2**18
"""Differences that are held at a time: they stay in the cache of a CPU."""


@torch.no_grad()
def unit_norms(
    model: nn.Module | Mapping[str, Tensor], spec: PartitionSpec, p: float = 2.0
) -> dict[str, Tensor]:
    """The p-norm of the weights that compute each unit: of a filter, or of a neuron's row.

    These are the weights of the layers that put the unit out, whose first dim it indexes; biases
    and norms are not counted.

    Args:
        model: The model, or its tensors by full name.
        spec: Its partition spec.
        p: From 1 on; ``math.inf`` for the largest entry.

    Returns:
        ``[size]`` for each group, on the CPU.

    Raises:
        ConfigError: ``p`` is no norm's.
        PartitionError: no layer computes the units of a group, as where they are residual blocks.
    """
    if not p >= 1:
        raise ConfigError("p must be 1 or more", got=p)
    tensors = model_tensors(model) if isinstance(model, nn.Module) else model
    found = {}
    for group, size in spec.sizes.items():
        parts = []
        for name, layout in spec.layouts.items():
            rows = [s for s in layout.slots if s.dim == 0 and s.group == group]
            if len(layout.shape) < 2 or not rows:
                continue
            weight = tensors[name].detach().cpu().flatten(1)
            for slot in rows:
                positions = slot.map.forward(torch.arange(size))
                copies = weight[positions].view(-1, size, slot.map.width, weight.size(1))
                parts.append(copies.transpose(0, 1).reshape(size, -1))
        if not parts:
            raise PartitionError(
                f"no layer computes the units of {group!r} one by one, so they have no norm",
                remedy="rank filters or neurons: use a LoFT or IST wiring of the model",
            )
        found[group] = torch.linalg.vector_norm(torch.cat(parts, dim=1), ord=p, dim=1)
    return found


@torch.no_grad()
def unit_changes(
    now: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
    spec: PartitionSpec,
    *,
    p: float = 1.0,
    selection: Selection | None = None,
) -> dict[str, Tensor]:
    """How far each unit has moved: ``Σ |now - before|^p`` over all weights that it indexes.

    Weights are tensors of two or more dims. Of a filter these are its own and the slice of the next
    layer that takes it in: AsyncDrop's ``||W_now - W_init||_1`` as its authors compute it. A weight
    that a unit indexes along several dims counts once; of a residual block all weights count.

    Args:
        now: Tensors by full name.
        before: The same, as they were.
        spec: How they follow the units.
        p: From 1 on; the sum has no root taken.
        selection: What a subnet holds, where the tensors are a subnet's. What is not held, or not
            in ``now``, has then not moved.

    Returns:
        ``[size]`` float64 for each group, on the CPU.

    Raises:
        ConfigError: ``p`` is below 1, or not finite.
        PartitionError: no weight follows the units of a group.
    """
    if not p >= 1 or p == math.inf:
        raise ConfigError("p must be a number from 1 on", got=p)
    found = {group: torch.zeros(size, dtype=torch.float64) for group, size in spec.sizes.items()}
    weights = [lay for lay in spec.layouts.values() if len(lay.shape) >= 2 and not lay.is_shared]
    for group in spec.groups.keys() - {group for layout in weights for group in layout.groups}:
        raise PartitionError(
            f"no weight follows the units of {group!r}, so none says how they move"
        )
    for layout in weights:
        if selection is not None and not (layout.name in now and selection.holds(layout)):
            continue
        changes = _changes(now[layout.name].detach(), before[layout.name].detach(), p)
        if layout.owner is not None:
            group, unit = layout.owner
            found[group][unit] += sum(float(change.sum()) for _, change in changes)
            continue
        units = _units_along(layout, spec, selection, now[layout.name].device)
        for group, sums in _summed(changes, units, spec.sizes).items():
            found[group] += sums.cpu()
    return found


def _changes(now: Tensor, before: Tensor, p: float) -> Iterator[tuple[slice, Tensor]]:
    """``|now - before|^p``, some rows at a time."""
    kind = torch.promote_types(now.dtype, torch.float32)
    step = max(1, _ENTRIES_AT_ONCE * now.size(0) // max(1, now.numel()))
    for begin in range(0, now.size(0), step):
        rows = slice(begin, begin + step)
        change = (now[rows].to(kind) - before[rows].to(now.device, kind)).abs()
        yield rows, change if p == 1 else change.pow_(p)


def _summed(
    changes: Iterable[tuple[slice, Tensor]],
    units: Mapping[tuple[str, int], Tensor],
    sizes: Mapping[str, int],
) -> dict[str, Tensor]:
    """By group ``[size]`` float64: sums over the entries that each unit indexes along any dim."""
    sums = {
        group: owner.new_zeros(sizes[group] + 1, dtype=torch.float64)
        for (group, _), owner in units.items()
    }
    for rows, change in changes:
        here = {key: owner[rows] if key[1] == 0 else owner for key, owner in units.items()}
        for (group, dim), owner in here.items():
            left = change
            for (other, earlier), its in here.items():
                if other == group and earlier < dim:
                    left = left.masked_fill(_meet(its, earlier, owner, dim, left.dim()), 0)
            across = [each for each in range(left.dim()) if each != dim]
            sums[group].index_add_(0, owner, left.sum(across).double())
    return {group: each[:-1] for group, each in sums.items()}


def _meet(one: Tensor, dim: int, other: Tensor, other_dim: int, dims: int) -> Tensor:
    """Where the unit along one dim is that along another."""
    along, across = [1] * dims, [1] * dims
    along[dim] = across[other_dim] = -1
    return one.view(along) == other.view(across)


def _units_along(
    layout: ParamLayout, spec: PartitionSpec, selection: Selection | None, device: torch.device
) -> dict[tuple[str, int], Tensor]:
    """By group and dim, the unit at each position; the group's size where there is none."""
    found: dict[tuple[str, int], Tensor] = {}
    for slot in layout.slots:
        size, length = spec.groups[slot.group].size, layout.shape[slot.dim]
        own = slot.map.reverse(torch.arange(length), size)
        known = found.get((slot.group, slot.dim), torch.tensor(size))
        found[slot.group, slot.dim] = torch.where(own < 0, known, own)
    if selection is not None:
        index = selection.index(layout)
        for (group, dim), owner in found.items():
            held = index[dim]
            found[group, dim] = owner if held is None else owner[held]
    return {key: owner.to(device) for key, owner in found.items()}


def ranked(scores: Tensor) -> Tensor:
    """Units by score, the largest first; of equal ones the lower number first."""
    return torch.argsort(scores, descending=True, stable=True)
