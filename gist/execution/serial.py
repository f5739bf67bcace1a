"""The serial executor: one subnet after the other. The reference for every other executor."""

from __future__ import annotations

from gist.execution.program import Program
from gist.execution.rounds import RoundExecutor
from gist.partition.assignment import Assignment
from gist.partition.subnet import build_subnet


class SerialExecutor(RoundExecutor):
    """Runs the subnets of a round one after the other; see :class:`RoundExecutor`."""

    name = "serial"

    def chunks(self, assignment: Assignment) -> list[range]:
        """Every subnet of this rank on its own."""
        return [range(i, i + 1) for i in self.own(assignment)]

    def build(self, assignment: Assignment, subnets: range) -> Program:
        """One narrow model."""
        module = build_subnet(
            self.model,
            self.spec,
            assignment,
            subnets[0],
            width_correction=self.config.width_correction,
            filled=False,
            device=self.device,
        )
        return Program(module, size=1, grouped=False, config=self.config)
