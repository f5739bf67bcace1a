"""The stacked executor: on one device, m sub-GCNs are one grouped GCN."""

from __future__ import annotations

from typing import Any

from gist.execution.local import ELEMENTWISE
from gist.execution.program import Program
from gist.execution.rounds import shape_of
from gist.execution.serial import SerialExecutor
from gist.partition.assignment import Assignment
from gist.partition.grouped.grouping import NotGroupableError
from gist.partition.grouped.model import group_model
from gist.partition.subnet import build_subnet, width_scales
from gist.partition.transfer import Selection


class StackedExecutor(SerialExecutor):
    """Runs subnets of one shape side by side, as one grouped model.

    Their features lie in one tensor ``[n, m, k]``: the graph product, normalisations and
    activations run once over all of them, and each linear layer is m small products instead of
    one that is m times as large. Subnets of different shapes (m does not divide a width) are
    stacked shape by shape, in the order of the subnets; one that has no equal beside it runs alone.

    Args:
        *args: As for :class:`~gist.execution.rounds.RoundExecutor`.
        most: Subnets that are stacked at most, where memory sets a limit.
        **kwargs: Likewise.
    """

    name = "stacked"

    def __init__(self, *args: Any, most: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.most = most

    def chunks(self, assignment: Assignment) -> list[range]:
        """Runs of this rank's subnets, one after the other of one shape."""
        own = self.own(assignment)
        shapes = {i: shape_of(self.spec, assignment, i) for i in own}
        chunks: list[range] = []
        for i, shape in shapes.items():
            last = chunks[-1] if chunks else range(0)
            full = self.most is not None and len(last) >= self.most
            if len(last) and shapes[last[0]] == shape and not full:
                chunks[-1] = range(last[0], i + 1, own.step)
            else:
                chunks.append(range(i, i + 1))
        return chunks

    def build(self, assignment: Assignment, subnets: range) -> Program:
        """One grouped model; a narrow one for a subnet on its own."""
        if len(subnets) == 1:
            return super().build(assignment, subnets)
        narrow = build_subnet(
            self.model,
            self.spec,
            assignment,
            subnets[0],
            width_correction=False,
            filled=False,
            device=self.device,
        )
        selection = Selection(self.spec, assignment, subnets[0])
        scales = width_scales(self.spec, selection, self.config.width_correction)
        grouped = group_model(narrow, self.spec, scales, len(subnets))
        return Program(grouped, size=len(subnets), grouped=True, config=self.config)


def check_optimizer(optimizer: Any) -> None:
    """Refuses an optimiser that would see stacked subnets as one.

    Raises:
        NotGroupableError: it is not known to update every entry on its own.
    """
    if type(optimizer) not in ELEMENTWISE:
        raise NotGroupableError(
            f"{type(optimizer).__name__} is not known to update every entry on its own",
            expected=" or ".join(kind.__name__ for kind in ELEMENTWISE),
            remedy="use executor='serial'",
        )
