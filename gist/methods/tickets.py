"""Tickets: the filters that pruning keeps, and how early their ranking settles (LoFT)."""

from __future__ import annotations

from dataclasses import dataclass, field
from numbers import Real

import torch
from torch import Tensor, nn

from gist.errors import ConfigError
from gist.history import RoundRecord
from gist.partition.assignment import Assignment
from gist.partition.scores import ranked, unit_norms
from gist.partition.spec import PartitionSpec
from gist.partition.subnet import build_subnet
from gist.trainer import SubnetTrainer


@dataclass(frozen=True, kw_only=True)
class Ticket:
    """The filters that pruning keeps.

    Attributes:
        spec: Partition spec of the model.
        assignment: One subnet, which holds them.
        pruned: The share of every group's units that is left out.
    """

    spec: PartitionSpec
    assignment: Assignment
    pruned: float

    def cut(self, model: nn.Module) -> nn.Module:
        """A smaller dense model with the kept filters of ``model``, whose spec is the ticket's.

        Of the trained model, to be fine-tuned; of the model as it was initialised, or as it was
        early in training, to be rewound.
        """
        return build_subnet(model, self.spec, self.assignment, 0, width_correction=False)


def find_ticket(model: nn.Module, spec: PartitionSpec, *, pruned: float, p: float = 2.0) -> Ticket:
    """Keeps, in every group, the filters with the largest norms.

    Args:
        model: The model that ranks them.
        spec: Its partition spec.
        pruned: The share of every group that is left out, in [0, 1); at least one unit is kept.
        p: The norm; see :func:`~gist.partition.scores.unit_norms`. The paper does not say which it
            takes.

    Raises:
        ConfigError: ``pruned`` is out of range, or ``p`` below 1.
        PartitionError: the spec is of another model, or its units have no norm.
    """
    if not isinstance(pruned, Real) or not 0 <= pruned < 1:
        raise ConfigError("pruned must be a share in [0, 1)", got=repr(pruned))
    spec.check(model)
    held = {}
    for group, norms in unit_norms(model, spec, p).items():
        kept = max(1, round(len(norms) * (1 - pruned)))
        held[group] = (ranked(norms)[:kept].sort().values,)
    return Ticket(
        spec=spec, assignment=Assignment(round=0, sizes=spec.sizes, held=held), pruned=pruned
    )


def ranking_distance(before: Tensor, after: Tensor) -> float:
    """How far a ranking of filters moved, the first ranks counting most.

    ``F(σ) = Σ_i (1/i) |ln i - ln σ(i)|``, with ``σ(i)`` the new rank of the filter of rank ``i``
    (LoFT). Not symmetric.

    Args:
        before: ``[N]`` units, 0 to N - 1, by rank.
        after: ``[N]`` the same units by their new rank.

    Raises:
        ConfigError: they are no rankings of the same units.
    """
    size = len(before)
    units = torch.arange(size)
    if not all(torch.equal(each.sort().values, units) for each in (before, after)):
        raise ConfigError(
            "a ranking must name each of its units once",
            got=f"{before.tolist()[:8]} and {after.tolist()[:8]}",
            expected=f"0 to {size - 1} in some order, in both",
        )
    old = torch.arange(1, size + 1, dtype=torch.float64)
    new = (torch.argsort(after) + 1).double()[before]
    return float(((old.log() - new.log()).abs() / old).sum())


@dataclass(kw_only=True)
class FilterRanks:
    """A callback that keeps the ranking of every group's filters, round by round.

    >>> ranks = FilterRanks()
    >>> LoFTTrainer(model, data, callbacks=ranks).fit()
    >>> ranks.distances("stages.0.1.conv1")

    Attributes:
        p: The norm that ranks them.
        epochs: Budget spent, once for each ranking.
        rankings: For each group, its rankings: ``[N]`` units by rank.
    """

    p: float = 2.0
    epochs: list[float] = field(default_factory=list)
    rankings: dict[str, list[Tensor]] = field(default_factory=dict)

    def __call__(self, trainer: SubnetTrainer, record: RoundRecord) -> bool:
        """Ranks the model of a finished round; all workers take part, rank 0 keeps it."""
        model = trainer.gather_model()
        if model is not None:
            self.epochs.append(record.epochs)
            for group, norms in unit_norms(model, trainer.spec, self.p).items():
                self.rankings.setdefault(group, []).append(ranked(norms))
        return False

    def distances(self, group: str, to: Tensor | None = None) -> list[float]:
        """Distance of each ranking of a group to a final one; to the last that it had by default.

        Args:
            group: Its name.
            to: ``[N]`` units by rank, such as those of a full model that was trained.
        """
        final = self.rankings[group][-1] if to is None else to
        return [ranking_distance(ranking, final) for ranking in self.rankings[group]]
