"""What a run takes, estimated before anything is allocated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from gist.batchnorm import tracks_statistics
from gist.config import GraphConfig, TrainConfig, split_settings
from gist.costs.costs import Costs
from gist.costs.exchange import exchange_per_round
from gist.costs.rehearsal import Rounds, Stage, rehearse_evaluation, rehearse_rounds
from gist.errors import ConfigError, GistError, PartitionError
from gist.execution.allocator import GROWTH
from gist.execution.local import make_optimizer
from gist.execution.mapped import RESIDENT_BYTES
from gist.execution.memory import free_memory, memory_in_use
from gist.execution.shards import Home, exchange_groups
from gist.execution.stacked import check_optimizer
from gist.execution.tensorfile import FileLayout
from gist.graph.clusters import Cluster
from gist.graph.data import GraphData
from gist.graph.inference import default_memory_limit, passes_messages
from gist.graph.layerwise import Layerwise, layerwise_obstacle
from gist.graph.outline import GraphShape, OutlineObjective
from gist.graph.spread import Rehearsed, SpreadLayerwise
from gist.partition.assignment import Assignment
from gist.partition.spec import PartitionSpec, model_tensors
from gist.partition.transfer import Selection, held_entries
from gist.partition.wiring import Wiring, partition_spec
from gist.plan import plan_rounds
from gist.spread import is_spread
from gist.verify import LARGE_MODEL_ENTRIES

_WORKSPACE_BYTES = 32 * 2**20
"""Buffers of matrix products, stacks of threads, and code that is loaded when first used."""

Memory = dict[str, dict[str, int]]
"""For each phase of a run, bytes by item of what is alive at its peak."""

_BUILD_BYTES_PER_EDGE = 24
"""What sorting edges into rows, and looking whether they are symmetric, takes while it is done."""


def estimate_costs(
    model: nn.Module,
    data: GraphData | GraphShape,
    *,
    wiring: Wiring | None = None,
    workers: int = 1,
    device: torch.device | str = "cpu",
    config: TrainConfig | None = None,
    **settings: Any,
) -> Costs:
    """What training a model on a graph takes, before anything is allocated.

    The run is rehearsed on tensors without memory, so neither the graph nor the model need to be
    there: ``data`` may be sizes, and the model built under ``torch.device("meta")``. That takes
    seconds, however large they are.

    >>> with torch.device("meta"):
    ...     model = GraphSAGE(100, 32_768, 47, num_layers=3)
    >>> shape = GraphShape(num_nodes=2_449_029, num_edges=123_718_280, num_features=100,
    ...                    num_classes=47)
    >>> costs = estimate_costs(model, shape, num_subnets=8, clusters=15_000, clusters_per_batch=10)
    >>> costs.peak_memory_bytes, costs.flops_ratio

    Args:
        model: As for :class:`~gist.GISTTrainer`; left as it is.
        data: The graph, or its sizes.
        wiring: As for :class:`~gist.GISTTrainer`.
        workers: Processes that the subnets are spread over; see :class:`Costs`.
        device: Where the run is to be.
        config: Settings of the training; or give them as keywords.
        **settings: As for :class:`~gist.GISTTrainer`.

    Raises:
        ConfigError: settings that cannot be used, or a model whose memory depends on the values of
            its data.
        PartitionError: a model that cannot be partitioned, or not into that many subnets.
    """
    graph, training = split_settings(settings, GraphConfig, TrainConfig)
    if config is not None and training:
        raise ConfigError("give either config or settings", got=sorted(training))
    graph_config = GraphConfig(**graph)
    config = config or TrainConfig.from_settings(training)
    device = torch.device(device)
    shape = data if isinstance(data, GraphShape) else GraphShape.of(data)
    there = [*model_tensors(model).values()]
    if isinstance(data, GraphData):
        there += data.tensors()
    counted = sum(t.nbytes for t in there if t.device.type == device.type)
    clusters = _clusters(graph_config)
    run = RunOnStage(
        model,
        partition_spec(model, wiring),
        partial(
            OutlineObjective.of_shape,
            shape,
            device,
            clusters=clusters and clusters[0],
            clusters_per_batch=clusters[1] if clusters else 1,
            inductive=graph_config.inductive,
        ),
        config,
        device=device,
        evaluation=graph_config.evaluation,
        counted=counted,
        workers=workers,
    )
    notes = [] if clusters is None else [_CLUSTERS]
    if graph_config.batches is not None and clusters is None:
        notes.append(
            f"batches of {type(graph_config.batches).__name__} are known once the graph is there: "
            "planned as if every step saw all of it"
        )
    return run.costs(notes)


_CLUSTERS = (
    "clusters are taken to be of equal size and to keep all edges into their nodes; how many are "
    "cut is known once the graph is cut"
)


def _clusters(config: GraphConfig) -> tuple[int, int] | None:
    if isinstance(config.batches, Cluster):
        return config.batches.num_parts, config.batches.parts_per_batch
    return None if config.clusters is None else (config.clusters, config.clusters_per_batch)


class NotPredictableError(ConfigError):
    """What a model takes depends on the values of its data."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One way to run the subnets, and what it takes.

    Attributes:
        executor: Its name.
        most: Subnets that run side by side at most.
        rounds: What its rounds take.
        memory: See :data:`Memory`.
        evaluation: How the model is evaluated.
        evaluation_limit: Bytes that an evaluation may take beside all that stays.
        limited: Whether memory has no room for more side by side.
    """

    executor: str
    most: int
    rounds: Rounds
    memory: Memory
    evaluation: str
    evaluation_limit: int
    limited: bool = False

    @property
    def peak(self) -> int:
        """Bytes of the phase that takes most."""
        return max(sum(items.values()) for items in self.memory.values())


class RunOnStage:
    """A run of which there is nothing but shapes.

    Args:
        model: The whole model; on any device, or on none (``meta``).
        spec: Its partition spec.
        objective: Makes the data side, on the stage.
        config: Settings of the training.
        device: Where the run is to be.
        evaluation: As :class:`~gist.config.GraphConfig` has it.
        counted: Bytes of this process (CUDA: on the device) that model and data take already.
        workers: Processes that the subnets are spread over.

    Raises:
        ConfigError: what the model does depends on the values of its data.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: PartitionSpec,
        objective: Callable[[], OutlineObjective],
        config: TrainConfig,
        *,
        device: torch.device,
        evaluation: str,
        counted: int,
        workers: int = 1,
    ) -> None:
        if workers < 1:
            raise ConfigError("workers must be at least 1", got=workers)
        self.spec, self.config, self.device, self.workers = spec, config, device, workers
        self.stage = Stage(device)
        tally = self.stage.tally
        with self.stage.computing():
            self.objective = objective()
        self.data_bytes = tally.bytes
        with _refusing(model):
            self.model = self.stage.outline(model)
        self.model_bytes = tally.bytes - self.data_bytes
        self.rounds = plan_rounds(config, self.objective.steps_per_epoch)
        with _refusing(model):
            self._one_pass, self.evaluation_flops = rehearse_evaluation(
                self.stage, self.model, self.objective, on_batch=evaluation == "clusters"
            )
            self._recalibration = 0
            if self._recalibrates():
                seen = rehearse_evaluation(self.stage, self.model, self.objective, on_batch=True)
                self._recalibration = seen[0]
        self.graph_bytes = tally.bytes - self.data_bytes - self.model_bytes
        in_use = memory_in_use(device)
        self.process_bytes = max(in_use - counted, 0) if device.type == "cpu" else 0
        limit = config.memory_limit
        assert limit is None or isinstance(limit, int), "parsed by TrainConfig"
        self.limit = in_use + free_memory(device) if limit is None else limit
        self._how = evaluation
        self._layers: Layerwise | None = None

    def _recalibrates(self) -> bool:
        wanted = self.config.recalibrate_bn
        if max(m for _, m in self.config.phases) > 1 if wanted is None else wanted:
            return tracks_statistics(self.model)
        return False

    def _evaluation(self, standing: int) -> tuple[str, int, int]:
        """How the model is evaluated, what that takes and what it may, beside what stays."""
        left = max(self.limit - standing, 0)
        on_disk = self.config.store == "disk"
        if self.config.memory_limit is None:
            model = min(self.model_bytes, RESIDENT_BYTES) if on_disk else self.model_bytes
            before = self.process_bytes + self.data_bytes + model
            left = min(left, default_memory_limit(self.device, max(self.limit - before, 1)))
        if self._how == "clusters":
            return self._how, self._one_pass, left
        if self.workers > 1 and is_spread(self.model, self._how, self.config):
            spread = self._spread_layers()
            return "layerwise", max(min(left, spread.most), spread.smallest), left
        if self.workers > 1 and self._how == "auto":
            return "full", self._one_pass, left
        if self._how == "full" or layerwise_obstacle(self.model) is not None:
            return "full", self._one_pass, left
        fast = self._how == "auto" and not passes_messages(self.model)
        if fast and not on_disk and self._one_pass <= left:
            return "full", self._one_pass, left
        if self._layers is None:
            data = self.objective.data
            with _refusing(self.model), self.stage.arranging():
                self._layers = Layerwise(self.model.eval(), data.x, data.adjacency)
        return "layerwise", max(min(left, self._layers.most), self._layers.smallest), left

    def _spread_layers(self) -> SpreadLayerwise:
        """The evaluation by all workers, as rank 0 runs it."""
        if self._layers is None:
            data = self.objective.data
            homes = {name: Home.of(layout) for name, layout in self.spec.layouts.items()}
            at_home = {n for n, home in homes.items() if home and not home.moves and not home.dim}
            peers = Rehearsed(self.model, 0, self.workers, at_home)
            with _refusing(self.model), self.stage.arranging():
                model = self.model.eval()
                self._layers = SpreadLayerwise(model, data.x, data.adjacency, peers)
        assert isinstance(self._layers, SpreadLayerwise)
        return self._layers

    def choose(self) -> Choice:
        """The way that the settings ask for, with as many subnets side by side as fit.

        Where not even one at a time fits, that is what is returned.
        """
        most = -(-max(m for _, m in self.config.phases) // self.workers)
        if self.config.executor == "serial" or most == 1 or self.config.shared_batches is False:
            return self._rehearsed("serial")
        # Where both are tried, the programs of one stay while those of the other run.
        measured = self.config.executor == "auto" and not self.config.deterministic
        beside = self._rehearsed("serial") if measured else None
        try:
            check_optimizer(make_optimizer(self.config, self.model.parameters()))
            stacked = self._rehearsed(self.config.executor, most, beside)
        except PartitionError:  # there is no grouped form; whoever runs it says so
            return beside or self._rehearsed("serial")
        if stacked.peak <= self.limit:
            return stacked
        fits, low, high = beside or self._rehearsed("serial"), 1, most
        while high - low > 1:
            middle = (low + high) // 2
            tried = self._rehearsed(self.config.executor, middle, beside)
            if tried.peak <= self.limit:
                fits, low = tried, middle
            else:
                high = middle
        return replace(fits, limited=True)

    def costs(self, notes: Sequence[str] = ()) -> Costs:
        """Everything, for the way of :meth:`choose`."""
        choice, full = self.choose(), self._rehearsed("serial", config=self._full_config)
        first, steps = self.rounds[0], self.objective.steps_per_epoch
        step_flops, whole = choice.rounds.step_flops, full.rounds.step_flops[1]
        run = sum(plan.local_steps * step_flops[plan.num_subnets] for plan in self.rounds)
        batches = first.local_steps * first.num_subnets
        assignment = self._assignment(first.num_subnets, first.index)
        parameters = dict(self.model.named_parameters())
        trained = [name for name, p in parameters.items() if p.requires_grad]
        held = [
            held_entries(self.spec, assignment, subnet, trained)
            for subnet in range(first.num_subnets)
        ]
        data, batch = self.objective.data, self.objective.batch
        graphs = batch.graph if isinstance(batch.graph, tuple) else (batch.graph,)
        return Costs(
            graph={
                "nodes": data.num_nodes,
                "edges": data.num_edges,
                "features": data.num_features,
                "classes": data.num_classes,
                "batch_nodes": batch.x.size(0),
                "batch_edges": max(graph.num_edges for graph in graphs),
            },
            num_parameters=sum(p.numel() for p in parameters.values()),
            parameters_per_subnet=max(held),
            num_subnets=self.config.num_subnets,  # type: ignore[arg-type]  # normalised there
            workers=self.workers,
            executor=choice.executor,
            stacked_at_once=choice.most,
            evaluation=choice.evaluation,
            memory=choice.memory,
            memory_limit=self.limit,
            disk=self._disk(choice),
            exchange=exchange_per_round(
                self.spec,
                [
                    self._assignment(plan.num_subnets, plan.index)
                    for plan in self.rounds[:2]
                    if plan.num_subnets == first.num_subnets
                ],
                {name: t.element_size() for name, t in model_tensors(self.model).items()},
                trained,
                workers=self.workers,
                local_steps=first.local_steps,
                **self._carried_bytes(trained),
            ),
            flops={
                "round": first.local_steps * step_flops[first.num_subnets],
                "run": run,
                "evaluation": self.evaluation_flops,
                "full_round": batches * whole,
                "full_run": round(self.rounds[-1].epochs_spent * steps) * whole,
            },
            full_model_bytes=full.peak,
            remedies=() if choice.peak <= self.limit else tuple(self.remedies(choice)),
            notes=(*notes, *self._notes()),
        )

    @property
    def _full_config(self) -> TrainConfig:
        return replace(self.config, num_subnets=1)

    def _carried_bytes(self, trained: Sequence[str]) -> dict[str, Any]:
        """Carried optimiser state, for one entry of each parameter: moments, and what was seen."""
        if self.config.optimizer_state != "carry" or callable(self.config.optimizer):
            return {}
        moments = 1 if self.config.optimizer == "sgd" else 2
        parameters = dict(self.model.named_parameters())
        sizes = {name: moments * parameters[name].element_size() + 1 for name in trained}
        return {"state_bytes": sizes, "counts_steps": moments == 2}

    def _assignment(self, num_subnets: int, round: int) -> Assignment:
        sampler = self.config.sampler_for()
        return sampler(self.spec.sizes, num_subnets, seed=self.config.seed, round=round)

    def _rehearsed(
        self,
        executor: str,
        most: int = 1,
        beside: Choice | None = None,
        *,
        config: TrainConfig | None = None,
    ) -> Choice:
        plans = {plan.num_subnets: plan for plan in reversed(self.rounds)}
        if config is None:
            config = self.config
        else:
            plans = {1: replace(self.rounds[0], num_subnets=1)}
        with _refusing(self.model):
            rounds = rehearse_rounds(
                self.stage,
                self.model,
                self.spec,
                self.objective,
                config,
                sorted(plans.values(), key=lambda plan: plan.index),
                most=None if executor == "serial" else most,
            )
        memory, evaluation, left = self._memory(rounds)
        if beside is not None:
            tried = beside.rounds.subnets + beside.rounds.optimizer
            memory["trial"] = {**memory["training"], "serial_trial": tried}
        return Choice(
            executor=executor,
            most=most,
            rounds=rounds,
            memory=memory,
            evaluation=evaluation,
            evaluation_limit=left,
        )

    def _memory(self, rounds: Rounds) -> tuple[Memory, str, int]:
        """What is alive at the peak of each phase; how, and in how much, the model is evaluated."""
        on_disk = self.config.store == "disk"
        model = 0 if on_disk else self._share(self.model_bytes)
        held, buffers = self._exchange_bytes()
        spread = self.workers > 1
        on_cpu = self.device.type == "cpu"
        process = {"process": self.process_bytes, "workspaces": _WORKSPACE_BYTES * on_cpu}
        standing = {
            **process,
            "data": self.data_bytes + self.graph_bytes,
            "model": model,
            "best_model": model * self.config.keep_best,
            "carried_state": self._share(rounds.carried),
        }
        # A store on disk fills a second set of tensors while subnets train with the first.
        subnets = {
            "subnets": rounds.subnets + rounds.turned * on_disk,
            "optimizer_state": rounds.optimizer,
        }
        own = rounds.carried + rounds.subnets + rounds.optimizer
        edges = self.objective.data.num_edges
        small = self.model_bytes // 4 <= LARGE_MODEL_ENTRIES and not on_disk
        training = {
            **standing,
            **subnets,
            "gradients": rounds.gradients,
            "activations": max(rounds.training - own - rounds.gradients, 0),
            "other_subnets": held,
        }
        read = {"model": min(self.model_bytes, RESIDENT_BYTES)} if on_disk else {}
        stays = {**standing, **read, **subnets}
        evaluation, takes, left = self._evaluation(sum(stays.values()))
        phases = {
            "verification": {
                **process,
                "data": self.data_bytes,
                "model": self.model_bytes if spread and small else model,
                "copies": 3 * self.model_bytes * small,
            },
            "first_step": {
                **process,
                "data": self.data_bytes + self.graph_bytes,
                "model": model,
                "subnets": rounds.subnets,
                "graph_building": _BUILD_BYTES_PER_EDGE * edges,
            },
            "training": training,
            "merging": {
                **standing,
                **subnets,
                "copies": max(rounds.arranging - own, 0),
                "exchange": held + buffers,
            },
            "recalibration": {**stays, "activations": self._recalibration},
            "evaluation": {**stays, "activations": takes},
        }
        together = spread and is_spread(self.model, self._how, self.config)
        if spread and not together:  # rank 0 puts the model together
            for phase in ("recalibration", "evaluation"):
                phases[phase]["assembled_model"] = self.model_bytes
        if not self._recalibration:
            del phases["recalibration"]
        memory = {
            phase: {item: size for item, size in items.items() if size}
            for phase, items in phases.items()
        }
        return memory, evaluation, left

    def _share(self, nbytes: int) -> int:
        """What one of the workers has of the model, or of something that is laid out like it.

        Rows of most tensors are dealt evenly; those that stay with the worker that trained them
        last are as many as its subnets hold.
        """
        if self.workers == 1:
            return nbytes
        m = max(m for _, m in self.config.phases)
        mine = 0.0
        for name, tensor in model_tensors(self.model).items():
            home = Home.of(self.spec.layouts[name])
            if home is None:
                mine += tensor.nbytes
            elif home.moves:
                mine += tensor.nbytes * -(-m // self.workers) / m
            else:
                mine += tensor.nbytes * -(-home.size // self.workers) / home.size
        return round(nbytes * min(mine / max(self.model_bytes, 1), 1.0))

    def _exchange_bytes(self) -> tuple[int, int]:
        """A worker's subnets while they wait or are done; and what is on its way at a time."""
        if self.workers == 1:
            return 0, 0
        tensors = model_tensors(self.model)
        m = max(m for _, m in self.config.phases)
        selection = Selection(self.spec, self._assignment(m, 0), 0)  # the first holds most
        own = -(-m // self.workers)
        held = {
            name: own * selection.numel(self.spec.layouts[name]) * tensor.element_size()
            for name, tensor in tensors.items()
        }
        dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
        groups = exchange_groups(tensors, self.spec, dtypes)
        sizes = sorted(sum(held[name] for name in group) for group in groups)
        waiting = sum(held.values()) if own > 1 else 0
        return waiting, 2 * sum(sizes[-2:]) + sum(held.values()) - waiting

    def remedies(self, choice: Choice) -> Iterator[str]:
        """What to change to take less memory, for what takes most of it first."""
        phase = max(choice.memory, key=lambda name: sum(choice.memory[name].values()))
        config, items = self.config, choice.memory[phase]
        more = "more subnets (num_subnets)"
        to_disk = None if config.store == "disk" else "store='disk' with out=..."
        if self.workers > 1:  # which have the model in memory
            to_disk = "more workers"
        changes = {
            "model": to_disk,
            "best_model": "keep_best=False",
            "carried_state": "optimizer_state='reset'",
            "assembled_model": "evaluation='layerwise'",
            "subnets": more,
            "optimizer_state": more,
            "gradients": more,
            "activations": "clusters=..., or smaller batches of them (clusters_per_batch)",
        }
        if phase == "recalibration":
            changes["activations"] = (
                "recalibrate_bn=False, norm='layer', or batches of fewer clusters"
            )
        if phase == "evaluation":
            changes["activations"] = {
                "full": "evaluation='layerwise'",
                "layerwise": "evaluation='clusters'",
            }.get(choice.evaluation)
        largest = sorted(items, key=lambda item: -items[item])
        found = (changes.get(item) for item in largest if items[item] > choice.peak / 50)
        yield from dict.fromkeys(change for change in found if change is not None)
        yield "a narrower model"
        if config.memory_limit is not None:
            yield "a higher memory_limit"

    def _disk(self, choice: Choice) -> dict[str, int]:
        size = FileLayout.of(model_tensors(self.model)).nbytes
        best = size * self.config.keep_best
        disk = {"model": size}
        if self.config.store == "disk" and best:
            disk["best"] = best
        if self.config.checkpoint_every is not None:
            disk["checkpoints"] = 2 * (size + best + choice.rounds.carried)
        if choice.evaluation == "layerwise" and self._layers is not None:
            hidden = self._layers.file_bytes(choice.evaluation_limit)
            disk |= {"hidden_layers": hidden} if hidden else {}
        return disk

    def _notes(self) -> Iterator[str]:
        if self.workers > 1:
            yield "memory is that of one worker, of which the first does most"
        if self.device.type == "cpu":
            yield (
                f"where {GROWTH:g} times the peak is free, freed memory is kept for reuse, and the "
                "process grows up to that"
            )


@contextmanager
def _refusing(model: nn.Module) -> Iterator[None]:
    try:
        yield
    except GistError:
        raise
    except Exception as error:  # a forward pass of the user's may do anything with its values
        raise NotPredictableError(
            f"what {type(model).__name__} takes cannot be told without data",
            got=f"{type(error).__name__}: {str(error).partition(chr(10))[0]}",
            expected="a model whose shapes do not depend on the values of its input",
        ) from error
