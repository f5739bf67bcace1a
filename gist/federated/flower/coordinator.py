"""The server's loop: work for every idle client, and every answer merged when it comes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from gist.config import TrainConfig, learning_rate_factor
from gist.errors import DataError, GistError, WorkerLostError
from gist.federated.flower.deployment import Deployment
from gist.federated.flower.ledger import Evaluate, Ledger
from gist.federated.flower.link import Link, Reply
from gist.federated.flower.messages import Outcome, Records, Work, fingerprint
from gist.federated.flower.roster import Client, Roster
from gist.federated.global_model import Answer, GlobalModel
from gist.federated.selection import Request
from gist.federated.strategies import make_strategy
from gist.history import RoundRecord, TrainResult
from gist.partition.assignment import Assignment
from gist.partition.parts import Part
from gist.partition.spec import model_tensors
from gist.partition.transfer import extract, held_entries
from gist.partition.wiring import Wiring, partition_spec

_TOLD = ("optimizer", "lr", "weight_decay", "clip_norm", "precision", "width_correction")
"""Settings of the training that clients are told."""

_PATIENCE = 20
"""Answers in a row that may be of no use before the run is given up."""

_HEADER = 4096
"""Bytes that an array of an answer may take besides its entries."""

_LONGEST = 500
"""Characters of what is wrong with an answer that are kept."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Flight:
    """A task that is under way, or was given up.

    Attributes:
        client: Who was sent it.
        request: What was known.
        assignment: The units that were sent.
        start: What was sent, where the strategy asks for it.
        rate: Factor on the base learning rate.
        share: Of the model's entries that it holds.
        most_bytes: Largest answer that is read.
        until: When it is given up, or forgotten.
    """

    client: Client
    request: Request
    assignment: Assignment
    start: Mapping[str, Tensor] | None
    rate: float
    share: float
    most_bytes: int
    until: float


