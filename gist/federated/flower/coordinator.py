"""The server's side: one task for every idle client, and every answer merged when it comes."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gist.checkpoint import write_atomically
from gist.config import TrainConfig, learning_rate_factor
from gist.errors import ConfigError, GistError, WorkerLostError
from gist.execution.mapped import MODEL_FILE
from gist.execution.memory import PeakMemory
from gist.execution.store import MemoryStore
from gist.execution.tensorfile import replace_file
from gist.federated.flower.deployment import Deployment
from gist.federated.flower.global_model import GlobalModel, Sent
from gist.federated.flower.link import Link, Reply
from gist.federated.flower.messages import Outcome, Work, fingerprint
from gist.federated.selection import Request
from gist.federated.strategies import Strategy, make_strategy
from gist.history import RoundRecord, TrainResult, write_history
from gist.partition.merging import Part
from gist.partition.spec import model_tensors
from gist.partition.streams import stream
from gist.partition.transfer import held_entries
from gist.partition.wiring import Wiring, partition_spec

Evaluate = Callable[[nn.Module], Mapping[str, float]]

_SENT_SETTINGS = (
    "optimizer",
    "lr",
    "weight_decay",
    "clip_norm",
    "precision",
    "width_correction",
)
"""Settings of the training that clients are told."""

_PATIENCE = 20
"""Answers in a row that may be of no use before the run is given up."""

_SLACK = 4096
"""Bytes by which an array of an answer may be larger than what was sent: its header and more."""

_LONGEST = 500
"""Characters of what a client says that are kept."""

_METRICS = ("train_metric", "val_metric", "test_metric", "val_loss")


@dataclass(kw_only=True, eq=False)
class _Client:
    """What is known of a client: its number, tasks, seconds of a step, failures in a row."""

    node: int
    number: int
    tasks: int = 0
    step_seconds: float = math.inf
    samples: int = 0
    failures: int = 0
    rests_until: float = 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class _Flight:
    """A task that is under way, or was given up."""

    client: _Client
    sent: Sent
    share: float
    most_bytes: int
    until: float


class Coordinator:
    """Sends work to clients, and merges what they answer.

    A client that is idle is sent work at once, those that join later as well. How fast clients are
    is learnt from the seconds that they say their steps took, for the whole model; one that has not
    answered yet counts as the slowest. Answers are checked before they touch the model; of one that
    failed, is damaged, came too late or a second time nothing is left but an event.

    Args:
        model: The global model; trained in place.
        link: The clients.
        config: Settings of the training; ``rounds`` is the budget, of merges.
        deployment: Settings of the server.
        evaluate: Metrics of the model, named as in :class:`~gist.history.RoundRecord`.
        wiring: For a model whose wiring is not known.
        clock: Seconds.
        sleep: Waits so many seconds.

    Attributes:
        history: One record per merge.
        events: What happened, in order, as JSON values.

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
        self.strategy: Strategy = make_strategy(deployment.strategy)
        if deployment.capacity is not None:
            self.strategy = replace(self.strategy, capacity=deployment.capacity)
        self.spec = partition_spec(model, wiring)
        self.global_model = GlobalModel(model, self.spec, self.strategy)
        self.store = MemoryStore(model, self.spec)
        self.evaluate = evaluate
        self.history: list[RoundRecord] = []
        self.best: RoundRecord | None = None
        self.result: TrainResult | None = None
        self.events: list[dict[str, Any]] = []
        self._clock, self._sleep, self._start = clock, sleep, clock()
        self._memory = PeakMemory(self.store.device)
        self._fingerprint = fingerprint(self.spec, model_tensors(model))
        self._entries = sum(t.numel() for t in model_tensors(model).values())
        self._clients: dict[int, _Client] = {}
        self._online: frozenset[int] = frozenset()
        self._flying: dict[str, _Flight] = {}
        self._given_up: dict[str, _Flight] = {}
        self._parts: list[Part] = []
        self._outcomes: list[Outcome] = []
        self._widths: tuple[int, ...] = ()
        self._stopped = False
        self._tasks = self._useless = 0
        self._bytes_sent = self._bytes_received = 0
        self._epochs = self._eval_seconds = 0.0
        self._factor = self._rate(0.0)
        if evaluate is not None:
            self._metrics()

    def run(self) -> TrainResult | None:
        """Trains for the whole budget.

        Returns:
            As of every run, where the model was evaluated on validation and test data; else None.

        Raises:
            WorkerLostError: so many answers in a row were of no use that nothing will come of it.
        """
        try:
            while not self._is_over():
                self._look()
                self._fill()
                if not self._receive():
                    self._sleep(self.deployment.poll)
            if self.history and self.history[-1].val_metric is None:
                self._evaluate()
            self._finish()
        finally:
            self._write()
        return self.result

    @property
    def seconds(self) -> float:
        """Since the start."""
        return self._clock() - self._start

    def _is_over(self) -> bool:
        rounds, duration = self.config.rounds, self.deployment.duration
        spent = rounds is not None and len(self.history) >= rounds
        return self._stopped or spent or (duration is not None and self.seconds >= duration)

    def _progress(self) -> float:
        """The share of the budget that is spent, in [0, 1)."""
        rounds, duration = self.config.rounds, self.deployment.duration
        shares = [len(self.history) / rounds] if rounds else []
        shares += [self.seconds / duration] if duration else []
        return min(max(shares), 1 - 1e-9)

    def _rate(self, share: float) -> float:
        return learning_rate_factor(self.config.schedule, share)

    def _look(self) -> None:
        """Who is there, and whose answer is not awaited any longer."""
        online = frozenset(self.link.nodes())
        for node in sorted(online - self._clients.keys()):
            self._clients[node] = _Client(node=node, number=len(self._clients))
        for event, nodes in (("joined", online - self._online), ("left", self._online - online)):
            for node in sorted(nodes, key=lambda node: self._clients[node].number):
                self._log(event, self._clients[node].number, node=node)
        self._online = online
        now = self.seconds
        self._given_up = {m: f for m, f in self._given_up.items() if now < f.until}
        for message in [m for m, f in self._flying.items() if now >= f.until]:
            flight = self._flying.pop(message)
            self._given_up[message] = replace(flight, until=now + self.deployment.timeout)
            self._log("lost", flight.client.number, task=flight.sent.request.task)

    def _fill(self) -> None:
        """Sends work to as many clients as may be at work and are idle."""
        deployment = self.deployment
        if len(self._online) < deployment.min_clients:
            return
        if self.strategy.synchronous and self._flying:
            return
        here = sorted((self._clients[node] for node in self._online), key=lambda c: c.number)
        busy = {f.client.number for f in (*self._flying.values(), *self._given_up.values())}
        idle = {
            client.number
            for client in here
            if client.number not in busy and client.rests_until <= self.seconds
        }
        most = deployment.in_flight or len(here)
        while idle and len(self._flying) < most:
            generator = stream("client", self.config.seed, self._tasks)
            client = here[int(torch.randint(len(here), (), generator=generator))]
            while client.number not in idle:
                client = here[int(torch.randint(len(here), (), generator=generator))]
            idle.discard(client.number)
            self._send(client, self._ranks(here))

    def _ranks(self, here: Sequence[_Client]) -> dict[int, int]:
        """Places by speed among the clients that are there, 0 for the fastest."""
        order = sorted(here, key=lambda client: (client.step_seconds, client.number))
        return {client.number: rank for rank, client in enumerate(order)}

    def _send(self, client: _Client, ranks: Mapping[int, int]) -> None:
        rank, config = ranks[client.number], self.config
        request = Request(
            client=client.number,
            task=self._tasks,
            own=client.tasks,
            merges=len(self.history),
            capacity=self.strategy.capacities(range(len(ranks)))[rank],
            rank=rank,
            num_ranks=len(ranks),
            progress=self._progress(),
            seed=config.seed,
        )
        sent, tensors = self.global_model.cut(request)
        settings = {name: getattr(config, name) for name in _SENT_SETTINGS}
        records = Work(
            client=request.client,
            task=request.task,
            own=request.own,
            seed=request.seed,
            steps=config.local_steps,
            rate=self._factor,
            proximal=self.strategy.proximal,
            masked_outputs=self.strategy.masked_outputs,
            model=self._fingerprint,
            settings={name: value for name, value in settings.items() if value is not None},
            trained=tuple(sorted(sent.trained)),
            units={group: units for group, (units,) in sent.assignment.held.items()},
            tensors=tensors,
        ).pack()
        self._tasks += 1
        message = self.link.send(
            client.node,
            records,
            seconds=2 * self.deployment.timeout,
            group=str(request.merges),
        )
        if message is None:
            self._log("unsent", client.number, task=request.task)
            self._failed(client, "a message could not be sent")
            return
        client.tasks += 1
        self._bytes_sent += records.nbytes
        self._flying[message] = _Flight(
            client=client,
            sent=sent,
            share=sum(tensor.numel() for tensor in tensors.values()) / self._entries,
            most_bytes=records.nbytes + _SLACK * (len(records.arrays) + 1),
            until=self.seconds + self.deployment.timeout,
        )
        self._log("sent", client.number, task=request.task, bytes=records.nbytes)

    def _receive(self) -> bool:
        """Takes what came back; returns whether anything did."""
        awaited = [*self._flying, *self._given_up]
        replies = self.link.receive(awaited) if awaited else []
        for reply in replies:
            self._take(reply)
            if self._is_over():
                break
        if self.strategy.synchronous and not self._flying:
            self._merge()
        return bool(replies)

    def _take(self, reply: Reply) -> None:
        if (flight := self._given_up.pop(reply.message, None)) is not None:
            if reply.error is None:
                self._log("late", flight.client.number, task=flight.sent.request.task)
            return
        if (flight := self._flying.pop(reply.message, None)) is None:
            self._log("repeated", None, message=reply.message)
            return
        client, task = flight.client, flight.sent.request.task
        if reply.read is None:
            reason = str(reply.error)[:_LONGEST]
            from_client = reply.node == client.node
            self._log("failed" if from_client else "lost", client.number, task=task, reason=reason)
            if from_client:
                self._failed(client, reason)
            return
        self._bytes_received += reply.nbytes
        try:
            if reply.node != client.node or reply.nbytes > flight.most_bytes:
                raise ConfigError(
                    "an answer of another size or sender than was asked for",
                    got=f"{reply.nbytes:,} bytes of node {reply.node}",
                    expected=f"up to {flight.most_bytes:,} of node {client.node}",
                )
            outcome = Outcome.unpack(reply.read())
            part = self.global_model.take(flight.sent, outcome, merges=len(self.history))
        except GistError as error:
            reason = str(error)[:_LONGEST]
            self._log("refused", client.number, task=task, reason=reason)
            self._failed(client, reason)
            return
        self._useless = client.failures = 0
        step = outcome.seconds / self.config.local_steps / flight.share
        known = client.step_seconds < math.inf
        client.step_seconds = (client.step_seconds + step) / 2 if known else step
        client.samples = outcome.samples
        self._parts.append(part)
        self._outcomes.append(outcome)
        self._lead(client)
        self._log(
            "merged",
            client.number,
            task=task,
            loss=outcome.losses[1],
            staleness=part.staleness,
            bytes=reply.nbytes,
        )
        if not self.strategy.synchronous and len(self._parts) >= self.strategy.per_merge:
            self._merge()

    def _lead(self, client: _Client) -> None:
        """The fastest of those at work lowers the learning rate (AsyncDrop, Algorithm 3)."""
        others = [f.client for f in self._flying.values()]
        ranks = self._ranks([client, *others])
        if ranks[client.number] == 0:
            self._factor = self._rate(self._progress())

    def _merge(self) -> None:
        if not self._parts:
            return
        self.global_model.merge(self._parts)
        known = sum(client.samples for client in self._clients.values())
        self._epochs += sum(o.passes * o.samples for o in self._outcomes) / known
        losses = [o.losses[1] for o in self._outcomes if math.isfinite(o.losses[1])]
        last = self.history[-1].train_loss if self.history else math.nan
        record = RoundRecord(
            round=len(self.history),
            num_subnets=len(self._parts),
            local_steps=self.config.local_steps,
            epochs=self._epochs,
            learning_rate_factor=self._factor,
            train_loss=sum(losses) / len(losses) if losses else last,
            seconds=self.seconds - self._eval_seconds,
            eval_seconds=self._eval_seconds,
            bytes_sent=self._bytes_sent,
            bytes_received=self._bytes_received,
            clock=self.seconds,
        )
        self.history.append(record)
        self._widths = tuple(self._trained_by(part) for part in self._parts)
        self._parts, self._outcomes = [], []
        if len(self.history) % self.config.eval_every == 0 or self._is_over():
            self._evaluate()
            self._write()
        record = self.history[-1]
        value = "" if record.val_metric is None else f", validation {record.val_metric:.4f}"
        self._say(f"merge {record.round}: training loss {record.train_loss:.4f}{value}")
        wishes = [callback(self, record) for callback in self.config.callbacks]
        self._stopped = any(wishes)

    def _trained_by(self, part: Part) -> int:
        """Trainable entries of the subnet that a part is of."""
        names = [name for name, p in self.model.named_parameters() if p.requires_grad]
        return held_entries(self.spec, part.assignment, 0, names)

    def _failed(self, client: _Client, reason: str) -> None:
        """A client whose answer is of no use rests, ever longer."""
        client.failures += 1
        client.rests_until = self.seconds + min(2.0**client.failures, 60.0)
        self._useless += 1
        if self._useless >= _PATIENCE:
            raise WorkerLostError(
                f"the last {self._useless} answers of clients were of no use",
                got=reason,
                remedy="see events.jsonl for what each client was refused for",
            )

    def _metrics(self) -> dict[str, float]:
        assert self.evaluate is not None
        metrics = dict(self.evaluate(self.model))
        if unknown := sorted(metrics.keys() - set(_METRICS)):
            raise ConfigError(
                "unknown metrics", got=", ".join(unknown), expected=" or ".join(_METRICS)
            )
        return metrics

    def _evaluate(self) -> None:
        if self.evaluate is None:
            return
        start = self._clock()
        metrics = self._metrics()
        self._eval_seconds += self._clock() - start
        record = replace(self.history[-1], eval_seconds=self._eval_seconds, **metrics)  # type: ignore[arg-type]
        self.history[-1] = record
        if record.is_better_than(self.best):
            self.best = record
            if self.config.keep_best:
                self.store.keep()

    def _finish(self) -> None:
        last, best = (self.history[-1] if self.history else None), self.best
        self.store.recall()
        if last is None or best is None or best.test_metric is None:
            return
        assert best.val_metric is not None
        tested = [r.test_metric for r in self.history if r.test_metric is not None]
        self.result = TrainResult(
            history=tuple(self.history),
            best=best,
            val_metric=best.val_metric,
            test_metric=best.test_metric,
            last_test_metric=tested[-1],
            seconds=last.seconds,
            eval_seconds=last.eval_seconds,
            repartition_seconds=0.0,
            bytes_sent=last.bytes_sent,
            bytes_received=last.bytes_received,
            peak_memory_bytes=self._memory.bytes(),
            num_parameters=sum(p.numel() for p in self.model.parameters()),
            parameters_per_subnet=self._widths,
        )

    def _write(self) -> None:
        """Writes what there is into ``out``; each file appears complete or not at all."""
        if self.config.out is None:
            return
        folder = Path(self.config.out)
        folder.mkdir(parents=True, exist_ok=True)
        if self.store.has_kept:
            with replace_file(folder / MODEL_FILE) as new:
                self.store.write_kept(new)
        else:
            self.store.write(folder / MODEL_FILE)
        write_atomically(folder / "config.json", json.dumps(self.describe(), indent=1))
        write_history(folder / "history.jsonl", self.history)
        lines = (json.dumps(event) + "\n" for event in self.events)
        write_atomically(folder / "events.jsonl", "".join(lines))
        if self.result is not None:
            write_atomically(folder / "result.json", json.dumps(self.result.to_json(), indent=1))

    def describe(self) -> dict[str, Any]:
        """The run as JSON values: model, groups, settings."""
        return {
            "model": type(self.model).__name__,
            "tensors": {n: [str(t.dtype), *t.shape] for n, t in model_tensors(self.model).items()},
            "groups": self.spec.sizes,
            "executor": "flower",
            "settings": {**self.config.to_json(), **self.deployment.to_json()},
            "strategy": repr(self.strategy),
        }

    def _log(self, event: str, client: int | None, **more: Any) -> None:
        self.events.append({"time": self.seconds, "event": event, "client": client, **more})

    def _say(self, text: str) -> None:
        if self.config.progress is not False:
            print(f"gist: {text}", file=sys.stderr, flush=True)
