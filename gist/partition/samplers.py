"""Samplers: pure functions from (seed, round) to an :class:`Assignment`.

Every group is drawn from a stream of its own, named by (seed, round, group), so a deal depends
neither on the executor nor on which other groups the model has.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Generator, Tensor

from gist.errors import ConfigError, PartitionError
from gist.partition.assignment import Assignment
from gist.partition.streams import stream


class Sampler(ABC):
    """Deals the units of every group to m subnets; subclasses deal one group."""

    may_share: ClassVar[bool] = False
    """Whether several subnets may hold a unit, so that there may be more subnets than units."""

    def __call__(
        self, sizes: Mapping[str, int], num_subnets: int, *, seed: int, round: int
    ) -> Assignment:
        """Draws the assignment of one round.

        Args:
            sizes: Units per group.
            num_subnets: m.
            seed: Seed of the run.
            round: Index of the round.

        Raises:
            PartitionError: m is below 1, or above the size of the smallest group where no unit
                may be held twice.
        """
        if num_subnets < 1:
            raise PartitionError("at least one subnet is needed", got=num_subnets)
        small = min(sizes, key=lambda g: sizes[g], default=None)
        if not self.may_share and small is not None and num_subnets > sizes[small]:
            raise PartitionError(
                "more subnets than units: every subnet must hold at least one unit of every group",
                got=f"num_subnets={num_subnets}, group {small!r} has {sizes[small]} units",
                expected=f"num_subnets <= {sizes[small]}",
                remedy="lower num_subnets or widen that layer",
            )
        held = {}
        for group, size in sizes.items():
            generator = stream("assignment", seed, round, group)
            dealt = self.deal(size, num_subnets, generator)
            if len(dealt) != num_subnets:
                raise PartitionError(
                    f"{type(self).__name__}.deal must give every subnet its units of {group!r}",
                    got=f"{len(dealt)} subnets",
                    expected=num_subnets,
                )
            held[group] = tuple(units.sort().values for units in dealt)
        return Assignment(round=round, sizes=dict(sizes), held=held)

    @abstractmethod
    def deal(self, size: int, num_subnets: int, generator: Generator) -> list[Tensor]:
        """Units of each subnet, in any order, each at least one; 1 <= num_subnets <= size."""


@dataclass(frozen=True)
class DisjointUniform(Sampler):
    """A uniformly random partition into m blocks (GIST, Algorithm 1, ``subGCNs``; IST).

    Where m does not divide the size, the first subnets hold one unit more.
    """

    def deal(self, size: int, num_subnets: int, generator: Generator) -> list[Tensor]:
        """See :meth:`Sampler.deal`."""
        return list(torch.randperm(size, generator=generator).tensor_split(num_subnets))


@dataclass(frozen=True)
class Proportional(Sampler):
    """A uniformly random partition into blocks of given relative sizes, for unequal workers.

    Subnet ``i`` holds ``weights[i % len(weights)]`` over their sum of every group, rounded so that
    all units are dealt (largest remainders), and at least one unit.
    """

    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.weights or not all(0 < weight < math.inf for weight in self.weights):
            raise ConfigError("weights must be positive numbers", got=self.weights)

    @classmethod
    def to_speed(cls, speeds: Sequence[float]) -> Proportional:
        """Widths with which workers of these speeds take about equally long.

        The work of a subnet lies in products of hidden layer by hidden layer, and grows with the
        square of its width: widths go with the square roots of the speeds.
        """
        return cls(tuple(math.sqrt(speed) for speed in speeds))

    def deal(self, size: int, num_subnets: int, generator: Generator) -> list[Tensor]:
        """See :meth:`Sampler.deal`."""
        weights = [self.weights[i % len(self.weights)] for i in range(num_subnets)]
        exact = [(size - num_subnets) * weight / sum(weights) for weight in weights]
        counts = [1 + math.floor(share) for share in exact]
        order = sorted(range(num_subnets), key=lambda i: (math.floor(exact[i]) - exact[i], i))
        for i in order[: size - sum(counts)]:
            counts[i] += 1
        return list(torch.split(torch.randperm(size, generator=generator), counts))


@dataclass(frozen=True)
class Fixed(DisjointUniform):
    """The partition of round 0 in every round, for an ensemble of subnets that are never merged."""

    def __call__(
        self, sizes: Mapping[str, int], num_subnets: int, *, seed: int, round: int
    ) -> Assignment:
        """See :meth:`Sampler.__call__`."""
        return replace(super().__call__(sizes, num_subnets, seed=seed, round=0), round=round)


@dataclass(frozen=True)
class Whole(Sampler):
    """Every subnet holds every unit: replicas of the model, averaged on merging (local SGD)."""

    may_share: ClassVar[bool] = True

    def deal(self, size: int, num_subnets: int, generator: Generator) -> list[Tensor]:
        """See :meth:`Sampler.deal`."""
        return [torch.arange(size)] * num_subnets


@dataclass(frozen=True)
class Overlapping(Sampler):
    """A uniform partition in which every subnet is topped up to ``min_units`` units per group.

    The extra units are drawn uniformly from those the subnet does not hold, as the minimum depth
    of ResIST does with residual blocks; copies are averaged on merging. There may be more subnets
    than units.

    Attributes:
        min_units: Units of every group that a subnet holds at least; all of a smaller group.
        warmup_rounds: In so many rounds at the start every subnet holds all units: local SGD, with
            which ResIST warms up.
    """

    min_units: int = 1
    warmup_rounds: int = 0
    may_share: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, least in (("min_units", 1), ("warmup_rounds", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"{name} must be a whole number from {least} on", got=repr(value))

    def __call__(
        self, sizes: Mapping[str, int], num_subnets: int, *, seed: int, round: int
    ) -> Assignment:
        """See :meth:`Sampler.__call__`."""
        if round < self.warmup_rounds:
            return Whole()(sizes, num_subnets, seed=seed, round=round)
        return super().__call__(sizes, num_subnets, seed=seed, round=round)

    def deal(self, size: int, num_subnets: int, generator: Generator) -> list[Tensor]:
        """See :meth:`Sampler.deal`."""
        dealt = DisjointUniform().deal(size, num_subnets, generator)
        return [_top_up(units, min(self.min_units, size), size, generator) for units in dealt]


@dataclass(frozen=True)
class Bernoulli(Sampler):
    """Every subnet holds every unit with probability ``keep``, independently (masked neurons).

    A subnet that would be left without any unit is given one, drawn uniformly: a layer without
    units computes nothing.
    """

    keep: float
    may_share: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0.0 < self.keep <= 1.0:
            raise ConfigError("keep must be a probability in (0, 1]", got=self.keep)

    def masks(self, size: int, num_subnets: int, generator: Generator) -> Tensor:
        """What is drawn, before any subnet is given a unit: ``[num_subnets, size]`` bool."""
        return torch.rand(num_subnets, size, generator=generator) < self.keep

    def deal(self, size: int, num_subnets: int, generator: Generator) -> list[Tensor]:
        """See :meth:`Sampler.deal`."""
        masks = self.masks(size, num_subnets, generator)
        return [_top_up(mask.nonzero()[:, 0], 1, size, generator) for mask in masks]


@dataclass(frozen=True)
class Categorical(Sampler):
    """Every unit goes to exactly one subnet, drawn independently (masked neurons, IST).

    Subnet ``i`` is drawn with probability ``p[i]``; uniformly where ``p`` is None. A subnet that
    would be left without any unit takes one from the subnet that holds most.
    """

    p: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        fits = self.p is None or (min(self.p, default=-1) >= 0 and abs(sum(self.p) - 1) <= 1e-6)
        if not fits:
            raise ConfigError("p must be probabilities that sum to 1", got=self.p)

    def masks(self, size: int, num_subnets: int, generator: Generator) -> Tensor:
        """What is drawn, before any subnet takes a unit: ``[num_subnets, size]`` bool.

        Raises:
            PartitionError: another number of probabilities than subnets.
        """
        owner = self._owners(size, num_subnets, generator)
        return owner == torch.arange(num_subnets)[:, None]

    def deal(self, size: int, num_subnets: int, generator: Generator) -> list[Tensor]:
        """See :meth:`Sampler.deal`."""
        owner = self._owners(size, num_subnets, generator)
        for subnet in range(num_subnets):
            if not bool((owner == subnet).any()):
                richest = torch.bincount(owner, minlength=num_subnets).argmax()
                owner[(owner == richest).nonzero()[0]] = subnet
        return [(owner == subnet).nonzero()[:, 0] for subnet in range(num_subnets)]

    def _owners(self, size: int, num_subnets: int, generator: Generator) -> Tensor:
        if self.p is not None and len(self.p) != num_subnets:
            raise PartitionError(
                "Categorical needs one probability per subnet",
                got=f"{len(self.p)} probabilities",
                expected=f"{num_subnets}",
            )
        weights = torch.ones(num_subnets) if self.p is None else torch.tensor(self.p)
        return torch.multinomial(weights, size, replacement=True, generator=generator)


def _top_up(units: Tensor, at_least: int, size: int, generator: Generator) -> Tensor:
    missing = at_least - units.numel()
    if missing <= 0:
        return units
    order = torch.randperm(size, generator=generator)
    others = order[~torch.isin(order, units)]
    return torch.cat([units, others[:missing]])