class Coordinator:
    """Sends work to clients, and merges what they answer.

    A client that is idle is sent work at once, those that join later as well. How fast clients are
    is learnt from the seconds that they say their steps took, reckoned up to the whole model; one
    that has not answered yet counts as the slowest. Answers are checked before they touch the
    model; of one that failed, is damaged, came too late or a second time only an event is left.

    Args:
        model: The global model; trained in place.
        link: The clients.
        config: Settings of the training; ``rounds`` is the budget, of merges.
        deployment: Settings of the server.
        evaluate: Metrics of a model, named as in :class:`~gist.history.RoundRecord`.
        wiring: For a model whose wiring is not known.
        clock: Seconds.
        sleep: Waits so many seconds.

    Attributes:
        ledger: History and events so far.

    Raises:
        ConfigError: settings that cannot be used, or metrics of other names.
        PartitionError: a model that cannot be partitioned.
    """

    def __init__(
        self,
        model: nn.Module,
        link: Link,
        config: TrainConfig,
        deployment: Deployment,
        *,
        evaluate: Evaluate | None = None,
        wiring: Wiring | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self.model, self.link, self.config, self.deployment = model, link, config, deployment
        self.strategy = make_strategy(deployment.strategy)
        if deployment.capacity is not None:
            self.strategy = replace(self.strategy, capacity=deployment.capacity)
        self.spec = partition_spec(model, wiring)
        self._global = GlobalModel(model, self.spec, self.strategy)
        self._fingerprint = fingerprint(self.spec, model_tensors(model))
        self._clock, self._sleep, self._start = clock, sleep, clock()
        self.ledger = Ledger(
            model,
            self.spec,
            config,
            evaluate=evaluate,
            clock=self.seconds,
            describe=self.describe(),
        )
        self._roster = Roster()
        self._flying: dict[str, _Flight] = {}
        self._given_up: dict[str, _Flight] = {}
        self._parts: list[Part] = []
        self._outcomes: list[Outcome] = []
        self._widths: tuple[int, ...] = ()
        self._tasks = self._merges = self._useless = 0
        self._bytes_sent = self._bytes_received = 0
        self._seen = 0.0
        self._stopped = False
        self._factor = self._last_rate = learning_rate_factor(config.schedule, 0.0)

    def run(self) -> TrainResult | None:
        """Trains for the whole budget.

        Returns:
            As of every run; None where no evaluation had validation and test metrics.

        Raises:
            WorkerLostError: so many answers in a row were of no use that nothing will come of it.
        """
        try:
            while not self._is_over():
                self._look()
                self._fill()
                if not self._receive():
                    self._sleep(self.deployment.poll)
        except BaseException:
            self.ledger.write()
            raise
        return self.ledger.finish(self._widths)

    def seconds(self) -> float:
        """Since the start."""
        return self._clock() - self._start

    def describe(self) -> dict[str, Any]:
        """The run as JSON values: model, groups, settings."""
        return {
            "model": type(self.model).__name__,
            "tensors": {n: [str(t.dtype), *t.shape] for n, t in model_tensors(self.model).items()},
            "groups": self.spec.sizes,
            "executor": "flower",
            "settings": {
                **self.config.to_json(),
                **self.deployment.to_json(),
                **self.strategy.to_json(),
            },
        }

    def _is_over(self) -> bool:
        rounds, duration = self.config.rounds, self.deployment.duration
        spent = rounds is not None and self._merges >= rounds
        return self._stopped or spent or (duration is not None and self.seconds() >= duration)

    def _progress(self) -> float:
        """The share of the budget that is spent, in [0, 1)."""
        rounds, duration = self.config.rounds, self.deployment.duration
        merges = 0.0 if rounds is None else self._merges / rounds
        time = 0.0 if duration is None else self.seconds() / duration
        return min(max(merges, time), 1 - 1e-9)

    def _look(self) -> None:
        """Who is there, and whose answer is not awaited any longer."""
        came, left = self._roster.look(self.link.nodes())
        for event, clients in (("joined", came), ("left", left)):
            for client in clients:
                self.ledger.log(event, client.number, node=client.node)
        now = self.seconds()
        self._given_up = {m: f for m, f in self._given_up.items() if now < f.until}
        for message in [m for m, f in self._flying.items() if now >= f.until]:
            flight = self._flying.pop(message)
            self._given_up[message] = replace(flight, until=now + self.deployment.timeout)
            self.ledger.log("lost", flight.client.number, task=flight.request.task)

    def _fill(self) -> None:
        """Sends work to as many clients as may be at work and are idle."""
        here, deployment = self._roster.here, self.deployment
        if len(here) < deployment.min_clients or (self.strategy.synchronous and self._flying):
            return
        while len(self._flying) < (deployment.in_flight or len(here)):
            busy = [f.client for f in (*self._flying.values(), *self._given_up.values())]
            key = ("client", self.config.seed, self._tasks)
            client = self._roster.choose(busy, self.seconds(), *key)
            if client is None:
                return
            self._send(client)

    def _send(self, client: Client) -> None:
        here = self._roster.here
        rank = self._roster.rank(client, here)
        request = Request(
            client=client.number,
            task=self._tasks,
            own=client.tasks,
            merges=self._merges,
            capacity=self.strategy.capacities(range(len(here)))[rank],
            rank=rank,
            num_ranks=len(here),
            progress=self._progress(),
            seed=self.config.seed,
        )
        assignment = self._global.deal(request)
        tensors = extract(self._global.tensors, self.spec, assignment, 0)
        verify = client.samples == 0  # no sound answer yet
        records = self._work(request, assignment, tensors, verify=verify).pack()
        self._tasks += 1
        message = self.link.send(
            client.node,
            records,
            seconds=2 * self.deployment.timeout,
            group=str(request.merges),
        )
        if message is None:
            self._take_note("unsent", client, request.task, "a message was not taken")
            return
        client.tasks += 1
        self._bytes_sent += records.nbytes
        layouts = self.spec.layouts.values()
        self._flying[message] = _Flight(
            client=client,
            request=request,
            assignment=assignment,
            start=tensors if self._global.needs_start else None,
            rate=self._factor,
            share=sum(t.numel() for t in tensors.values())
            / sum(math.prod(layout.shape) for layout in layouts),
            most_bytes=2 * records.nbytes + _HEADER * (len(records.arrays) + 1),
            until=self.seconds() + self.deployment.timeout,
        )
        self.ledger.log("sent", client.number, task=request.task, bytes=records.nbytes)

    def _work(
        self,
        request: Request,
        assignment: Assignment,
        tensors: Mapping[str, Tensor],
        *,
        verify: bool,
    ) -> Work:
        config = self.config
        told = {name: getattr(config, name) for name in _TOLD}
        return Work(
            client=request.client,
            task=request.task,
            own=request.own,
            seed=request.seed,
            steps=config.local_steps,
            rate=self._factor,
            proximal=self.strategy.proximal,
            masked_outputs=self.strategy.masked_outputs,
            verify=verify,
            model=self._fingerprint,
            settings={name: value for name, value in told.items() if value is not None},
            trained=tuple(sorted(self._global.trained(request, assignment))),
            units={group: units for group, (units,) in assignment.held.items()},
            tensors=tensors,
        )

    def _receive(self) -> bool:
        """Takes what came back; returns whether anything did."""
        awaited = [*self._flying, *self._given_up]
        replies = self.link.receive(awaited) if awaited else []
        for reply in replies:
            if not self._is_over():
                self._take(reply)
        if self.strategy.synchronous and not self._flying and self._parts:
            self._merge()
            self._lower_rate()
        return bool(replies)

    def _take(self, reply: Reply) -> None:
        self._bytes_received += reply.nbytes
        if (flight := self._given_up.pop(reply.message, None)) is not None:
            if reply.read is not None:
                self.ledger.log("late", flight.client.number, task=flight.request.task)
            return
        if (flight := self._flying.pop(reply.message, None)) is None:
            self.ledger.log("repeated", None, message=reply.message)
            return
        client, task = flight.client, flight.request.task
        if reply.read is None and reply.node != client.node:
            self.ledger.log("lost", client.number, task=task, reason=str(reply.error)[:_LONGEST])
            client.failed(self.seconds())
        elif reply.read is None:
            self._take_note("failed", client, task, str(reply.error))
        else:
            try:
                outcome = Outcome.unpack(_read(reply, flight))
                part = self._part(flight, outcome)
                answer = Answer(part=part, losses=outcome.losses)
                self._global.take(flight.request, answer)
            except GistError as error:
                self._take_note("refused", client, task, str(error))
            else:
                self._keep(flight, outcome, part, reply.nbytes)

    def _part(self, flight: _Flight, outcome: Outcome) -> Part:
        """What of an outcome is merged."""
        if outcome.passes > self.config.local_steps:
            raise DataError(
                "an answer says that it made more passes than steps",
                got=outcome.passes,
                expected=f"at most {self.config.local_steps}",
            )
        return Part(
            assignment=flight.assignment,
            tensors=outcome.tensors,
            start=flight.start,
            weight=outcome.samples,
            staleness=self._merges - flight.request.merges,
            classes=outcome.classes,
        )

    def _take_note(self, event: str, client: Client, task: int, reason: str) -> None:
        """Of something that is of no use: its client rests.

        Raises:
            WorkerLostError: there were too many in a row.
        """
        reason = reason[:_LONGEST]
        self.ledger.log(event, client.number, task=task, reason=reason)
        client.failed(self.seconds())
        self._useless += 1
        if self._useless >= _PATIENCE:
            raise WorkerLostError(
                f"the last {self._useless} answers of clients were of no use",
                got=reason,
                remedy="events.jsonl says what was wrong with each",
            )

    def _keep(self, flight: _Flight, outcome: Outcome, part: Part, nbytes: int) -> None:
        """Takes an answer that is sound."""
        client, self._useless, self._last_rate = flight.client, 0, flight.rate
        step_seconds = outcome.seconds / self.config.local_steps / flight.share
        client.answered(step_seconds=step_seconds, samples=outcome.samples)
        self._parts.append(part)
        self._outcomes.append(outcome)
        self.ledger.log(
            "merged",
            client.number,
            task=flight.request.task,
            loss=outcome.losses[1],
            staleness=part.staleness,
            bytes=nbytes,
        )
        if not self.strategy.synchronous and len(self._parts) >= self.strategy.per_merge:
            self._merge()
        # The fastest of those at work lowers the learning rate (AsyncDrop, Algorithm 3).
        if self._roster.rank(client, [other.client for other in self._flying.values()]) == 0:
            self._lower_rate()

    def _lower_rate(self) -> None:
        """To what the spent budget asks for."""
        self._factor = learning_rate_factor(self.config.schedule, self._progress())

    def _merge(self) -> None:
        parts, outcomes, history = self._parts, self._outcomes, self.ledger.history
        self._global.merge(parts)
        self._merges += 1
        self._parts, self._outcomes = [], []
        trained = [name for name, p in self.model.named_parameters() if p.requires_grad]
        self._widths = tuple(held_entries(self.spec, p.assignment, 0, trained) for p in parts)
        self._seen += sum(outcome.passes * outcome.samples for outcome in outcomes)
        losses = [outcome.losses[1] for outcome in outcomes]
        last = history[-1] if history else None
        seconds = self.seconds()
        record = RoundRecord(
            round=self._merges - 1,
            num_subnets=len(parts),
            local_steps=self.config.local_steps,
            epochs=max(self._seen / self._roster.samples, last.epochs if last else 0.0),
            learning_rate_factor=self._last_rate,
            train_loss=sum(losses) / len(losses),
            seconds=seconds - self.ledger.eval_seconds,
            eval_seconds=self.ledger.eval_seconds,
            bytes_sent=self._bytes_sent,
            bytes_received=self._bytes_received,
            clock=seconds,
        )
        self.ledger.add(record, is_last=self._is_over())
        wishes = [callback(self, self.ledger.history[-1]) for callback in self.config.callbacks]
        self._stopped = any(wishes)


def _read(reply: Reply, flight: _Flight) -> Records:
    """The records of an answer, if it comes from whom it should, and is not too large.

    Raises:
        DataError: it does not; or it cannot be read.
    """
    assert reply.read is not None
    if reply.node != flight.client.node or reply.nbytes > flight.most_bytes:
        raise DataError(
            "an answer comes from another client, or is too large",
            got=f"{reply.nbytes:,} bytes from node {reply.node}",
            expected=f"at most {flight.most_bytes:,} from node {flight.client.node}",
        )
    return reply.read()
