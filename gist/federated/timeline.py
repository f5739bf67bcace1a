"""What happens when, on the clock of a federated run: made before anything is trained.

How long a task takes depends on how many units it holds, and not on which, nor on what is learnt:
so the whole course of a run is a function of the fleet, the settings and the seed.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count

import torch

from gist.errors import ConfigError
from gist.federated.fleet import Fleet
from gist.federated.selection import Request
from gist.partition.streams import stream

RETURNED = ("returned", "repeated", "corrupt")
"""Fates of tasks of which an answer comes."""

_PATIENCE = 1000
"""Tasks in a row that may end without a sound answer before the run is refused."""

_DRAWS = 64
"""Clients drawn in vain before all of them are looked at."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a task takes.

    Attributes:
        seconds: Of the clock: the local steps, and sending both ways.
        download: Bytes from the server.
        upload: Bytes to the server.
    """

    seconds: float
    download: int
    upload: int


@dataclass(frozen=True, kw_only=True)
class Task:
    """One piece of work that a client is sent.

    Attributes:
        request: Who was sent it, and what was known then.
        start: Seconds of the clock.
        finish: When its answer comes; where none comes, when the server stops to wait.
        fate: What becomes of it; see :meth:`Fleet.fate`.
        rate: Factor on the base learning rate.
        cost: What it takes.
    """

    request: Request
    start: float
    finish: float
    fate: str
    rate: float
    cost: Cost

    @property
    def number(self) -> int:
        """Counted over the run."""
        return self.request.task

    @property
    def answers(self) -> bool:
        """Whether anything comes back."""
        return self.fate in RETURNED

    @property
    def is_sound(self) -> bool:
        """Whether what comes back is no garbage."""
        return self.answers and self.fate != "corrupt"


@dataclass(frozen=True, kw_only=True)
class Merge:
    """The server takes answers into the model: one round of the run.

    Attributes:
        time: Seconds of the clock.
        tasks: Numbers of the tasks that ended since the last merge, as they did: one that was
            answered twice is there twice, and one that was given up once.
    """

    time: float
    tasks: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """The course of a run.

    Attributes:
        tasks: All that were sent, by number; the last ones may be under way at the end.
        merges: In order.
    """

    tasks: tuple[Task, ...]
    merges: tuple[Merge, ...]

    @cached_property
    def started(self) -> tuple[tuple[int, ...], ...]:
        """For each merge, the tasks that were sent since the one before, by number."""
        found: list[list[int]] = [[] for _ in range(len(self.merges) + 1)]
        for task in self.tasks:
            found[task.request.merges].append(task.number)
        return tuple(map(tuple, found))

    @cached_property
    def merged_at(self) -> dict[int, int]:
        """The merge that each answered task belongs to; one of garbage, too."""
        return {
            number: index
            for index, merge in reversed([*enumerate(self.merges)])
            for number in merge.tasks
            if self.tasks[number].answers
        }

    def staleness(self, number: int) -> int:
        """Merges between the start of an answered task and its own."""
        return self.merged_at[number] - self.tasks[number].request.merges

    def staleness_counts(self) -> dict[int, int]:
        """How many answers were how stale."""
        return dict(sorted(Counter(map(self.staleness, self.merged_at)).items()))

    @cached_property
    def merged(self) -> tuple[tuple[int, ...], ...]:
        """For each merge, the tasks whose answers it takes in, each once, as they came."""
        found: list[list[int]] = [[] for _ in self.merges]
        for index, merge in enumerate(self.merges):
            for number in dict.fromkeys(merge.tasks):
                if self.tasks[number].is_sound and self.merged_at[number] == index:
                    found[index].append(number)
        return tuple(map(tuple, found))


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """When clients are sent work, and when their answers are merged.

    Attributes:
        in_flight: Tasks that are under way at a time.
        per_merge: Sound answers that the server waits for before it merges them.
        synchronous: Send so many tasks at once, and wait for all of them.
        timeout: Seconds after which the server stops to wait for an answer; None for twice what
            the task takes.
    """

    in_flight: int = 10
    per_merge: int = 1
    synchronous: bool = False
    timeout: float | None = None


def simulate(
    fleet: Fleet,
    protocol: Protocol,
    cost: Callable[[Request], Cost],
    *,
    capacities: Sequence[float],
    rate: Callable[[float], float],
    seed: int,
    merges: int | None = None,
    duration: float | None = None,
) -> Timeline:
    """Runs the clock: nothing sleeps, and ties go to the task that was sent first.

    The learning rate is shared, and led by the fastest client: it is lowered to what the spent
    budget asks for whenever the fastest of those under way answers (AsyncDrop, Algorithm 3).

    Args:
        fleet: The clients.
        protocol: See there.
        cost: What a task takes.
        capacities: Of each client, the share of the units that it can train.
        rate: The factor on the base learning rate after a share of the budget in [0, 1).
        seed: Of the choice of clients and their fates.
        merges: The budget; or
        duration: Seconds of the clock.

    Raises:
        ConfigError: nothing is merged within the budget, or no answers come any more.
    """
    spent = _Budget(merges=merges, duration=duration)
    clock = _Clock(fleet, protocol, cost, capacities, rate, spent, seed)
    clock.fill()
    while clock.queue and not spent.is_spent(len(clock.merges), clock.queue[0][0]):
        clock.advance()
        if clock.in_vain >= _PATIENCE:
            raise ConfigError(
                f"of {clock.in_vain:,} tasks in a row none has a sound answer in time",
                got=f"timeout={protocol.timeout}, lost={fleet.lost}, corrupt={fleet.corrupt}",
                expected=f"the last would take {clock.tasks[-1].cost.seconds:.3g} seconds",
                remedy="raise timeout, or lower local_steps or what goes wrong in the fleet",
            )
    if not clock.merges:
        raise ConfigError(
            "no answer of a client comes within the budget",
            got=f"duration={duration}" if merges is None else f"rounds={merges}",
            expected=f"the first may come after {min(t.finish for t in clock.tasks):.3g} seconds",
            remedy="raise the budget, or lower local_steps",
        )
    return Timeline(tasks=tuple(clock.tasks), merges=tuple(clock.merges))


@dataclass(frozen=True, kw_only=True)
class _Budget:
    merges: int | None
    duration: float | None

    def is_spent(self, merges: int, time: float) -> bool:
        """Whether the run is over before what comes next, at ``time``."""
        if self.merges is not None:
            return merges >= self.merges
        return self.duration is not None and time > self.duration

    def share(self, merges: int, time: float) -> float:
        """The share that is spent, in [0, 1)."""
        if self.merges is not None:
            return min(merges / self.merges, 1 - 1e-9)
        return min(time / (self.duration or math.inf), 1 - 1e-9)


class _Clock:
    """The state of the simulation; events are (seconds, task, order), a task of -1 wakes it up."""

    def __init__(
        self,
        fleet: Fleet,
        protocol: Protocol,
        cost: Callable[[Request], Cost],
        capacities: Sequence[float],
        rate: Callable[[float], float],
        budget: _Budget,
        seed: int,
    ) -> None:
        self.fleet, self.protocol, self.cost, self.capacities = fleet, protocol, cost, capacities
        self.rate, self.budget, self.seed = rate, budget, seed
        self.ranks = fleet.ranks()
        self.time, self.factor = 0.0, rate(0.0)
        self.tasks: list[Task] = []
        self.merges: list[Merge] = []
        self.queue: list[tuple[float, int, int]] = []
        self._order = count()
        self._flying: dict[int, int] = {}  # clients that are at work, with their task
        self._own: Counter[int] = Counter()
        self._ended: list[int] = []
        self._heard = 0
        self.in_vain = 0

    def advance(self) -> None:
        """The next event, and what follows from it."""
        self.time, number, _ = heapq.heappop(self.queue)
        if number >= 0:
            self._end(self.tasks[number])
        self.fill()

    def _end(self, task: Task) -> None:
        self._ended.append(task.number)
        client, leads = task.request.client, False
        if self._flying.get(client) == task.number:
            del self._flying[client]
            self.in_vain = 0 if task.is_sound else self.in_vain + 1
            if task.is_sound:
                self._heard += 1
                others = (self.ranks[other] for other in self._flying)
                leads = task.request.rank < min(others, default=math.inf)
        cohort = self.protocol.synchronous
        complete = not self._flying if cohort else self._heard >= self.protocol.per_merge
        if complete and self._heard:
            self.merges.append(Merge(time=self.time, tasks=tuple(self._ended)))
            self._heard, self._ended = 0, []
        if leads:
            self.factor = self.rate(self._progress())

    def fill(self) -> None:
        """Sends work to as many clients as may be at work and are there."""
        if self.protocol.synchronous and self._flying:
            return
        while len(self._flying) < self.protocol.in_flight:
            client = self._choose()
            if client is None:
                return
            self._send(client)

    def _send(self, client: int) -> None:
        number = len(self.tasks)
        request = Request(
            client=client,
            task=number,
            own=self._own[client],
            merges=len(self.merges),
            capacity=self.capacities[client],
            rank=self.ranks[client],
            num_ranks=len(self.fleet),
            progress=self._progress(),
            seed=self.seed,
        )
        self._own[client] += 1
        self._flying[client] = number
        fate, cost, limit = self.fleet.fate(self.seed, number), self.cost(request), math.inf
        if self.protocol.timeout is not None:
            limit = self.protocol.timeout
        wait = cost.seconds
        if fate == "lost":
            wait = 2 * wait if math.isinf(limit) else limit
        elif wait > limit:
            fate, wait = "lost", limit
        finish = self.time + wait
        task = Task(
            request=request,
            start=self.time,
            finish=finish,
            fate=fate,
            rate=self.factor,
            cost=cost,
        )
        self.tasks.append(task)
        for _ in range(2 if fate == "repeated" else 1):
            heapq.heappush(self.queue, (finish, number, next(self._order)))

    def _choose(self) -> int | None:
        """An idle client, drawn from those that are there now.

        Where none is, the clock is to wake up when the first of them comes.
        """
        generator = stream("client", self.seed, len(self.tasks))
        size = len(self.fleet)
        for _ in range(_DRAWS):
            client = int(torch.randint(size, (), generator=generator))
            if client not in self._flying and self._wait(client) == 0:
                return client
        waits: list[tuple[float, int]] = [
            (self._wait(client), client)
            for client in torch.randperm(size, generator=generator).tolist()
            if client not in self._flying
        ]
        if not waits:
            return None
        wait, client = min(waits, key=lambda each: each[0])
        if wait == 0:
            return client
        if not any(number < 0 and at <= self.time + wait for at, number, _ in self.queue):
            heapq.heappush(self.queue, (self.time + wait, -1, next(self._order)))
        return None

    def _wait(self, client: int) -> float:
        return self.fleet.next_available(client, self.time, self.seed) - self.time

    def _progress(self) -> float:
        return self.budget.share(len(self.merges), self.time)
