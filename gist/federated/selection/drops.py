"""Units that are left out at random, or by how far they have moved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from gist.federated.selection.base import (
    Request,
    Selection,
    ServerView,
    State,
    Units,
    Widths,
    drawn,
    rounded,
)
from gist.partition.scores import ranked, unit_changes


@dataclass(frozen=True, kw_only=True)
class HeteroDrop(Selection):
    """Hetero AsyncDrop: fast clients leave out the units that moved most, slow ones train them.

    Dun et al., AISTATS 2023, algorithm 3, and the authors' code. The ``n`` units of a group are
    sorted by ``||W_now - W_init||_1`` (:func:`~gist.partition.scores.unit_changes`), the largest
    first. ``k = floor((1 - p) n)`` of them are left out: those from place ``rank n // num_ranks``
    on, or the last ``k``, where that is too far back.

    Deviations: the authors start at ``rank * int(n / num_ranks)``, which is 0 for everybody as soon
    as there are more clients than units, so that all leave out the same. They score and drop in
    some stages alone; here all groups are dropped from. Before the first merge nothing has moved,
    and of equals the lower number comes first.
    """

    needs_initial: ClassVar[bool] = True

    def choose(self, widths: Widths, request: Request, view: ServerView, state: State) -> Units:
        """See :meth:`Selection.choose`."""
        changes = unit_changes(view.tensors_now(), view.initial(), view.spec)
        chosen = {}
        for group, (kept, size) in widths.items():
            order = ranked(changes[group])
            start = min(request.rank * size // request.num_ranks, kept)
            chosen[group] = torch.cat([order[:start], order[start + size - kept :]])
        return chosen


@dataclass(frozen=True, kw_only=True)
class UniformDrop(Selection):
    """Uniform AsyncDrop and federated dropout: every task its own units, uniformly drawn.

    ``n - floor((1 - p) n)`` of the ``n`` units of a group. Dun et al., AISTATS 2023; Caldas et al.,
    "Expanding the Reach of Federated Learning by Reducing Client Resource Requirements", 2018;
    Guliani et al., 2021 (arXiv 2110.03634); with capacities that follow from the clients' channels,
    FedDrop (2021, arXiv 2109.15258).

    Deviations: federated dropout rounds ``p n`` to the nearest number, AsyncDrop as here. A client
    has one rate for all groups, where Guliani et al. have one for each layer.
    """

    def choose(self, widths: Widths, request: Request, view: ServerView, state: State) -> Units:
        """See :meth:`Selection.choose`."""
        return {
            group: drawn(size, count, request.seed, request.task, group)
            for group, (count, size) in widths.items()
        }


@dataclass(frozen=True, kw_only=True)
class FedSelect(Selection):
    """FedSelect with random keys: ``round(p n)`` of the ``n`` units of a group, uniformly drawn.

    Charles et al., "Federated Select", 2022 (arXiv 2208.09432); merged by
    :class:`~gist.partition.merging.CohortDelta` with a server optimiser.

    Deviations: keys that are a client's most frequent features are not there, as units are hidden
    ones, and input features are held whole by everybody. Keys of several groups are drawn apart.

    Attributes:
        shared: Whether all tasks that are sent after the same merge have the same keys: a cohort
            then works on the same units, or on the first of them, where a client can train fewer.
    """

    shared: bool = False

    def count(self, size: int, request: Request) -> int:
        """See :meth:`Selection.count`."""
        return rounded(size, request.capacity)

    def choose(self, widths: Widths, request: Request, view: ServerView, state: State) -> Units:
        """See :meth:`Selection.choose`."""
        key = ("merge", request.merges) if self.shared else ("task", request.task)
        return {
            group: drawn(size, count, request.seed, *key, group)
            for group, (count, size) in widths.items()
        }
