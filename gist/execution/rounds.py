"""One round on one device: load this rank's subnets, train them, save them."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from gist.config import TrainConfig
from gist.errors import DivergedError
from gist.execution.comm import Comm
from gist.execution.distributed import ShardedState
from gist.execution.executor import RoundReport
from gist.execution.lane import Lane
from gist.execution.local import train_locally
from gist.execution.members import MemberStates
from gist.execution.objective import Objective
from gist.execution.partfiles import read_rows, read_whole, tensor_names
from gist.execution.program import Program
from gist.execution.store import MemoryStore, RoundTransfer, Store
from gist.partition.assignment import Assignment
from gist.partition.optim_state import CarriedState, State
from gist.partition.spec import PartitionSpec, model_tensors
from gist.partition.streams import seeded, seeded_each
from gist.plan import RoundPlan

_KEPT_PROGRAMS = 16
"""Programs that are kept for reuse; samplers with random sizes give ever new shapes. Which blocks
are absent is another shape nearly every time: then the last one is kept alone."""


class RoundExecutor(ABC):
    """Runs the subnets of a round on one device; subclasses say how many at once.

    Subnets of equal shape share one program, whose tensors are refilled in place: no model and no
    optimiser is rebuilt between rounds. Of several ranks, each runs every ``W``-th subnet.

    Args:
        model: The global model.
        spec: Its partition spec.
        objective: Batches and loss.
        config: Run settings.
        store: Where the global parameters live; the model itself by default.
        comm: The ranks that the subnets are spread over; this process alone by default.
        carried: The optimiser's state between rounds; by default as ``config`` says.
    """

    name: str

    def __init__(
        self,
        model: nn.Module,
        spec: PartitionSpec,
        objective: Objective,
        config: TrainConfig,
        store: Store | None = None,
        comm: Comm | None = None,
        carried: CarriedState | None = None,
    ) -> None:
        self.model, self.spec, self.objective, self.config = model, spec, objective, config
        self.store = store or MemoryStore(model, spec)
        self.tensors = model_tensors(model)
        self.device = self.store.device
        self.comm = comm or Comm()
        self.carried = carried
        if config.optimizer_state == "carry" and carried is None:
            parameters = dict(model.named_parameters())
            if self.comm.is_distributed:
                self.carried = ShardedState(spec, parameters, self.device, self.comm)
            else:
                self.carried = CarriedState(spec, parameters, self.device)
        self._programs: dict[Hashable, Program] = {}

    @abstractmethod
    def chunks(self, assignment: Assignment) -> list[range]:
        """This rank's subnets of a round, in order, those that are trained at once together."""

    @abstractmethod
    def build(self, assignment: Assignment, subnets: range) -> Program:
        """The program that trains these subnets, its tensors not yet filled."""

    def own(self, assignment: Assignment) -> range:
        """The subnets of a round that this rank trains."""
        return self.comm.subnets(assignment.num_subnets)

    def run_round(self, plan: RoundPlan, assignment: Assignment) -> RoundReport:
        """Loads, trains and saves every subnet of one round; all ranks take part.

        Raises:
            DivergedError: a subnet's loss is not finite; names the round and the subnet.
            WorkerLostError: another rank died.
        """
        losses: list[Tensor] = []
        states: list[State] = []
        sent, received = self.comm.sent, self.comm.received
        waited, start = 0.0, time.perf_counter()
        if self.carried is not None:
            self.carried.open(assignment)
        with (
            self.store.open(assignment) as transfer,
            Lane(beside=self.store.overlaps and len(self.chunks(assignment)) > 1) as lane,
        ):
            for subnets, program in self._loaded(transfer, lane, assignment):
                self._restart(program, subnets)
                waited += time.perf_counter() - start
                losses.append(self._train(program, plan, subnets))
                start = time.perf_counter()
                for part in program.parts():
                    lane.submit(transfer.save, part)
                if self.carried is not None:
                    states += [program.state(place) for place in range(len(subnets))]
            every = self._losses_of_all(plan, assignment, losses)
            lane.submit(transfer.finish)
            lane.wait()
        if self.carried is not None:
            self.carried.merge(states)
        waited += time.perf_counter() - start
        return RoundReport(
            train_loss=float(every.mean()),
            repartition_seconds=waited,
            bytes_sent=self.comm.sent - sent,
            bytes_received=self.comm.received - received,
        )

    def _losses_of_all(
        self, plan: RoundPlan, assignment: Assignment, losses: list[Tensor]
    ) -> Tensor:
        """``[m]``: the mean loss of every subnet, on every rank: all stop where one must."""
        if self.comm.size == 1:
            return torch.cat(losses)
        m, size = assignment.num_subnets, self.comm.size
        kinds = [loss.dtype for loss in losses] or [next(self.model.parameters()).dtype]
        own = torch.cat([*losses, torch.empty(0, device=self.device)])
        counts = [len(self.comm.subnets(m, rank)) for rank in range(size)]
        parts = self.comm.gather(own.double().to(self.comm.device), counts)
        every = torch.empty(m, dtype=torch.float64)
        for rank, part in enumerate(parts):
            every[rank::size] = part.cpu()
        for subnet in (~torch.isfinite(every)).nonzero()[:, 0].tolist():
            raise _diverged(plan, subnet, every[subnet].item())
        return every.to(kinds[0])

    def _loaded(
        self, transfer: RoundTransfer, lane: Lane, assignment: Assignment
    ) -> Iterator[tuple[range, Program]]:
        """The chunks in order, each with its program, filled.

        Beside the training of one chunk, the next is loaded into other tensors: those of the chunk
        before, once it is saved.
        """
        waiting: deque[tuple[range, Program, dict[str, Tensor], Future[None]]] = deque()
        turns: WeakKeyDictionary[Program, int] = WeakKeyDictionary()  # keeps none of them

        def next_one() -> tuple[range, Program]:
            subnets, program, tensors, loaded = waiting.popleft()
            loaded.result()
            if lane.beside:
                program.use(tensors)
            return subnets, program

        for subnets in self.chunks(assignment):
            program = self._program(assignment, subnets)
            turn = turns.get(program, 0)
            tensors = program.buffers(turn) if lane.beside else program.tensors
            turns[program] = turn + 1
            loaded = lane.submit(transfer.load, subnets, tensors)
            waiting.append((subnets, program, tensors, loaded))
            if len(waiting) > (1 if lane.beside else 0):
                yield next_one()
        while waiting:
            yield next_one()

    def trial_seconds(self, plan: RoundPlan, assignment: Assignment, steps: int = 3) -> float:
        """Seconds that one step of every subnet takes: the fastest of a few, which leave no trace.

        Only the first program of the round is tried, and the others are taken to be like it. All
        steps see one batch, made before the clock runs: in a round, batches come prefetched or are
        kept, so that a step waits for its training alone.
        """
        chunks = self.chunks(assignment)
        if self.carried is not None:
            self.carried.open(assignment)
        with self.store.open(assignment) as transfer:
            if not chunks:  # a rank without a subnet
                return 0.0
            program = self._program(assignment, chunks[0])
            transfer.load(chunks[0], program.tensors)
        self._restart(program, chunks[0])
        with self._streams(plan, chunks[0]):
            batches = list(self._batches(plan, chunks[0], steps=1))
        best, spent = float("inf"), 0.0
        for step in range(steps):
            start = time.perf_counter()
            with self._streams(plan, chunks[0]):
                train_locally(program, self.objective, batches, [1.0], self.config)
            seconds = time.perf_counter() - start
            best, spent = min(best, seconds), spent + seconds
            if step and spent > 5.0:  # what the first one prepares is no part of a step
                break
        return best * len(self.own(assignment)) / len(chunks[0])

    def state_dict(self) -> dict[str, Tensor]:
        """The carried optimiser state; empty where it is reset."""
        return {} if self.carried is None else self.carried.state_dict()

    def read_state(self, paths: Sequence[Path]) -> None:
        """Takes what :meth:`state_dict` gave, of one rank or several, from files."""
        if self.carried is None or not paths:
            return
        if isinstance(self.carried, MemberStates):
            self.carried.read(paths)
            return
        self.carried.room_for(tensor_names(paths))
        if isinstance(self.carried, ShardedState):
            shards = self.carried.shards
            assert shards is not None
            read_rows(paths, shards.tensors, shards.homes, shards.all_rows())
        else:
            read_whole(paths, self.carried.tensors, self.carried.spec)

    def release(self) -> None:
        """Frees the programs that are kept for reuse."""
        self._programs.clear()

    def _program(self, assignment: Assignment, subnets: range) -> Program:
        shape = (len(subnets), shape_of(self.spec, assignment, subnets[0]))
        if shape not in self._programs:
            if len(self._programs) >= (1 if self.spec.blocks else _KEPT_PROGRAMS):
                self._programs.pop(next(iter(self._programs)))
            self._programs[shape] = self.build(assignment, subnets)
        return self._programs[shape]

    def _restart(self, program: Program, subnets: Sequence[int]) -> None:
        states = None
        if self.carried is not None:
            states = [self.carried.cut(subnet) for subnet in subnets]
        program.restart(self.tensors, states)

    def _streams(self, plan: RoundPlan, subnets: range) -> AbstractContextManager[None]:
        keys = [("train", self.config.seed, plan.index, subnet) for subnet in subnets]
        if len(keys) == 1:
            return seeded(*keys[0], device=self.device)
        return seeded_each(*keys, device=self.device)

    def _batches(self, plan: RoundPlan, subnets: range, steps: int) -> Iterable[Any]:
        shared = self.config.shared_batches
        if shared is None:
            shared = self.config.executor not in ("serial", "distributed")
        return self.objective.batches(
            seed=self.config.seed,
            round=plan.index,
            subnet=0 if shared else subnets[0],
            steps=steps,
        )

    def _train(self, program: Program, plan: RoundPlan, subnets: range) -> Tensor:
        """Mean loss of each subnet: ``[len(subnets)]``."""
        with self._streams(plan, subnets):
            batches = self._batches(plan, subnets, plan.local_steps)
            losses = train_locally(program, self.objective, batches, plan.rate_factors, self.config)
        return self._means(plan, subnets, losses)

    def _means(self, plan: RoundPlan, subnets: range, losses: Tensor) -> Tensor:
        """``[len(subnets)]`` from ``[steps, len(subnets)]``; refuses those that are not finite."""
        mean = losses.mean(dim=0)
        diverged = (~torch.isfinite(mean)).nonzero()
        if len(diverged) and self.comm.size == 1:  # else all ranks learn of it together
            place = int(diverged[0])
            raise _diverged(plan, subnets[place], losses[-5:, place].tolist())
        return mean


def _diverged(plan: RoundPlan, subnet: int, got: Any) -> DivergedError:
    return DivergedError(
        f"round {plan.index}, subnet {subnet}: the training loss is no longer finite",
        got=got,
        remedy="lower lr, set clip_norm, or use a model with normalisation",
    )


def shape_of(spec: PartitionSpec, assignment: Assignment, subnet: int) -> Hashable:
    """What must be equal for two subnets to share a program: their widths, and absent modules."""
    absent = [
        path
        for path, (group, unit) in spec.blocks.items()
        if subnet not in assignment.holders(group, unit)
    ]
    return (*sorted(assignment.widths(subnet).items()), *absent)
