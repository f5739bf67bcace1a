"""A run of which there is nothing but shapes: what its phases take, and how it fits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from gist.batchnorm import tracks_statistics
from gist.config import TrainConfig
from gist.costs.costs import Costs
from gist.costs.exchange import exchange_per_round
from gist.costs.rehearsal import Rehearsable, Rounds, rehearse_rounds
from gist.costs.shares import bytes_of_exchange, share_of_model
from gist.costs.stage import Stage
from gist.errors import ConfigError, GistError, PartitionError
from gist.execution.allocator import GROWTH
from gist.execution.local import make_optimizer
from gist.execution.mapped import RESIDENT_BYTES
from gist.execution.memory import free_memory, memory_in_use
from gist.execution.stacked import check_optimizer
from gist.execution.tensorfile import FileLayout
from gist.partition.assignment import Assignment
from gist.partition.grouped.grouping import never_grouped
from gist.partition.spec import PartitionSpec, model_tensors
from gist.partition.transfer import held_entries
from gist.plan import plan_rounds
from gist.verify import LARGE_MODEL_ENTRIES

_WORKSPACE_BYTES = 32 * 2**20
"""Buffers of matrix products, stacks of threads, and code that is loaded when first used."""

Items = dict[str, int]
"""Bytes by item."""

Memory = dict[str, Items]
"""For each phase of a run, bytes by item of what is alive at its peak."""


class NotPredictableError(ConfigError):
    """What a model takes depends on the values of its data."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How a model is evaluated.

    Attributes:
        how: A word for it.
        takes: Bytes beside all that stays.
        may_take: Bytes that there are for it.
    """

    how: str
    takes: int
    may_take: int


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One way to run the subnets, and what it takes.

    Attributes:
        executor: Its name.
        most: Subnets that run side by side at most.
        rounds: What its rounds take.
        memory: See :data:`Memory`.
        evaluation: How the model is evaluated.
        limited: Whether memory has no room for more side by side.
    """

    executor: str
    most: int
    rounds: Rounds
    memory: Memory
    evaluation: Evaluation
    limited: bool = False

    @property
    def peak(self) -> int:
        """Bytes of the phase that takes most."""
        return max(sum(items.values()) for items in self.memory.values())

    @property
    def peak_phase(self) -> str:
        """That phase."""
        return max(self.memory, key=lambda name: sum(self.memory[name].values()))


Data = TypeVar("Data", bound=Rehearsable)


