"""Where the units of a group sit along one dimension of a tensor."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from gist.errors import PartitionError


@dataclass(frozen=True, kw_only=True)
class IndexMap:
    """Unit ``u`` sits at ``width`` positions from ``offset + u * width`` on, for every offset.

    The three cases that layers need are one position (``width=1``), a block of ``k`` positions
    (an attention head of ``k`` channels, a filter flattened to ``k`` pixels), and copies at offsets
    (the concatenation ``[h, mean of h]`` of GraphSAGE, a channel within every head). They compose,
    so one class holds them all.

    Attributes:
        width: Consecutive positions of one unit in one copy.
        offsets: Start of each copy, ascending.
    """

    width: int = 1
    offsets: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in zip(self.offsets, self.offsets[1:], strict=False))
        if self.width < 1 or not self.offsets or self.offsets[0] < 0 or not ascending:
            raise PartitionError(
                "an index map needs a width of at least 1 and ascending offsets from 0 on",
                got=f"width={self.width}, offsets={self.offsets}",
            )

    @classmethod
    def block(cls, width: int) -> IndexMap:
        """Unit ``u`` owns the ``width`` positions from ``u * width`` on."""
        return cls(width=width)

    @classmethod
    def copies(cls, offsets: tuple[int, ...]) -> IndexMap:
        """Unit ``u`` owns position ``offset + u`` for every offset."""
        return cls(offsets=offsets)

    @property
    def positions_per_unit(self) -> int:
        """How many positions one unit owns."""
        return self.width * len(self.offsets)

    def shift(self, by: int) -> IndexMap:
        """The same units, ``by`` positions further on."""
        return IndexMap(width=self.width, offsets=tuple(o + by for o in self.offsets))

    def copy_at(self, starts: Iterable[int]) -> IndexMap:
        """The same units once for every start: copies of copies."""
        offsets = sorted(start + o for start in starts for o in self.offsets)
        return IndexMap(width=self.width, offsets=tuple(offsets))

    def widen(self, by: int) -> IndexMap:
        """The same units where every position became ``by`` consecutive ones."""
        return IndexMap(width=self.width * by, offsets=tuple(o * by for o in self.offsets))

    def forward(self, units: Tensor) -> Tensor:
        """Positions of ``units`` [k], copy by copy: ``[k * positions_per_unit]``."""
        if self.positions_per_unit == 1:
            return units + self.offsets[0]
        within = (units[:, None] * self.width + torch.arange(self.width)).reshape(-1)
        return (torch.tensor(self.offsets)[:, None] + within).reshape(-1)

    def reverse(self, positions: Tensor, num_units: int) -> Tensor:
        """The unit that owns each position ``[n]``; -1 where none of the ``num_units`` does."""
        owner = torch.full_like(positions, -1)
        for offset in self.offsets:
            local = positions - offset
            inside = (local >= 0) & (local < num_units * self.width)
            owner = torch.where(inside, local.div(self.width, rounding_mode="floor"), owner)
        return owner

    def __str__(self) -> str:
        text = "u" if self.width == 1 else f"u*{self.width}+[0,{self.width})"
        return text if self.offsets == (0,) else f"{text} at {'+'.join(map(str, self.offsets))}"


ONE_POSITION = IndexMap()
"""Unit ``u`` sits at position ``u``."""
