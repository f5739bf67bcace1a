"""The executor that picks: by what it measures in the first steps, or by rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from gist.errors import CheckpointError
from gist.execution.executor import RoundReport
from gist.execution.rounds import RoundExecutor
from gist.partition.assignment import Assignment
from gist.plan import RoundPlan


class AutoExecutor:
    """Runs each number of subnets with the executor that is faster at it here.

    The first time that a number of subnets comes up, every candidate takes a few steps whose
    outcome is thrown away; the fastest is kept for the rest of the run, and recorded, so that a
    resumed run picks the same without measuring. A single subnet needs no choice. Of several ranks,
    the slowest one's time counts, and all pick the same.

    Args:
        candidates: The executors, the reference first; they share the model and its store.
        by_rule: Take the last candidate without measuring, so that a run depends on its settings
            alone.
        say: Called with one sentence about every choice.
    """

    def __init__(
        self, candidates: list[RoundExecutor], *, by_rule: bool, say: Callable[[str], None]
    ) -> None:
        self._candidates = {executor.name: executor for executor in candidates}
        self._by_rule, self._say = by_rule, say
        self._reference, self._preferred = candidates[0], candidates[-1]
        self.choices: dict[str, dict[str, Any]] = {}

    @property
    def name(self) -> str:
        """The executor picked for the largest number of subnets so far; ``auto`` before."""
        if not self.choices:
            return "auto"
        return str(self.choices[max(self.choices, key=int)]["executor"])

    def run_round(self, plan: RoundPlan, assignment: Assignment) -> RoundReport:
        """Runs the round with the executor for its number of subnets."""
        m = str(plan.num_subnets)
        if m not in self.choices:
            self._choose(plan, assignment)
        return self._candidates[self.choices[m]["executor"]].run_round(plan, assignment)

    def _choose(self, plan: RoundPlan, assignment: Assignment) -> None:
        m = plan.num_subnets
        if m == 1:
            self.choices["1"] = {"executor": self._reference.name}
            return
        if self._by_rule:
            picked, seconds = self._preferred.name, {}
        else:
            seconds = {
                name: executor.trial_seconds(plan, assignment)
                for name, executor in self._candidates.items()
            }
            everyones = self._reference.comm.gather_values(seconds)
            seconds = {name: max(each[name] for each in everyones) for name in seconds}
            picked = min(seconds, key=lambda name: seconds[name])
        for name, executor in self._candidates.items():
            if name != picked:
                executor.release()
        self.choices[str(m)] = {"executor": picked, "seconds_per_step": seconds}
        measured = ", ".join(f"{name} {1e3 * s:.3g} ms" for name, s in seconds.items())
        why = f"a step of every subnet: {measured}" if measured else "by rule: deterministic=True"
        self._say(f"m = {m}: {picked} execution ({why})")

    def state_dict(self) -> dict[str, Tensor]:
        """The carried optimiser state, which all candidates share."""
        return self._reference.state_dict()

    def read_state(self, paths: Sequence[Path]) -> None:
        """Takes what :meth:`state_dict` gave."""
        self._reference.read_state(paths)

    def restore_choices(self, choices: Mapping[str, Any]) -> None:
        """Takes over what an earlier part of the run picked.

        Raises:
            CheckpointError: an executor that this run does not have.
        """
        unknown = [c["executor"] for c in choices.values() if c["executor"] not in self._candidates]
        if unknown:
            raise CheckpointError(
                "the run picked an executor that cannot run here",
                got=unknown[0],
                expected=" or ".join(self._candidates),
            )
        self.choices = {m: dict(choice) for m, choice in choices.items()}
