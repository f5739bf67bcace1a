"""How a server works: what it sends, when it merges, and by which rule; by name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gist.errors import ConfigError, one_of, require_count
from gist.federated.selection import (
    AdaptiveDropout,
    FederatedPruning,
    FedSelect,
    Helios,
    HeteroDrop,
    NestedPrefix,
    PartialTensors,
    Prefix,
    PruneFL,
    Rolling,
    Selection,
    UniformDrop,
)
from gist.partition.merging import CohortDelta, CountMean, DataMean, MergeRule, Mix

LEVELS = (1.0, 0.5, 0.25, 0.125, 0.0625)
"""Capacities of HeteroFL's five kinds of clients."""


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """What a server sends its clients, and what it makes of their answers.

    >>> slower = replace(STRATEGIES["asyncdrop"], rule=Mix(alpha=0.2))

    Attributes:
        selection: Which units a client is sent.
        rule: How answers become part of the model.
        capacity: Share of the units that a client can train; or several such levels, which are
            dealt to the clients by speed, the fastest first.
        synchronous: Whether the server sends work to a cohort, and waits for all of it.
        per_merge: Answers that an asynchronous server waits for before it merges them.
        proximal: µ of FedProx: clients are drawn back to where they started.
        masked_outputs: Whether outputs of classes that a client has no samples of are 0 in its
            loss (HeteroFL), and are not merged from its answer.
    """

    selection: Selection = field(default_factory=Prefix)
    rule: MergeRule = field(default_factory=DataMean)
    capacity: float | Sequence[float] = 1.0
    synchronous: bool = False
    per_merge: int = 1
    proximal: float = 0.0
    masked_outputs: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.capacity, str):
            raise ConfigError(
                "capacity must be a share, or several", got=repr(self.capacity), expected="numbers"
            )
        levels = self.levels
        if not levels or not all(0 < level <= 1 for level in levels):
            raise ConfigError(
                "capacity must be a share of the units, or several of them, the fastest first",
                got=self.capacity,
                expected="above 0, and at most 1",
            )
        require_count("per_merge", self.per_merge)
        if self.synchronous and self.per_merge != 1:
            raise ConfigError(
                "per_merge is for asynchronous servers; in_flight is the cohort",
                got=f"per_merge={self.per_merge}, synchronous=True",
            )
        if not 0 <= self.proximal < math.inf:
            raise ConfigError("proximal must be a number of at least 0", got=self.proximal)

    @property
    def levels(self) -> tuple[float, ...]:
        """Capacities, the fastest clients' first."""
        given = self.capacity
        return (float(given),) if isinstance(given, int | float) else tuple(map(float, given))

    def to_json(self) -> dict[str, Any]:
        """Its name, where it is one of :data:`STRATEGIES` but for capacity, else its text."""
        names = (n for n, s in STRATEGIES.items() if replace(s, capacity=self.capacity) == self)
        several = not isinstance(self.capacity, int | float)
        return {
            "strategy": next(names, repr(self)),
            "capacity": list(self.levels) if several else self.levels[0],
        }

    def capacities(self, ranks: Sequence[int]) -> list[float]:
        """The capacity of each client, by its place among all by speed."""
        levels = self.levels
        return [levels[rank * len(levels) // len(ranks)] for rank in ranks]


STRATEGIES: Mapping[str, Strategy] = {
    "asyncdrop": Strategy(selection=HeteroDrop(), rule=Mix(alpha=0.5), capacity=0.75),
    "asyncdrop-uniform": Strategy(selection=UniformDrop(), rule=Mix(alpha=0.5), capacity=0.75),
    "fedavg": Strategy(synchronous=True),
    "fedprox": Strategy(synchronous=True, proximal=0.01),
    "async-fedavg": Strategy(rule=Mix(alpha=0.5)),
    "fedasync": Strategy(rule=Mix(alpha=0.6, staleness_power=0.5)),
    "fedbuff": Strategy(rule=CohortDelta(staleness_power=0.5), per_merge=10),
    "fjord": Strategy(selection=NestedPrefix(), rule=DataMean(), capacity=LEVELS, synchronous=True),
    "async-fjord": Strategy(selection=NestedPrefix(), rule=Mix(alpha=0.5), capacity=LEVELS),
    "heterofl": Strategy(
        selection=Prefix(),
        rule=CountMean(),
        capacity=LEVELS,
        synchronous=True,
        masked_outputs=True,
    ),
    "fedrolex": Strategy(
        selection=Rolling(),
        rule=CountMean(),
        capacity=LEVELS,
        synchronous=True,
        masked_outputs=True,
    ),
    "federated-dropout": Strategy(
        selection=UniformDrop(), rule=CountMean(), capacity=0.75, synchronous=True
    ),
    "afd": Strategy(selection=AdaptiveDropout(), rule=CountMean(), capacity=0.75, synchronous=True),
    "helios": Strategy(
        selection=Helios(), rule=DataMean(by="volume"), capacity=LEVELS, synchronous=True
    ),
    "pvt": Strategy(selection=PartialTensors(), rule=CountMean(), capacity=0.5, synchronous=True),
    "fedselect": Strategy(
        selection=FedSelect(), rule=CohortDelta(), capacity=0.5, synchronous=True
    ),
    "federated-pruning": Strategy(selection=FederatedPruning(), rule=CountMean(), synchronous=True),
    "prunefl": Strategy(selection=PruneFL(), rule=DataMean(), capacity=0.5, synchronous=True),
}
"""Strategies by name; the sources are those of their selections and rules.

``fedavg``: McMahan et al. 2017. ``fedprox``: Li et al. 2020. ``fedasync``: Xie et al. 2019, with
its polynomial staleness weight. ``async-fedavg``: FedAsync without it, the AsyncDrop paper's
baseline. ``fedbuff``: Nguyen et al. 2022. ``fjord``: Horvath et al. 2021; ``async-fjord``: the
AsyncDrop paper's baseline.
"""


def make_strategy(strategy: str | Strategy) -> Strategy:
    """A strategy by name, or the given one.

    Raises:
        ConfigError: an unknown name.
    """
    if isinstance(strategy, Strategy):
        return strategy
    one_of("strategy", strategy, STRATEGIES)
    return STRATEGIES[strategy]
