"""One set of units for all clients, the most important ones, made anew now and then."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gist.errors import ConfigError, require_count
from gist.federated.selection.base import (
    Report,
    Request,
    Selection,
    SelectionState,
    ServerView,
    State,
    Units,
    Widths,
    changes_in,
    drawn,
    require_share,
    rounded_up,
)
from gist.partition.scores import ranked, unit_norms


@dataclass(frozen=True, kw_only=True)
class FederatedPruning(Selection):
    """Federated pruning: the units of largest norm, ever fewer of them.

    Lin et al., 2022 (arXiv 2209.06359). The first ``ceil(min(p, 1 - s) n)`` of the ``n`` units of a
    group by the norm of the weights that compute them (:func:`~gist.partition.scores.unit_norms`),
    in the global model as it is. The sparsity ``s`` grows with the share ``t`` of the budget that
    is spent, ``s = sparsity (1 - (1 - min(1, t / until))^3)`` (Zhu & Gupta 2017). Merged by
    :class:`~gist.partition.merging.CountMean`.

    As implemented here, where the paper's details were not at hand: the norm and the schedule. A
    client with a smaller capacity holds the first of the same units.

    Attributes:
        sparsity: Share of every group that is left out in the end, in [0, 1).
        until: Share of the budget by which it is reached.
        p: The norm.

    Raises:
        ConfigError: a value out of range.
    """

    sparsity: float = 0.5
    until: float = 0.5
    p: float = 2.0

    def __post_init__(self) -> None:
        require_share("until", self.until, zero=False)
        if not 0 <= self.sparsity < 1:
            raise ConfigError("sparsity must be in [0, 1)", got=self.sparsity)
        if not self.p >= 1:
            raise ConfigError("p must be 1 or more", got=self.p)

    def count(self, size: int, request: Request) -> int:
        """See :meth:`Selection.count`."""
        left = 1 - min(1.0, request.progress / self.until)
        return rounded_up(size, min(request.capacity, 1 - self.sparsity * (1 - left**3)))

    def choose(self, widths: Widths, request: Request, view: ServerView, state: State) -> Units:
        """See :meth:`Selection.choose`."""
        norms = unit_norms(view.tensors_now(), view.spec, self.p)
        return {group: ranked(norms[group])[:count] for group, (count, _) in widths.items()}


@dataclass(frozen=True, kw_only=True)
class PruneFL(Selection):
    """PruneFL, adapted to units: those with the largest gradients per time, one set for all.

    Jiang et al., 2019 (arXiv 1909.12326) prune single weights, greedily by squared gradient per
    unit of time, and do so anew every 50 rounds. Here the set is made of units: the first
    ``ceil(p n)`` of every group by mean ``Σ grad²`` over the weights that a unit indexes. The set
    is at first drawn by the seed, and stays as it is in between. Merged by
    :class:`~gist.partition.merging.DataMean`.

    This is an adaptation in more than that. Units of one group take equally long, and how many a
    client holds of each group is its capacity, as the clock asks beforehand: the greedy choice by
    gradient per time is one by gradient within each group. Gradients are seen through the clients'
    updates, ``(trained - sent)²``, which scale with the squared learning rate. What nobody held has
    none: units that never were come first in the next set, and others keep what they had last.

    Attributes:
        every: Merges after which the set is made anew.

    Raises:
        ConfigError: it is no number of merges.
    """

    every: int = 50

    needs_start: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_count("every", self.every)

    def choose(self, widths: Widths, request: Request, view: ServerView, state: State) -> Units:
        """See :meth:`Selection.choose`."""
        chosen = {}
        for group, (count, size) in widths.items():
            scores = state.get(f"scores/{group}")
            first = drawn(size, size, request.seed, "first", group)
            order = first if scores is None else ranked(scores.cpu())
            chosen[group] = order[:count]
        return chosen

    def observe(
        self, request: Request, report: Report, view: ServerView, state: SelectionState
    ) -> None:
        """See :meth:`Selection.observe`."""
        sizes, period = view.spec.sizes, request.merges // self.every
        if period > int(state.get("period", torch.tensor(0))):
            state["period"] = torch.tensor(period)
            for group in sizes:
                self._make_anew(group, sizes[group], state)
        squares = changes_in(report, view, p=2.0)
        for group, (units,) in report.part.assignment.held.items():
            sums, times = (each.clone() for each in _seen(group, sizes[group], state))
            sums[units] += squares[group][units]
            times[units] += 1
            state[f"sums/{group}"], state[f"times/{group}"] = sums, times

    def _make_anew(self, group: str, size: int, state: SelectionState) -> None:
        never = torch.full((size,), math.inf, dtype=torch.float64)
        sums, times = _seen(group, size, state)
        last = state.get(f"scores/{group}", never).cpu()
        state[f"scores/{group}"] = torch.where(times > 0, sums / times.clamp(min=1), last)
        state[f"sums/{group}"] = torch.zeros_like(sums)
        state[f"times/{group}"] = torch.zeros_like(times)


def _seen(group: str, size: int, state: State) -> tuple[Tensor, Tensor]:
    """Since the set was made: sums of squares of each unit, and of how many updates."""
    nothing = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.int64)
    return (
        state.get(f"sums/{group}", nothing[0]).cpu(),
        state.get(f"times/{group}", nothing[1]).cpu(),
    )
