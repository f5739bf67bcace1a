"""The rounds of a run, rehearsed: some of their subnets, on tensors without memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, MutableMapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gist.config import TrainConfig
from gist.costs.stage import Stage
from gist.execution.local import train_locally
from gist.execution.objective import Objective
from gist.execution.program import Program
from gist.execution.rounds import RoundExecutor, shape_of
from gist.execution.serial import SerialExecutor
from gist.execution.stacked import StackedExecutor
from gist.partition.assignment import Assignment
from gist.partition.spec import PartitionSpec
from gist.partition.transfer import held_entries
from gist.plan import RoundPlan


class Rehearsable(Objective, Protocol):
    """The data side of a run on the stage, whose steps all see one batch."""

    @property
    def rebuilds(self) -> bool:
        """Whether steps see batches that were made for them, and products with these."""


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """What the rounds of a run take on one worker.

    Attributes:
        subnets: Bytes of the parameters and buffers of all programs that are kept between rounds.
        turned: Bytes of those of programs that train several chunks of a round in turn.
        optimizer: Bytes of their optimiser states.
        gradients: Bytes of the gradients of the largest program.
        carried: Bytes of the optimiser state of the whole model, where it is carried.
        training: Most bytes that are alive in a local step, on top of what was before the rounds.
        arranging: Likewise while subnets are built, loaded and merged.
        step_flops: For each number of subnets, operations of one step of every subnet.
    """

    subnets: int
    turned: int
    optimizer: int
    gradients: int
    carried: int
    training: int
    arranging: int
    step_flops: dict[int, int]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Excerpt(Assignment):
    """Some subnets of a round, numbered anew.

    Attributes:
        whole: The round, which says what units are shared.
        chunks: The subnets, those that are trained at once together.
    """

    whole: Assignment
    chunks: list[range]

    @classmethod
    def of(cls, whole: Assignment, chunks: Sequence[range]) -> _Excerpt:
        """Those of some chunks."""
        chosen = [subnet for chunk in chunks for subnet in chunk]
        ends = accumulate(map(len, chunks), initial=0)
        return cls(
            round=whole.round,
            sizes=whole.sizes,
            held={group: tuple(deal[i] for i in chosen) for group, deal in whole.held.items()},
            whole=whole,
            chunks=[range(start, end) for start, end in pairwise(ends)],
        )

    @cached_property
    def disjoint_groups(self) -> frozenset[str]:
        """Groups in which no unit is held twice in the whole round."""
        return self.whole.disjoint_groups

    def holders(self, group: str, unit: int) -> list[int]:
        """As of any assignment, without operations on tensors, which would be counted."""
        return [i for i, units in enumerate(self._units[group]) if unit in units]

    @cached_property
    def _units(self) -> dict[str, list[set[int]]]:
        return {group: [set(each.tolist()) for each in deal] for group, deal in self.held.items()}


class _Rehearsing(RoundExecutor):
    """Runs rounds of two steps on shapes; the second one finds the optimiser's state.

    Of chunks that do the same work, one or two stand for all.
    """

    stage: Stage
    peaks: dict[str, int]
    objective: Rehearsable
    _known: MutableMapping[Program, tuple[int, int]]
    _turns: MutableMapping[Program, int]
    _flops: dict[Hashable, int]
    _assignment: _Excerpt

    def rehearse(self, stage: Stage, plans: Iterable[RoundPlan]) -> Rounds:
        """Runs rounds one after the other.

        Args:
            stage: Where; the model and the objective are on it.
            plans: The first round of each number of subnets, in the order in which they come.
        """
        self.stage, self.peaks = stage, {}
        self._known, self._turns = WeakKeyDictionary(), WeakKeyDictionary()  # none is kept by them
        before = stage.tally.bytes
        step_flops: dict[int, int] = {}
        taking_turns: set[Program] = set()
        for plan in plans:
            assignment = self.config.sampler_for()(
                self.spec.sizes, plan.num_subnets, seed=self.config.seed, round=plan.index
            )
            times = Counter(self._work(assignment, chunk) for chunk in self.chunks(assignment))
            self._assignment = _Excerpt.of(assignment, self._representatives(assignment))
            self._turns.clear()
            self._flops = {}
            with stage.arranging(), stage.peak(self.peaks, "arranging"):
                self.run_round(plan, self._assignment)
            step_flops[plan.num_subnets] = sum(times[w] * n for w, n in self._flops.items())
            taking_turns |= {program for program, turns in self._turns.items() if turns > 1}
        programs = list(self._programs.values())
        state = [_bytes(list(program.optimizer.state.values())) for program in programs]
        wanted = [[p for p in o.parameters.values() if p.requires_grad] for o in programs]
        return Rounds(
            subnets=_bytes([program.tensors for program in programs]),
            turned=_bytes([program.tensors for program in taking_turns]),
            optimizer=sum(state),
            gradients=max(map(_bytes, wanted)),
            carried=_bytes(self.state_dict()),
            training=self.peaks["training"] - before,
            arranging=self.peaks["arranging"] - before,
            step_flops=step_flops,
        )

    def chunks(self, assignment: Assignment) -> list[range]:
        """Those of the executor; of an excerpt, its own."""
        if isinstance(assignment, _Excerpt):
            return assignment.chunks
        return super().chunks(assignment)  # type: ignore[safe-super]  # of what it is mixed into

    def _work(self, assignment: Assignment, chunk: range) -> Hashable:
        """Equal for chunks that do the same work: blocks of a group differ in what they print."""
        subnet = chunk[0]
        blocks = Counter(
            (group, str(self.model.get_submodule(path)))
            for path, (group, unit) in self.spec.blocks.items()
            if subnet in assignment.holders(group, unit)
        )
        widths = assignment.widths(subnet)
        return len(chunk), frozenset(widths.items()), frozenset(blocks.items())

    def _representatives(self, assignment: Assignment) -> list[range]:
        """Chunks that take as much memory, and do all kinds of work, as all of the round."""
        chunks = self.chunks(assignment)
        if self.carried is not None:  # the states of all subnets are alive when the round ends
            return chunks
        alike: dict[Hashable, list[range]] = {}
        for chunk in chunks:
            alike.setdefault(self._work(assignment, chunk), []).append(chunk)
        if self.spec.blocks:
            return self._of_blocks(assignment, chunks, list(alike.values()))
        return sorted((c for same in alike.values() for c in same[:2]), key=lambda c: c[0])

    def _of_blocks(
        self, assignment: Assignment, chunks: list[range], alike: list[list[range]]
    ) -> list[range]:
        """The same where subnets that are alike differ in their blocks, and so in their programs.

        One of each kind, at least two, so that one program is built while there is another. The
        largest comes last: its program stays. Of blocks that are averaged, all means are there in
        the end: then it takes all chunks, unless these hold the same blocks.
        """
        chosen = [same[0] for same in alike] if len(alike) > 1 else alike[0][:2]
        groups = {group for group, _ in self.spec.blocks.values()}
        shapes = {shape_of(self.spec, assignment, chunk[0]) for chunk in chunks}
        if len(shapes) > 1 and not groups <= assignment.disjoint_groups:
            chosen = chunks
        return sorted(chosen, key=lambda c: held_entries(self.spec, assignment, c[0], self.tensors))

    def _train(self, program: Program, plan: RoundPlan, subnets: range) -> Tensor:
        if program not in self._known:
            self._known[program] = self._two_steps(program, plan, subnets)
        flops, passing = self._known[program]
        peak = self.stage.tally.bytes + passing  # later, means of what others hold are there too
        self.peaks["training"] = max(self.peaks.get("training", 0), peak)
        self._turns[program] = self._turns.get(program, 0) + 1
        self._flops[self._work(self._assignment, subnets)] = flops
        return torch.zeros(len(subnets))

    def _two_steps(self, program: Program, plan: RoundPlan, subnets: range) -> tuple[int, int]:
        """Operations of a step, and the bytes that it takes beside what is there after it."""
        tally, counts = self.stage.tally, []
        peaks: dict[str, int] = {}
        for _ in range(2):
            before = tally.flops
            with (
                self._streams(plan, subnets),
                self.stage.computing(),
                self.stage.peak(peaks, "training"),
            ):
                batches = self._batches(plan, subnets, 1)
                train_locally(program, self.objective, batches, [1.0], self.config)
            counts.append(tally.flops - before)
        # Products with the batch are made in its first step; those with the whole graph once.
        flops = counts[0] if self.objective.rebuilds else counts[1]
        return flops, peaks["training"] - tally.bytes


class _SerialRehearsal(_Rehearsing, SerialExecutor):
    pass


class _StackedRehearsal(_Rehearsing, StackedExecutor):
    pass


def rehearse_rounds(
    stage: Stage,
    model: nn.Module,
    spec: PartitionSpec,
    objective: Rehearsable,
    config: TrainConfig,
    plans: Iterable[RoundPlan],
    *,
    most: int | None = None,
) -> Rounds:
    """What the rounds of a run take.

    Args:
        stage: Where the model and the objective are.
        model: The global model.
        spec: Its partition spec.
        objective: Batches and loss.
        config: Settings of the run.
        plans: The first round of each number of subnets, in the order in which they come.
        most: Subnets that run side by side at most; None for one after the other.

    Raises:
        NotGroupableError: a layer has no grouped form.
    """
    config = replace(config, compile=False, callbacks=())
    args = (model, spec, objective, config)
    if most is None:
        return _SerialRehearsal(*args).rehearse(stage, plans)
    return _StackedRehearsal(*args, most=most).rehearse(stage, plans)


def _bytes(values: Any) -> int:
    storages = [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
    return sum({id(storage): storage.nbytes() for storage in storages}.values())
