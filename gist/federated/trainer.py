"""Federated training: clients with data and devices of their own, on a clock that is counted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from gist.checkpoint import write_atomically
from gist.config import (
    FederatedConfig,
    GraphConfig,
    SampleConfig,
    TrainConfig,
    learning_rate_factor,
    split_settings,
)
from gist.costs.room import Room
from gist.errors import ConfigError, one_of
from gist.execution.executor import Executor
from gist.federated.clients import Clients, clients_of_graph, clients_of_samples, is_graph
from gist.federated.fleet import make_fleet
from gist.federated.selection import Request
from gist.federated.server import Server
from gist.federated.strategies import make_strategy
from gist.federated.timeline import Cost, Protocol, Timeline, simulate
from gist.graph.data import GraphData
from gist.graph.objective import GraphObjective
from gist.partition.assignment import Assignment
from gist.partition.samplers import DisjointUniform
from gist.partition.spec import model_tensors
from gist.partition.streams import seeded, stream
from gist.partition.subnet import build_subnet
from gist.partition.transfer import Selection
from gist.partition.wiring import Wiring
from gist.plan import RoundPlan
from gist.samples.data import SampleData
from gist.samples.loader_data import LoaderData
from gist.trainer import SubnetTrainer, device_of

_EPOCHS = 100
"""The budget where none is given."""

_EVALUATIONS = 50
"""Of a run, about, where ``eval_every`` is not given: merges are many, and change little."""

_STATISTICS_STEPS = 64
"""Batches, of as many clients, that BatchNorm statistics are re-estimated on."""


class FederatedTrainer(SubnetTrainer):
    """Trains a model on the data of many clients, each of which trains what it is sent.

    Time is that of a clock that is counted from operations and bytes, and nothing sleeps: a hundred
    clients are trained on one machine, on parameters that are as stale as they would be. A round of
    the run is a merge of the server. The same seed gives the same history, event by event.

    >>> trainer = FederatedTrainer(model, data, strategy="fedbuff", clients=100, duration=3600)
    >>> trainer.fit()
    >>> trainer.report()["merges_per_client"]

    Args:
        model: Any module whose wiring is known, or is given.
        data: Independent samples: a :class:`~gist.SampleData`, or what it is made of; or a graph, a
            :class:`~gist.GraphData`, whose nodes are then spread over the clients.
        wiring: See :class:`~gist.SubnetTrainer`.
        config: Settings of the training; or give them as keywords, of which those that are left out
            are :attr:`defaults`.
        **settings: The attributes of :class:`~gist.config.FederatedConfig`,
            :class:`~gist.config.TrainConfig`, and :class:`~gist.config.SampleConfig` or
            :class:`~gist.config.GraphConfig`. The budget is ``rounds``, of merges; or ``epochs``,
            summed over clients, 100 by default; or ``duration``, of the clock. Without
            ``eval_every`` a run is evaluated about 50 times.

    Attributes:
        timeline: What happens when.
        strategy: How the server works.
        clients: Who has which data.

    Raises:
        DataError: data that cannot be trained on.
        ConfigError: settings that cannot be used.
        PartitionError: a model that cannot be partitioned.
    """

    defaults: ClassVar[Mapping[str, Any]] = {
        "optimizer": "sgd",
        "lr": 0.01,
        "local_steps": 50,
        "num_subnets": 1,
        "recalibrate_bn": True,
    }

    timeline: Timeline

    def __init__(
        self,
        model: nn.Module,
        data: SampleData | GraphData | Any,
        *,
        wiring: Wiring | None = None,
        config: TrainConfig | None = None,
        **settings: Any,
    ) -> None:
        on_graph = is_graph(data)
        if isinstance(data, LoaderData | DataLoader):
            raise ConfigError(
                "clients are dealt samples, which a loader does not number",
                got=type(data).__name__,
                expected="a SampleData, or a pair (x, y)",
                remedy="give the tensors behind it",
            )
        self.data: Any = GraphData.of(data) if on_graph else SampleData.of(data)
        kind: Any = GraphConfig if on_graph else SampleConfig
        own, federated, training = split_settings(settings, kind, FederatedConfig, TrainConfig)
        if config is not None and training:
            raise ConfigError("give either config or settings", got=sorted(training))
        if not isinstance(config, TrainConfig | None):
            raise ConfigError(
                "config must be a gist.TrainConfig",
                got=type(config).__name__,
                remedy="give the other settings as keywords",
            )
        self.data_config = kind(**own)
        self.federated = FederatedConfig(**federated)
        self.strategy = make_strategy(self.federated.strategy)
        if self.federated.capacity is not None:
            self.strategy = replace(self.strategy, capacity=self.federated.capacity)
        self._evaluations = None if config or "eval_every" in training else _EVALUATIONS
        if config is None:
            config = TrainConfig.from_settings({**self.defaults, **training})
        elif config.num_subnets == TrainConfig.num_subnets:
            config = replace(config, num_subnets=1)
        self._check_settings(config)
        self.fleet = make_fleet(self.federated.fleet, self.federated.clients, config.seed)
        self._costs: dict[tuple[int, ...], tuple[float, int]] = {}
        make_clients: Any = clients_of_graph if on_graph else clients_of_samples
        self.clients: Clients = make_clients(
            self.data,
            device_of(model, config),
            self.federated,
            self.data_config,
            local_steps=config.local_steps,
            seed=config.seed,
        )
        super().__init__(model, self.clients.objective, wiring=wiring, config=config)
        self._choose_inference(self.model)

    def _check_settings(self, config: TrainConfig) -> None:
        duration = self.federated.duration
        if duration is not None and (config.rounds is not None or config.epochs is not None):
            raise ConfigError(
                "the budget is given twice",
                got=f"duration={duration}, epochs={config.epochs}, rounds={config.rounds}",
                remedy="give one of epochs, rounds and duration",
            )
        plain = {
            "num_subnets": (config.num_subnets, 1, "in_flight says how many clients work"),
            "sampler": (type(config.sampler), DisjointUniform, "strategy says who holds what"),
            "optimizer_state": (config.optimizer_state, "reset", "a client keeps none"),
            "store": (config.store, "memory", "the model is in memory"),
            "executor": (config.executor, "auto", "clients are trained one after the other"),
            "capacities": (config.capacities, None, "fleet and capacity say what clients can do"),
        }
        for name, (got, expected, why) in plain.items():
            if got != expected:
                raise ConfigError(
                    f"{name} is not for federated training: {why}",
                    got=f"{name}={getattr(config, name)!r}",
                    remedy="leave it out",
                )

    def _check_workers(self) -> None:
        if self.comm.is_distributed:
            raise one_process_only(self.comm.size)

    def _check_subnets(self) -> None:
        """Nothing to check: a client holds at least one unit of every group."""

    def _find_room(self) -> Room | None:
        return None

    def _plan(self) -> list[RoundPlan]:
        """Runs the clock; a round is a merge."""
        config, federated, steps = self.config, self.federated, self._steps
        merges = config.rounds
        per_merge = federated.in_flight if self.strategy.synchronous else self.strategy.per_merge
        epoch = self.objective.steps_per_epoch
        if config.fast_dev_run:
            merges = 1
        elif federated.duration is None and merges is None:
            merges = int((config.epochs or _EPOCHS) * epoch / (steps * per_merge) + 1e-9)
            if merges < 1:
                raise ConfigError(
                    "the budget is too small for a single merge",
                    got=f"epochs={config.epochs}",
                    remedy="raise epochs, or lower local_steps or in_flight",
                )
        self.timeline = simulate(
            self.fleet,
            Protocol(
                in_flight=federated.in_flight,
                per_merge=self.strategy.per_merge,
                synchronous=self.strategy.synchronous,
                timeout=federated.timeout,
            ),
            self._cost,
            capacities=self.strategy.capacities(self.fleet.ranks()),
            rate=lambda share: learning_rate_factor(config.schedule, share),
            seed=config.seed,
            merges=merges,
            duration=None if config.fast_dev_run else federated.duration,
        )
        if self._evaluations is not None:
            every = -(-len(self.timeline.merges) // self._evaluations)
            self.config = replace(config, eval_every=every)
        plans: list[RoundPlan] = []
        spent = 0.0
        for index, merged in enumerate(self.timeline.merged):
            spent += len(merged) * steps / epoch
            rate = self.timeline.tasks[merged[-1]].rate
            plans.append(
                RoundPlan(
                    index=index,
                    num_subnets=len(merged),
                    rate_factors=(rate,) * steps,
                    epochs_spent=spent,
                )
            )
        return plans

    @property
    def _steps(self) -> int:
        """Local steps of a task."""
        return (
            min(self.config.local_steps, 2) if self.config.fast_dev_run else self.config.local_steps
        )

    def _cost(self, request: Request) -> Cost:
        """Seconds and bytes of a task, by the widths that it will have."""
        selection = self.strategy.selection
        widths = {g: selection.count(n, request) for g, n in self.spec.sizes.items()}
        key = tuple(widths.values())
        if key not in self._costs:
            self._costs[key] = self._work(widths), self._bytes(widths)
        ratio, size = self._costs[key]
        profile = self.fleet.profiles[request.client]
        upload = round(size * selection.uploaded(request))
        seconds = self._steps * profile.step_seconds * ratio
        seconds += size / profile.download + upload / profile.upload
        return Cost(seconds=seconds, download=size, upload=upload)

    def _work(self, widths: Mapping[str, int]) -> float:
        """What a step of a subnet of these widths takes, over that of the whole model."""
        if dict(widths) == self.spec.sizes:
            return 1.0
        if not self.fleet.counts_operations:
            return sum(widths.values()) / sum(self.spec.sizes.values())
        return self._count_operations(widths) / self._whole_operations

    @cached_property
    def _whole_operations(self) -> int:
        return self._count_operations(self.spec.sizes)

    def _count_operations(self, widths: Mapping[str, int]) -> int:
        assignment = _prefixes(self.spec.sizes, [widths])
        subnet = build_subnet(self.model, self.spec, assignment, 0)
        counter = FlopCounterMode(display=False)
        with seeded("operations", self.config.seed, device=self.device):
            (batch,) = self.objective.batches(
                seed=self.config.seed, round=0, subnet=self.clients.largest, steps=1
            )
            with counter:
                self.objective.loss(subnet.train(), batch).sum().backward()  # type: ignore[no-untyped-call]
        return max(counter.get_total_flops(), 1)

    def _bytes(self, widths: Mapping[str, int]) -> int:
        """Of the parameters and buffers of a subnet of these widths."""
        selection = Selection(self.spec, _prefixes(self.spec.sizes, [widths]), 0)
        tensors = model_tensors(self.model)
        return sum(
            selection.numel(layout) * tensors[name].element_size()
            for name, layout in self.spec.layouts.items()
            if selection.holds(layout)
        )

    def assign(self, plan: RoundPlan) -> Assignment:
        """How many units the answers of a merge hold; which ones is decided when they are sent."""
        merged = self.timeline.merged[plan.index]
        requests = [self.timeline.tasks[number].request for number in merged]
        sizes, selection = self.spec.sizes, self.strategy.selection
        held = [{g: selection.count(n, request) for g, n in sizes.items()} for request in requests]
        return _prefixes(sizes, held)

    def _executor_maker(self, wiring: Wiring | None) -> Callable[..., Executor]:
        def make(most: int | None) -> Executor:
            return Server(
                self.model,
                self.spec,
                self.objective,
                self.config,
                timeline=self.timeline,
                strategy=self.strategy,
                weights=self.clients.samples,
                classes=self.clients.classes,
            )

        return make

    @property
    def server(self) -> Server:
        """What happened, and what the clients hold."""
        assert isinstance(self.executor, Server)
        return self.executor

    def _choose_inference(self, model: nn.Module) -> None:
        objective = self.objective
        if isinstance(objective, GraphObjective) and objective.inference is None:
            objective.choose_inference(model)

    def _statistics_batches(self, plan: RoundPlan) -> Iterable[Any]:
        """A batch of each of some clients, drawn anew: statistics that clients would be asked for.

        HeteroFL's static BatchNorm (Diao et al., ICLR 2021, section 3.3).
        """
        generator = stream("statistics", self.config.seed, plan.index)
        chosen = torch.randperm(self.federated.clients, generator=generator)[:_STATISTICS_STEPS]
        return chain.from_iterable(
            self.objective.batches(seed=self.config.seed, round=plan.index, subnet=client, steps=1)
            for client in chosen.tolist()
        )

    @property
    def metric(self) -> str:
        """Name of the data's metric."""
        name: str = self.data.metric
        return name

    def settings(self) -> dict[str, Any]:
        """The settings of the run, of training, clients and data, as JSON values."""
        return {
            **super().settings(),
            **self.data_config.to_json(),
            **self.federated.to_json(),
            **self.strategy.to_json(),
        }

    def describe(self) -> dict[str, Any]:
        """The run as JSON values: model, groups, settings, batches, clients."""
        federated = {**self.federated.to_json(), **self.strategy.to_json()}
        return {**super().describe(), **self.clients.describe(), "federated": federated}

    @torch.no_grad()
    def predict(self, x: Tensor | str | Any = None) -> Tensor:
        """Scores by the model as it is now: of every node of a graph, or of samples.

        Args:
            x: Samples, or a split, as for :meth:`gist.SampleTrainer.predict`; None for the test
                split, and of a graph.

        Raises:
            ConfigError: samples of another form, or samples for a graph.
        """
        with self._as_found():
            return self.clients.predict(self.model.eval(), x)

    def time_to(self, target: float, split: str = "test") -> float | None:
        """Seconds of the clock until an evaluation reached a metric; None where none did.

        Args:
            target: The metric, as a number in [0, 1].
            split: ``"train"``, ``"val"`` or ``"test"``.

        Raises:
            ConfigError: a target out of range, or another split.
        """
        if not 0 <= target <= 1:
            raise ConfigError("target must be a metric in [0, 1]", got=target, remedy="0.9 for 90%")
        one_of("split", split, ("train", "val", "test"))
        for record in self.history:
            reached = getattr(record, f"{split}_metric")
            if reached is not None and reached >= target:
                return record.clock
        return None

    def report(self) -> dict[str, Any]:
        """What a federated run is judged by, as JSON values; after :meth:`fit`.

        Returns:
            ``clock``: seconds; ``bytes_down`` and ``bytes_up``; ``staleness``: answers by
            staleness; ``merges_per_client``; ``least_coverage``: merged answers that held the unit
            that fewest held, by group; ``events``: how many of each kind; ``client_metric``, on the
            clients' own data: ``mean`` and ``worst``, and which data these are, ``measured_on``.

        Raises:
            ConfigError: there was no run.
        """
        if not self.history:
            raise ConfigError("there is nothing to report on yet", remedy="call fit() first")
        done = len(self.history)
        merged = [event for event in self.server.events if event["event"] == "merged"]
        staleness, per_client = _counts(merged, "staleness"), _counts(merged, "client")
        last, covered = self.history[-1], self.server.global_model.covered
        with self._as_found():
            own = self.clients.metrics(self.model.eval())
        return {
            "merges": done,
            "clock": last.clock,
            "bytes_down": last.bytes_sent,
            "bytes_up": last.bytes_received,
            "staleness": staleness,
            "merges_per_client": [per_client.get(i, 0) for i in range(self.federated.clients)],
            "least_coverage": {group: int(times.min()) for group, times in covered.items()},
            "events": _counts(self.server.events, "event"),
            "client_metric": own,
        }

    def more_results(self) -> dict[str, Any]:
        """See :meth:`SubnetTrainer.more_results`."""
        return {"federated": self.report()}

    def save(self, folder: str | Path) -> None:
        """As any trainer, with ``events.jsonl`` and, after a run, ``federated.json``.

        Args:
            folder: Receives the files.
        """
        super().save(folder)
        lines = (json.dumps(event) + "\n" for event in self.server.events)
        write_atomically(Path(folder) / "events.jsonl", "".join(lines))
        if self.history:
            text = json.dumps(self.report(), indent=1)
            write_atomically(Path(folder) / "federated.json", text)

    def _more_choices(self) -> dict[str, Any]:
        return {"events": self.server.events}

    def _restore_more(self, state: dict[str, Any]) -> None:
        self.server.events = list(state["events"])


def one_process_only(workers: int) -> ConfigError:
    """What several workers are told."""
    return ConfigError(
        "a federated run is one process, whose clock has all clients",
        got=f"{workers} workers",
        remedy="start one process; on the machines of clients, use gist.federated.flower",
    )


def _prefixes(
    sizes: Mapping[str, int], widths: list[dict[str, int]] | list[Mapping[str, int]]
) -> Assignment:
    """Subnets of these widths that hold the first units of every group."""
    return Assignment(
        round=0,
        sizes=sizes,
        held={group: tuple(torch.arange(each[group]) for each in widths) for group in sizes},
    )


def _counts(events: Iterable[Mapping[str, Any]], name: str) -> dict[Any, int]:
    counts: dict[Any, int] = {}
    for event in events:
        counts[event[name]] = counts.get(event[name], 0) + 1
    return dict(sorted(counts.items()))
