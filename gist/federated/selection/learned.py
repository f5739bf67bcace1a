"""Units that are chosen by what came of those that were chosen before, client by client."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gist.errors import ConfigError
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
)
from gist.partition.scores import ranked
from gist.partition.streams import stream


@dataclass(frozen=True, kw_only=True)
class AdaptiveDropout(Selection):
    """Adaptive federated dropout: what made the loss fall is kept, else it is drawn by score.

    Bouacida et al., 2020 (arXiv 2011.04050). Where the loss of a client's last task was below that
    of the one before, it is sent the same units again, and their scores have grown by the loss's
    relative fall, ``(l_before - l) / l_before``. Else ``ceil(p n)`` units are drawn without
    replacement, in proportion to their scores, which start at 1. Merged by
    :class:`~gist.partition.merging.CountMean`.

    As implemented here, where the paper's details were not at hand: the loss is that of the last
    local step; scores start at 1, so that all units are equally likely at first; a loss that falls
    below zero has fallen by 1 at most.

    Attributes:
        per_client: Whether every client has scores of its own, ``8 n`` bytes each and as many for
            its units; else one set of them is for all, and losses of different clients are
            compared.
    """

    per_client: bool = True

    def choose(self, widths: Widths, request: Request, view: ServerView, state: State) -> Units:
        """See :meth:`Selection.choose`."""
        who = self._who(request)
        chosen = {}
        for group, (count, size) in widths.items():
            kept = state.get(f"{who}.kept/{group}")
            if kept is None or kept.numel() != count:
                scores = state.get(f"{who}.scores/{group}", torch.ones(size, dtype=torch.float64))
                generator = stream("selection", request.seed, request.task, group)
                kept = torch.multinomial(scores.cpu(), count, generator=generator)
            chosen[group] = kept
        return chosen

    def observe(
        self, request: Request, report: Report, view: ServerView, state: SelectionState
    ) -> None:
        """See :meth:`Selection.observe`."""
        who, loss = self._who(request), report.losses[1]
        before = float(state.get(f"{who}.loss", torch.tensor(math.nan)))
        fell = loss < before
        for group, (units,) in report.part.assignment.held.items():
            state.pop(f"{who}.kept/{group}", None)
            size = view.spec.groups[group].size
            if fell and units.numel() < size:
                key = f"{who}.scores/{group}"
                scores = state.get(key, torch.ones(size, dtype=torch.float64)).cpu().clone()
                scores[units] += 1.0 if loss < 0 else (before - loss) / before
                state[key], state[f"{who}.kept/{group}"] = scores, units.clone()
        state[f"{who}.loss"] = torch.tensor(loss, dtype=torch.float64)

    def _who(self, request: Request) -> str:
        return str(request.client) if self.per_client else "all"


@dataclass(frozen=True, kw_only=True)
class Helios(Selection):
    """Helios' soft training: a client's units that moved most, others in rotation, none for long.

    Xu et al., 2021 (arXiv 1912.01684). Of the ``k = ceil(p n)`` units of a client come first those
    that it has left out in ``patience / p`` of its turns or more, the longest first; then the
    ``core k`` whose weights moved most, by L1, when it last trained them; then others, uniformly
    drawn. Clients that can train everything do. Merged by :class:`~gist.partition.merging.DataMean`
    by volume: how much of the model an answer holds.

    As implemented here, where the paper's details were not at hand: the order of the three, the
    contribution of a unit as the L1 change of the weights that it indexes in the client's own
    update (:func:`~gist.partition.scores.unit_changes`), and both defaults.

    Attributes:
        core: Share of a client's units that go by what they contributed.
        patience: A unit is overdue after so many times the ``1 / p`` turns that going through all
            units takes.

    Raises:
        ConfigError: a value out of range.
    """

    core: float = 0.5
    patience: float = 2.0

    needs_start: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_share("core", self.core)
        if not 1 <= self.patience < math.inf:
            raise ConfigError("patience must be a number from 1 on", got=self.patience)

    def choose(self, widths: Widths, request: Request, view: ServerView, state: State) -> Units:
        """See :meth:`Selection.choose`."""
        chosen = {}
        for group, (count, size) in widths.items():
            moved, idle = (each.cpu() for each in self._known(request, group, size, state))
            overdue = ranked(idle)[: int((idle >= self.patience * size / count).sum())]
            core = ranked(moved)[: min(int(self.core * count), int((moved > 0).sum()))]
            others = drawn(size, size, request.seed, request.task, group)
            order = dict.fromkeys(torch.cat([overdue, core, others]).tolist())
            chosen[group] = torch.tensor(list(order)[:count])
        return chosen

    def observe(
        self, request: Request, report: Report, view: ServerView, state: SelectionState
    ) -> None:
        """See :meth:`Selection.observe`."""
        changes = changes_in(report, view, p=1.0)
        for group, (units,) in report.part.assignment.held.items():
            size = view.spec.groups[group].size
            if units.numel() < size:
                moved, idle = (each.cpu() for each in self._known(request, group, size, state))
                moved, idle = moved.clone(), idle + 1
                moved[units], idle[units] = changes[group][units], 0
                state[f"{request.client}.moved/{group}"] = moved
                state[f"{request.client}.idle/{group}"] = idle

    def _known(
        self, request: Request, group: str, size: int, state: State
    ) -> tuple[Tensor, Tensor]:
        """How far each unit moved when the client last trained it, and how many turns ago."""
        nothing = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.int64)
        return (
            state.get(f"{request.client}.moved/{group}", nothing[0]),
            state.get(f"{request.client}.idle/{group}", nothing[1]),
        )
