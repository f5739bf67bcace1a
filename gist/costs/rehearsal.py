"""A run rehearsed on tensors without memory: its own code, counted instead of computed."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from gist.config import TrainConfig
from gist.costs.tally import Tally, without_memory
from gist.execution.local import train_locally
from gist.execution.program import Program
from gist.execution.rounds import RoundExecutor
from gist.execution.serial import SerialExecutor
from gist.execution.stacked import StackedExecutor
from gist.graph.outline import OutlineObjective
from gist.metrics import loss
from gist.modes import keeps_modes
from gist.partition.rules.registry import without_caches
from gist.partition.spec import PartitionSpec, model_tensors
from gist.plan import RoundPlan


class Stage:
    """Where a run is rehearsed: everything that is made on it is counted.

    Attributes:
        tally: What is alive on the stage.
        device: The device that its tensors seem to be on.
    """

    def __init__(self, device: torch.device) -> None:
        self.tally = Tally()
        self.device = device
        self._mode = without_memory()

    @contextmanager
    def computing(self) -> Iterator[None]:
        """All tensors that are made are without memory: those of models, data and steps."""
        with _disable_current_modes(), _Copying(), self._mode, self.tally:
            yield

    @contextmanager
    def arranging(self) -> Iterator[None]:
        """Tensors made of such without memory are so too; others, as indices of units, are real."""
        before, self.tally.decides = self.tally.decides, False
        try:
            with _Copying(), self.tally:
                yield
        finally:
            self.tally.decides = before

    @contextmanager
    def peak(self, peaks: dict[str, int], name: str) -> Iterator[None]:
        """Raises ``peaks[name]`` to the most that is alive inside; apart from inner peaks."""
        outer = self.tally.peak
        self.tally.peak = self.tally.bytes
        try:
            yield
        finally:
            peaks[name] = max(peaks.get(name, 0), self.tally.peak)
            self.tally.peak = max(outer, self.tally.bytes)

    def outline(self, model: nn.Module) -> nn.Module:
        """A copy of a model whose tensors are without memory."""
        with self.computing(), without_caches(model):
            memo: dict[int, Any] = {}
            for tensor in model_tensors(model).values():
                new: Tensor = torch.empty_like(tensor.detach(), device=self.device)
                if isinstance(tensor, nn.Parameter):
                    new = nn.Parameter(new, requires_grad=tensor.requires_grad)
                memo[id(tensor)] = new
            return copy.deepcopy(model, memo)


class _Copying(TorchFunctionMode):
    """Copies tensors without memory, which torch's own deep copy takes for tensors with some."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.__deepcopy__ and isinstance(args[0], FakeTensor):
            tensor, memo = args
            if id(tensor) not in memo:
                new: Tensor = tensor.detach().clone()
                if isinstance(tensor, nn.Parameter):
                    new = nn.Parameter(new, requires_grad=tensor.requires_grad)
                memo[id(tensor)] = new
            return memo[id(tensor)]
        return func(*args, **(kwargs or {}))


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


class _Rehearsing(RoundExecutor):
    """Runs rounds of two steps on shapes; the second one finds the optimiser's state."""

    stage: Stage
    peaks: dict[str, int]
    flops: int
    objective: OutlineObjective
    _known: dict[Program, int]
    _turns: Counter[Program]

    def rehearse(self, stage: Stage, plans: Iterable[RoundPlan]) -> Rounds:
        """Runs rounds one after the other.

        Args:
            stage: Where; the model and the objective are on it.
            plans: The first round of each number of subnets, in the order in which they come.
        """
        self.stage, self.peaks, self._known, self._turns = stage, {}, {}, Counter()
        before = stage.tally.bytes
        step_flops: dict[int, int] = {}
        taking_turns: set[Program] = set()
        for plan in plans:
            self.flops = 0
            assignment = self.config.sampler_for()(
                self.spec.sizes, plan.num_subnets, seed=self.config.seed, round=plan.index
            )
            self._turns.clear()
            with stage.arranging(), stage.peak(self.peaks, "arranging"):
                self.run_round(plan, assignment)
            step_flops[plan.num_subnets] = self.flops
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

    def _train(self, program: Program, plan: RoundPlan, subnets: range) -> Tensor:
        if program not in self._known:
            self._known[program] = self._step_flops(program, plan, subnets)
        self._turns[program] += 1
        self.flops += self._known[program]
        return torch.zeros(len(subnets))

    def _step_flops(self, program: Program, plan: RoundPlan, subnets: range) -> int:
        tally, counts = self.stage.tally, []
        for _ in range(2):
            before = tally.flops
            with (
                self._streams(plan, subnets),
                self.stage.computing(),
                self.stage.peak(self.peaks, "training"),
            ):
                batches = self._batches(plan, subnets, 1)
                train_locally(program, self.objective, batches, [1.0], self.config)
            counts.append(tally.flops - before)
        # Products with the batch are made in its first step; those with the whole graph once.
        return counts[0] if self.objective.rebuilds else counts[1]


class _SerialRehearsal(_Rehearsing, SerialExecutor):
    pass


class _StackedRehearsal(_Rehearsing, StackedExecutor):
    pass


def rehearse_rounds(
    stage: Stage,
    model: nn.Module,
    spec: PartitionSpec,
    objective: OutlineObjective,
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


def rehearse_evaluation(
    stage: Stage, model: nn.Module, objective: OutlineObjective, *, on_batch: bool = False
) -> tuple[int, int]:
    """Bytes that the scores of all nodes take while they are computed, and the operations.

    What the graph keeps from then on, normalised matrices and products with the input, is made in
    it and stays on the stage.

    Args:
        stage: Where the model and the objective are.
        model: The whole model.
        objective: The data side.
        on_batch: Compute them batch by batch, rather than in one pass.
    """
    tally, data = stage.tally, objective.data
    seen: tuple[Tensor, Any] = (data.x, data.adjacency)
    if on_batch:
        seen = (objective.batch.x, objective.batch.graph)
    peaks: dict[str, int] = {}
    with stage.computing(), torch.no_grad(), keeps_modes(model):
        model.eval()
        objective.scores(model, *seen)  # makes what stays
        before, operations = tally.bytes, tally.flops
        with stage.peak(peaks, "evaluation"):
            every = data.x.new_empty(data.num_nodes if on_batch else 0, data.num_classes)
            scores = objective.scores(model, *seen)
            loss(data.task, scores, data.y[: len(scores)])
            del every
    batches = -(-data.num_nodes // len(seen[0]))
    return peaks["evaluation"] - before, (tally.flops - operations) * batches


def _bytes(values: Any) -> int:
    storages = [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
    return sum({id(storage): storage.nbytes() for storage in storages}.values())