class RunOnStage(ABC, Generic[Data]):
    """A run of which there is nothing but shapes; subclasses know one kind of data.

    Args:
        model: The whole model; on any device, or on none (``meta``).
        spec: Its partition spec.
        objective: Makes the data side, on the stage.
        config: Settings of the training.
        device: Where the run is to be.
        counted: Bytes of this process (CUDA: on the device) that model and data take already.
        workers: Processes that the subnets are spread over.

    Raises:
        ConfigError: what the model does depends on the values of its data.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: PartitionSpec,
        objective: Callable[[], Data],
        config: TrainConfig,
        *,
        device: torch.device,
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
        with refusing(model):
            self.model = self.stage.outline(model)
        self.model_bytes = tally.bytes - self.data_bytes
        self.rounds = plan_rounds(config, self.objective.steps_per_epoch)
        with refusing(model):
            self.one_pass, self.evaluation_flops = self.rehearse_evaluation()
            self.recalibration = self.rehearse_recalibration() if self._recalibrates() else 0
        self.kept_bytes = tally.bytes - self.data_bytes - self.model_bytes
        in_use = memory_in_use(device)
        self.process_bytes = max(in_use - counted, 0) if device.type == "cpu" else 0
        limit = config.memory_limit
        assert limit is None or isinstance(limit, int), "parsed by TrainConfig"
        self.limit = in_use + free_memory(device) if limit is None else limit

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """Of the data, and of what a step sees of them."""

    @abstractmethod
    def rehearse_evaluation(self) -> tuple[int, int]:
        """Bytes that an evaluation takes in one pass over what it sees at once; all operations.

        What the data keep from then on is made in it, and stays on the stage.
        """

    @abstractmethod
    def rehearse_recalibration(self) -> int:
        """Bytes that estimating statistics of BatchNorm takes."""

    @abstractmethod
    def evaluation(self, standing: int) -> Evaluation:
        """How the model is evaluated beside so many bytes that stay."""

    @abstractmethod
    def activation_remedies(self, phase: str, evaluation: Evaluation) -> str | None:
        """What to change where activations take most of a phase."""

    def more_phases(self, stays: Items, rounds: Rounds) -> Memory:
        """Phases that runs on this kind of data have besides.

        Args:
            stays: What of process, data and model is there in all phases.
            rounds: What the rounds take.
        """
        del stays, rounds
        return {}

    def more_files(self, choice: Choice) -> Items:
        """Files that evaluations write."""
        del choice
        return {}

    @property
    def is_assembled(self) -> bool:
        """Whether a model that is spread over workers is put together to be evaluated."""
        return self.workers > 1

    def _recalibrates(self) -> bool:
        wanted = self.config.recalibrate_bn
        if max(m for _, m in self.config.phases) > 1 if wanted is None else wanted:
            return tracks_statistics(self.model)
        return False

    def choose(self) -> Choice:
        """The way that the settings ask for, with as many subnets side by side as fit.

        Where not even one at a time fits, that is what is returned.
        """
        most = -(-max(m for _, m in self.config.phases) // self.workers)
        alone = self.config.executor == "serial" or most == 1
        if alone or self.config.shared_batches is False or never_grouped(self.model, self.spec):
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
        assignment = self.assignment(first.num_subnets, first.index)
        parameters = dict(self.model.named_parameters())
        trained = [name for name, p in parameters.items() if p.requires_grad]
        held = [
            held_entries(self.spec, assignment, subnet, trained)
            for subnet in range(first.num_subnets)
        ]
        return Costs(
            data=self.sizes(),
            num_parameters=sum(p.numel() for p in parameters.values()),
            parameters_per_subnet=max(held),
            num_subnets=self.config.num_subnets,  # type: ignore[arg-type]  # normalised there
            workers=self.workers,
            executor=choice.executor,
            stacked_at_once=choice.most,
            evaluation=choice.evaluation.how,
            memory=choice.memory,
            memory_limit=self.limit,
            disk=self._disk(choice),
            exchange=exchange_per_round(
                self.spec,
                [
                    self.assignment(plan.num_subnets, plan.index)
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

    def assignment(self, num_subnets: int, round: int) -> Assignment:
        """The assignment of a round of so many subnets."""
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
        with refusing(self.model):
            rounds = rehearse_rounds(
                self.stage,
                self.model,
                self.spec,
                self.objective,
                config,
                sorted(plans.values(), key=lambda plan: plan.index),
                most=None if executor == "serial" else most,
            )
        memory, evaluation = self._memory(rounds)
        if beside is not None:
            tried = beside.rounds.subnets + beside.rounds.optimizer
            memory["trial"] = {**memory["training"], "serial_trial": tried}
        return Choice(
            executor=executor, most=most, rounds=rounds, memory=memory, evaluation=evaluation
        )

    def _memory(self, rounds: Rounds) -> tuple[Memory, Evaluation]:
        """What is alive at the peak of each phase, and how the model is evaluated."""
        on_disk = self.config.store == "disk"
        tensors, m = model_tensors(self.model), max(m for _, m in self.config.phases)
        share = share_of_model(tensors, self.spec, num_subnets=m, workers=self.workers)
        model = 0 if on_disk else round(share * self.model_bytes)
        held, buffers = bytes_of_exchange(
            tensors, self.spec, self.assignment(m, 0), workers=self.workers
        )
        on_cpu = self.device.type == "cpu"
        process = {"process": self.process_bytes, "workspaces": _WORKSPACE_BYTES * on_cpu}
        there = {**process, "data": self.data_bytes + self.kept_bytes, "model": model}
        standing = {
            **there,
            "best_model": model * self.config.keep_best,
            "carried_state": round(share * rounds.carried),
        }
        # A store on disk fills a second set of tensors while subnets train with the first.
        subnets = {
            "subnets": rounds.subnets + rounds.turned * on_disk,
            "optimizer_state": rounds.optimizer,
        }
        own = rounds.carried + rounds.subnets + rounds.optimizer
        small = self.model_bytes // 4 <= LARGE_MODEL_ENTRIES and not on_disk
        read = {"model": min(self.model_bytes, RESIDENT_BYTES)} if on_disk else {}
        stays = {**standing, **read, **subnets}
        evaluation = self.evaluation(sum(stays.values()))
        phases = {
            "verification": {
                **process,
                "data": self.data_bytes,
                "model": self.model_bytes if self.workers > 1 and small else model,
                "copies": 3 * self.model_bytes * small,
            },
            **self.more_phases(there, rounds),
            "training": {
                **standing,
                **subnets,
                "gradients": rounds.gradients,
                "activations": max(rounds.training - own - rounds.gradients, 0),
                "other_subnets": held,
            },
            "merging": {
                **standing,
                **subnets,
                "copies": max(rounds.arranging - own, 0),
                "exchange": held + buffers,
            },
            "recalibration": {**stays, "activations": self.recalibration},
            "evaluation": {**stays, "activations": evaluation.takes},
        }
        if self.is_assembled:  # by rank 0
            for phase in ("recalibration", "evaluation"):
                phases[phase]["assembled_model"] = self.model_bytes
        if not self.recalibration:
            del phases["recalibration"]
        memory = {
            phase: {item: size for item, size in items.items() if size}
            for phase, items in phases.items()
        }
        return memory, evaluation

    def remedies(self, choice: Choice) -> Iterator[str]:
        """What to change to take less memory, for what takes most of it first."""
        phase, items = choice.peak_phase, choice.memory[choice.peak_phase]
        more = "more subnets (num_subnets)"
        to_disk = None if self.config.store == "disk" else "store='disk' with out=..."
        if self.workers > 1:  # which have the model in memory
            to_disk = "more workers"
        changes: Mapping[str, str | None] = {
            "model": to_disk,
            "best_model": "keep_best=False",
            "carried_state": "optimizer_state='reset'",
            "assembled_model": "evaluation='layerwise'",
            "subnets": more,
            "optimizer_state": more,
            "gradients": more,
            "activations": self.activation_remedies(phase, choice.evaluation),
        }
        largest = sorted(items, key=lambda item: -items[item])
        found = (changes.get(item) for item in largest if items[item] > choice.peak / 50)
        yield from dict.fromkeys(change for change in found if change is not None)
        yield "a narrower model"
        if self.config.memory_limit is not None:
            yield "a higher memory_limit"

    def _disk(self, choice: Choice) -> Items:
        size = FileLayout.of(model_tensors(self.model)).nbytes
        best = size * self.config.keep_best
        disk = {"model": size}
        if self.config.store == "disk" and best:
            disk["best"] = best
        if self.config.checkpoint_every is not None:
            disk["checkpoints"] = 2 * (size + best + choice.rounds.carried)
        return disk | self.more_files(choice)

    def _notes(self) -> Iterator[str]:
        if self.workers > 1:
            yield "memory is that of one worker, of which the first does most"
        if self.device.type == "cpu":
            yield (
                f"where {GROWTH:g} times the peak is free, freed memory is kept for reuse, and the "
                "process grows up to that"
            )


@contextmanager
def refusing(model: nn.Module) -> Iterator[None]:
    """Says so where a model does not run on shapes alone.

    Raises:
        NotPredictableError: see above.
    """
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
