"""The server's model: what of it a client is sent, and how answers become part of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gist.errors import PartitionError
from gist.federated.selection import Request
from gist.federated.strategies import Strategy
from gist.partition.assignment import Assignment
from gist.partition.parts import Part, check_part, output_layer
from gist.partition.spec import PartitionSpec, model_tensors
from gist.partition.transfer import Selection

Kept = dict[str, dict[str, Tensor]]
"""What is remembered from one merge to the next, by kind and name."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Answer:
    """What a client sends back.

    Attributes:
        part: Its tensors.
        losses: Of its first and its last local step.
    """

    part: Part
    losses: tuple[float, float]


class GlobalModel:
    """The model, its strategy, and what rule and selection remember.

    Args:
        model: Its tensors are changed in place.
        spec: Its partition spec.
        strategy: What is sent, and how it is merged.

    Attributes:
        tensors: The global parameters and buffers by full name.
        covered: For each group ``[size]`` int64: how many sound answers held each unit.

    Raises:
        PartitionError: outputs are masked, and the model has no layer with a row for each.
    """

    def __init__(self, model: nn.Module, spec: PartitionSpec, strategy: Strategy) -> None:
        self.spec, self.strategy = spec, strategy
        self.tensors = model_tensors(model)
        self.covered = {g: torch.zeros(n, dtype=torch.int64) for g, n in spec.sizes.items()}
        self._parameters = frozenset(name for name, _ in model.named_parameters())
        self._selection_state: dict[str, Tensor] = {}
        self._rule_state: dict[str, Tensor] = {}
        self._initial: dict[str, Tensor] = {}
        if strategy.masked_outputs:
            output_layer(spec)  # there must be one
        if strategy.selection.needs_initial:
            self._initial = {n: t.detach().clone() for n, t in self.tensors.items()}

    def tensors_now(self) -> Mapping[str, Tensor]:
        """See :class:`~gist.federated.selection.ServerView`."""
        return self.tensors

    def initial(self) -> Mapping[str, Tensor]:
        """See :class:`~gist.federated.selection.ServerView`."""
        return self._initial

    @property
    def needs_start(self) -> bool:
        """Whether rule or selection ask what was sent."""
        return self.strategy.rule.needs_start or self.strategy.selection.needs_start

    def deal(self, request: Request) -> Assignment:
        """The units of a client, as those of the only subnet."""
        selection = self.strategy.selection
        units = selection.select(self.spec.sizes, request, self, self._selection_state)
        return dealt(self.spec, request, units)

    def trained(self, request: Request, assignment: Assignment) -> frozenset[str]:
        """Those of the parameters that a client is sent which it trains."""
        parameters = (name for name in self._sent(assignment) if name in self._parameters)
        wanted = [name for name in parameters if self.tensors[name].requires_grad]
        return self.strategy.selection.trained(wanted, request)

    def returned(self, assignment: Assignment, trained: frozenset[str]) -> frozenset[str]:
        """The tensors of an answer: what was trained, and all that is no parameter."""
        return trained | (frozenset(self._sent(assignment)) - self._parameters)

    def take(self, request: Request, answer: Answer) -> None:
        """Checks an answer that may be merged; the selection learns from it.

        Raises:
            PartitionError: it does not fit what was sent, or would do harm.
        """
        if not math.isfinite(answer.losses[1]):
            raise PartitionError("the loss behind an update is no number", got=answer.losses[1])
        assignment = answer.part.assignment
        names = self.returned(assignment, self.trained(request, assignment))
        check_part(answer.part, self.spec, names=names, like=self.tensors)
        for group, (units,) in assignment.held.items():
            self.covered[group][units] += 1
        self.strategy.selection.observe(request, answer, self, self._selection_state)

    def merge(self, parts: Sequence[Part]) -> None:
        """Merges answers into the model."""
        self.strategy.rule.merge(self.tensors, self.spec, parts, self._rule_state)

    def kept(self) -> Kept:
        """What a checkpoint holds besides the model."""
        return {
            "selection": self._selection_state,
            "rule": self._rule_state,
            "initial": self._initial,
            "covered": self.covered,
        }

    def restore(self, kept: Kept) -> None:
        """Takes what :meth:`kept` gave."""
        self._selection_state, self._rule_state = kept["selection"], kept["rule"]
        self._initial = kept["initial"]
        self.covered = {name: t.cpu() for name, t in kept["covered"].items()}

    def _sent(self, assignment: Assignment) -> Iterable[str]:
        """The tensors of which a client is sent any entry."""
        held = Selection(self.spec, assignment, 0)
        return (name for name, layout in self.spec.layouts.items() if held.holds(layout))


def dealt(spec: PartitionSpec, request: Request, units: Mapping[str, Tensor]) -> Assignment:
    """A client's units as the only subnet of an assignment."""
    return Assignment(
        round=request.merges,
        sizes=spec.sizes,
        held={group: (held,) for group, held in units.items()},
    )
