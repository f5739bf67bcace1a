"""The server's model: what of it a client is sent, and how answers become part of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from gist.federated.flower.messages import Outcome
from gist.federated.selection import Request
from gist.federated.server import Answer
from gist.federated.strategies import Strategy
from gist.partition.assignment import Assignment
from gist.partition.merging import Part, check_part
from gist.partition.spec import PartitionSpec, model_tensors
from gist.partition.transfer import Selection, extract


@dataclass(frozen=True, kw_only=True, eq=False)
class Sent:
    """What is remembered of a task until it is answered.

    Attributes:
        request: What was known.
        assignment: The units that were sent.
        trained: Parameters that the client trains.
        start: What was sent, where the strategy asks for it.
    """

    request: Request
    assignment: Assignment
    trained: frozenset[str]
    start: Mapping[str, Tensor] | None


class GlobalModel:
    """The model, its strategy, and what rule and selection remember.

    Args:
        model: Its tensors are changed in place.
        spec: Its partition spec.
        strategy: What is sent, and how it is merged.
    """

    def __init__(self, model: nn.Module, spec: PartitionSpec, strategy: Strategy) -> None:
        self.spec, self.strategy = spec, strategy
        self._tensors = model_tensors(model)
        self._parameters = frozenset(name for name, _ in model.named_parameters())
        self._selection_state: dict[str, Tensor] = {}
        self._rule_state: dict[str, Tensor] = {}
        self._initial: dict[str, Tensor] = {}
        if strategy.selection.needs_initial:
            self._initial = {n: t.detach().clone() for n, t in self._tensors.items()}

    def tensors_now(self) -> Mapping[str, Tensor]:
        """See :class:`~gist.federated.selection.ServerView`."""
        return self._tensors

    def initial(self) -> Mapping[str, Tensor]:
        """See :class:`~gist.federated.selection.ServerView`."""
        return self._initial

    def cut(self, request: Request) -> tuple[Sent, dict[str, Tensor]]:
        """A client's units, and copies of the entries that it is sent."""
        selection, rule = self.strategy.selection, self.strategy.rule
        units = selection.select(self.spec.sizes, request, self, self._selection_state)
        assignment = Assignment(
            round=request.merges,
            sizes=self.spec.sizes,
            held={group: (held,) for group, held in units.items()},
        )
        tensors = extract(self._tensors, self.spec, assignment, 0)
        wanted = [n for n in tensors if n in self._parameters and self._tensors[n].requires_grad]
        sent = Sent(
            request=request,
            assignment=assignment,
            trained=selection.trained(wanted, request),
            start=tensors if rule.needs_start or selection.needs_start else None,
        )
        return sent, tensors

    def take(self, sent: Sent, outcome: Outcome, *, merges: int) -> Part:
        """What of an answer can be merged; the selection learns from it.

        Args:
            sent: What was sent.
            outcome: What came back.
            merges: Of the server, so far.

        Raises:
            PartitionError: it does not fit what was sent, or would do harm.
        """
        part = Part(
            assignment=sent.assignment,
            tensors=outcome.tensors,
            start=sent.start,
            weight=outcome.samples,
            staleness=merges - sent.request.merges,
            classes=outcome.classes,
        )
        held = Selection(self.spec, sent.assignment, 0)
        names = [name for name, layout in self.spec.layouts.items() if held.holds(layout)]
        check_part(
            part,
            self.spec,
            names=[n for n in names if n in sent.trained or n not in self._parameters],
            like=self._tensors,
        )
        report = Answer(part=part, losses=outcome.losses)
        self.strategy.selection.observe(sent.request, report, self, self._selection_state)
        return part

    def merge(self, parts: Sequence[Part]) -> None:
        """Takes answers into the model."""
        self.strategy.rule.merge(self._tensors, self.spec, parts, self._rule_state)
