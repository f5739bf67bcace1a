"""The server of a federated run, with its clients' work: what the executors are elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from gist.config import TrainConfig
from gist.errors import ConfigError, DivergedError, PartitionError
from gist.execution.executor import RoundReport
from gist.execution.objective import Objective
from gist.execution.serial import SerialExecutor
from gist.federated.client import clone, train_client
from gist.federated.faults import garbled
from gist.federated.global_model import Answer, GlobalModel, Kept, dealt
from gist.federated.selection import Request
from gist.federated.strategies import Strategy
from gist.federated.timeline import Task, Timeline
from gist.partition.assignment import Assignment
from gist.partition.parts import Part
from gist.partition.spec import PartitionSpec, model_tensors
from gist.partition.transfer import Selection, gather
from gist.plan import RoundPlan

_PATIENCE = 20
"""Answers in a row that may be refused, though no garbage, before the run is given up."""


class Server(SerialExecutor):
    """Sends work to clients, trains it as they would, and merges their answers.

    A client works on the parameters that it was sent: it is trained when it is sent work, and its
    answer lies here until the clock says that it comes. What will not come is not trained. Memory
    holds the answers under way, whatever the number of clients.

    Args:
        model: The global model.
        spec: Its partition spec.
        objective: Batches, by client and its own task; and loss.
        config: Settings of the training.
        timeline: What happens when.
        strategy: What is sent, and how it is merged.
        weights: Training samples of each client.
        classes: ``[clients, C]`` bool: which classes each has samples of; None where labels are no
            class numbers.

    Attributes:
        global_model: What clients are sent parts of.
        events: What happened, as JSON values: merge by merge, and of each in order of time.

    Raises:
        ConfigError: outputs are masked, and labels are no class numbers.
        PartitionError: the strategy cannot train the model.
    """

    name = "federated"

    def __init__(
        self,
        model: nn.Module,
        spec: PartitionSpec,
        objective: Objective,
        config: TrainConfig,
        *,
        timeline: Timeline,
        strategy: Strategy,
        weights: Sequence[float],
        classes: Tensor | None,
    ) -> None:
        super().__init__(model, spec, objective, config)
        if strategy.masked_outputs and classes is None:
            raise ConfigError(
                "outputs can be masked only where labels are class numbers",
                remedy="a strategy without masked_outputs",
            )
        self.timeline, self.strategy = timeline, strategy
        self.weights, self.classes = weights, classes
        self.global_model = GlobalModel(model, spec, strategy)
        self.events: list[dict[str, Any]] = []
        self._under_way: dict[int, Answer] = {}
        self._refused, self._reason = 0, ""
        self._loss: float | None = None

    def run_round(self, plan: RoundPlan, assignment: Assignment) -> RoundReport:
        """Sends the work that begins here, and merges the answers that come next.

        Raises:
            DivergedError: so many answers in a row were refused that nothing will come of it, or
                none was merged in the whole run.
        """
        del assignment  # says how many units clients hold; which is decided here
        before = len(self.events)
        self.tensors = self.global_model.tensors = model_tensors(self.model)
        started = self.timeline.started[plan.index]
        down = sum(self._send(self.timeline.tasks[n], plan.local_steps) for n in started)
        merge = self.timeline.merges[plan.index]
        parts: list[Part] = []
        losses: list[float] = []
        up = 0
        for number in merge.tasks:
            task = self.timeline.tasks[number]
            up += task.cost.upload * task.answers
            answer = self._under_way.pop(number, None) if task.answers else None
            if answer is None:
                self._log(task.finish, "repeated" if task.answers else "lost", task)
            elif self._take(task, answer, merge.time):
                parts.append(answer.part)
                losses.append(answer.losses[1])
        self.events[before:] = sorted(self.events[before:], key=lambda event: event["time"])
        if parts:
            self._loss = sum(losses) / len(losses)
            self.global_model.merge(parts)
        nothing = self._loss is None and plan.index == len(self.timeline.merges) - 1
        if not parts and (self._refused >= _PATIENCE or nothing):
            raise DivergedError(
                f"the last {self._refused} answers of clients were refused, none of them garbage",
                got=self._reason,
                remedy="lower lr, set clip_norm, or use a model with normalisation",
            )
        return RoundReport(
            train_loss=float("nan") if self._loss is None else self._loss,
            repartition_seconds=0.0,
            bytes_sent=down,
            bytes_received=up,
            clock=merge.time,
        )

    def _send(self, task: Task, steps: int) -> int:
        """Sends a client its work; returns the bytes of it."""
        self._log(task.start, "sent", task, bytes=task.cost.download)
        if task.number in self.timeline.merged_at:
            self._under_way[task.number] = self._train_client(task, steps)
        return task.cost.download

    def _train_client(self, task: Task, steps: int) -> Answer:
        request, strategy = task.request, self.strategy
        assignment = self.global_model.deal(request)
        trained = self.global_model.trained(request, assignment)
        returned = self.global_model.returned(assignment, trained)
        program = self._program(assignment, range(1))
        selection = Selection(self.spec, assignment, 0)
        with torch.no_grad():
            for name, own in program.tensors.items():
                index = selection.index(self.spec.layouts[name])
                gather(self.tensors[name].detach(), index, out=own[0])
        start = clone(program.parts()[0]) if self.global_model.needs_start else None
        classes = self._classes_of(request.client) if strategy.masked_outputs else None
        losses = train_client(
            program,
            self.objective,
            {name: t if name in trained else t.detach() for name, t in self.tensors.items()},
            client=request.client,
            own=request.own,
            steps=steps,
            rate=task.rate,
            drawn_back=strategy.proximal,
            classes=classes,
        )
        part = Part(
            assignment=assignment,
            tensors=clone({n: t for n, t in program.parts()[0].items() if n in returned}),
            start=start,
            weight=self.weights[request.client],
            staleness=self.timeline.staleness(task.number),
            classes=classes,
        )
        return Answer(part=part, losses=losses)

    def _take(self, task: Task, answer: Answer, time: float) -> bool:
        """Whether an answer can be merged, at ``time``; says what became of it."""
        if task.fate == "corrupt":
            garbage = garbled(answer.part, seed=self.config.seed, task=task.number)
            answer = replace(answer, part=garbage)
        try:
            self.global_model.take(task.request, answer)
        except PartitionError as error:
            if task.is_sound:
                self._refused, self._reason = self._refused + 1, str(error)
            self._log(task.finish, "refused", task, reason=str(error))
            return False
        self._refused = 0
        stale = answer.part.staleness
        self._log(time, "merged", task, loss=answer.losses[1], staleness=stale)
        return True

    def _classes_of(self, client: int) -> Tensor | None:
        return None if self.classes is None else self.classes[client].nonzero()[:, 0]

    def _log(self, time: float, event: str, task: Task, **more: Any) -> None:
        request: Request = task.request
        self.events.append(
            {
                "time": time,
                "event": event,
                "client": request.client,
                "task": request.task,
                **more,
            }
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Answers under way, and what strategies remember."""
        out: dict[str, Tensor] = {}
        for number, answer in self._under_way.items():
            named: dict[str, Mapping[str, Tensor]] = {
                "tensor": answer.part.tensors,
                "start": answer.part.start or {},
                "unit": {g: units for g, (units,) in answer.part.assignment.held.items()},
            }
            for kind, tensors in named.items():
                out |= {f"task/{number}/{kind}/{name}": t for name, t in tensors.items()}
            losses = torch.tensor(answer.losses, dtype=torch.float64)
            out[f"task/{number}/losses/"] = losses
        for kind, tensors in self._kept().items():
            out |= {f"{kind}//{name}": tensor for name, tensor in tensors.items()}
        return {name: tensor.contiguous() for name, tensor in out.items()}

    def _kept(self) -> Kept:
        last = float("nan") if self._loss is None else self._loss
        own = {"last": torch.tensor([last, self._refused], dtype=torch.float64)}
        return {**self.global_model.kept(), "server": own}

    def read_state(self, paths: Sequence[Path]) -> None:
        """Takes what :meth:`state_dict` gave, from a file."""
        (path,) = paths
        tasks: dict[int, dict[str, dict[str, Tensor]]] = {}
        kept: Kept = {name: {} for name in self._kept()}
        with safe_open(path, "pt", device=str(self.device)) as file:
            for key in file.keys():  # noqa: SIM118
                kind, rest = key.split("/", 1)
                if kind == "task":
                    number, what, name = rest.split("/", 2)
                    tasks.setdefault(int(number), {}).setdefault(what, {})[name] = file.get_tensor(
                        key
                    )
                else:
                    kept[kind][rest.removeprefix("/")] = file.get_tensor(key)
        self.global_model.restore(kept)
        last, refused = kept["server"]["last"].tolist()
        self._loss, self._refused = None if last != last else last, int(refused)
        self._under_way = {number: self._answer(number, found) for number, found in tasks.items()}

    def _answer(self, number: int, found: Mapping[str, Mapping[str, Tensor]]) -> Answer:
        request = self.timeline.tasks[number].request
        units = {group: held.cpu() for group, held in found.get("unit", {}).items()}
        first, last = found["losses"][""].tolist()
        masked = self.strategy.masked_outputs
        part = Part(
            assignment=dealt(self.spec, request, units),
            tensors=found["tensor"],
            start=found.get("start"),
            weight=self.weights[request.client],
            staleness=self.timeline.staleness(number),
            classes=self._classes_of(request.client) if masked else None,
        )
        return Answer(part=part, losses=(first, last))
