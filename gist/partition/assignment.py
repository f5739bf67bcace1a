"""Which units each subnet holds in one round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gist.errors import PartitionError


@dataclass(frozen=True, kw_only=True, eq=False)
class Assignment:
    """One round's deal: for every group, the units of each subnet.

    Attributes:
        round: The round it was drawn for.
        sizes: Units per group.
        held: ``held[group][i]`` are the units of subnet ``i``: int64, ascending, without repeats.

    Raises:
        PartitionError: where units are out of range, unsorted, repeated, or a subnet holds none.
    """

    round: int
    sizes: Mapping[str, int]
    held: Mapping[str, tuple[Tensor, ...]]

    def __post_init__(self) -> None:
        if set(self.sizes) != set(self.held):
            raise PartitionError(
                "an assignment must deal every group",
                got=sorted(self.held),
                expected=sorted(self.sizes),
            )
        if len({len(deal) for deal in self.held.values()}) > 1:
            raise PartitionError("every group must be dealt to the same number of subnets")
        for group, deal in self.held.items():
            for i, units in enumerate(deal):
                fits = (
                    units.numel() > 0 and int(units[0]) >= 0 and int(units[-1]) < self.sizes[group]
                )
                if not fits or bool((units[1:] <= units[:-1]).any()):
                    raise PartitionError(
                        f"subnet {i} must hold units of {group!r}: at least one, ascending, once",
                        got=units.tolist()[:10],
                        expected=f"units in 0..{self.sizes[group] - 1}",
                    )

    @cached_property
    def num_subnets(self) -> int:
        """m."""
        return max((len(deal) for deal in self.held.values()), default=1)

    def widths(self, subnet: int) -> dict[str, int]:
        """Units per group that ``subnet`` holds."""
        return {group: deal[subnet].numel() for group, deal in self.held.items()}

    def coverage(self, group: str) -> Tensor:
        """``[size]`` int64: how many subnets hold each unit."""
        return torch.bincount(torch.cat(self.held[group]), minlength=self.sizes[group])

    def holders(self, group: str, unit: int) -> list[int]:
        """The subnets that hold ``unit``, ascending."""
        return [i for i, units in enumerate(self.held[group]) if bool((units == unit).any())]

    @cached_property
    def disjoint_groups(self) -> frozenset[str]:
        """Groups in which no unit is held twice."""
        return frozenset(g for g in self.held if int(self.coverage(g).max()) <= 1)
