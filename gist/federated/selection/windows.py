"""Units that lie side by side: prefixes, nested ones, and windows that roll on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from gist.errors import ConfigError, require_count
from gist.federated.selection.base import (
    Request,
    Selection,
    ServerView,
    State,
    Units,
    Widths,
    rounded_up,
)
from gist.partition.streams import stream

Turn = Literal["merges", "turns"]


@dataclass(frozen=True, kw_only=True)
class Prefix(Selection):
    """HeteroFL: the first ``ceil(p K)`` of the ``K`` units of a group, always.

    Diao et al., ICLR 2021; merged by :class:`~gist.partition.merging.CountMean`. The other parts of
    HeteroFL are settings: its scaler of activations is ``width_correction``, its static BatchNorm
    ``recalibrate_bn`` (the default), its clipping ``clip_norm=1.0`` (not the default), its masked
    loss :attr:`~gist.federated.strategies.Strategy.masked_outputs` (so in the strategy).
    """

    def choose(self, widths: Widths, request: Request, view: ServerView, state: State) -> Units:
        """See :meth:`Selection.choose`."""
        return {group: torch.arange(count) for group, (count, _) in widths.items()}


@dataclass(frozen=True, kw_only=True)
class NestedPrefix(Prefix):
    """FjORD's ordered dropout: a prefix whose width is drawn from levels up to the client's.

    Horvath et al., NeurIPS 2021: ``p`` is uniform over the levels up to the client's capacity, and
    the units are the first ``ceil(p K)``. All groups of a task have the same ``p``. Merged by
    :class:`~gist.partition.merging.DataMean`, whose means over holders are those of nested blocks.

    Deviations: ``p`` is drawn for each task, where the paper draws one for each batch; there is no
    distillation from the wider to the narrower, and no BatchNorm for each width. The client's
    capacity itself is always one of the levels, so that none is without.

    Attributes:
        levels: Widths, as shares in (0, 1].

    Raises:
        ConfigError: levels that are no shares, or none.
    """

    levels: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 1.0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(self.levels))
        if not self.levels or not all(0 < level <= 1 for level in self.levels):
            raise ConfigError("levels must be shares in (0, 1]", got=self.levels)

    def width(self, request: Request) -> float:
        """The share of every group that a task is sent."""
        below = sorted({level for level in self.levels if level < request.capacity})
        widths = [*below, request.capacity]
        generator = stream("width", request.seed, request.task)
        return widths[int(torch.randint(len(widths), (), generator=generator))]

    def count(self, size: int, request: Request) -> int:
        """See :meth:`Selection.count`."""
        return rounded_up(size, self.width(request))


@dataclass(frozen=True, kw_only=True)
class Rolling(Selection):
    """FedRolex: a window that moves on, ``{(r s + j) mod K : j < ceil(p K)}``.

    Alam et al., NeurIPS 2022, with ``s = 1`` and ``r`` the round, so that all units are trained
    equally often; merged by :class:`~gist.partition.merging.CountMean`.

    Where the server is asynchronous there is no round. Counting its merges, all clients together
    still train the units about equally often, but one whose tasks start a multiple of ``K`` merges
    apart is sent the same window each time, and its data trains no other. Counting the client's own
    turns, its data trains every unit within ``K - ceil(p K) + 1`` of them (``ceil(1 / p)`` with
    ``step=None``), whatever the others do: that is the right count there. With all clients in every
    round both are the paper's; with cohorts of some of them, ``"merges"`` is.

    Attributes:
        by: What ``r`` counts: ``"merges"`` of the server, or the client's own ``"turns"``.
        step: ``s``, in units; None for the width of the window.

    Raises:
        ConfigError: a value that cannot be used.
    """

    by: Turn = "merges"
    step: int | None = 1

    def __post_init__(self) -> None:
        if self.by not in get_args(Turn):
            raise ConfigError("by is 'merges' or 'turns'", got=repr(self.by))
        if self.step is not None:
            require_count("step", self.step)

    def choose(self, widths: Widths, request: Request, view: ServerView, state: State) -> Units:
        """See :meth:`Selection.choose`."""
        turn = request.merges if self.by == "merges" else request.own
        return {
            group: (torch.arange(count) + turn * (self.step or count) % size) % size
            for group, (count, size) in widths.items()
        }
