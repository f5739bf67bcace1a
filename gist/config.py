"""Run settings: frozen, keyword-only, checked at construction. The only home of defaults."""

from __future__ import annotations

import difflib
import math
import operator
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import partial
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from gist.errors import ConfigError, require_count
from gist.partition.samplers import DisjointUniform, Proportional, Sampler

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]
LearningRateSchedule = Callable[[float], float]
SubnetSchedule = Sequence[tuple[float, int]]

OPTIMIZERS = ("adam", "adamw", "sgd")
SCHEDULES = ("step", "cosine", "constant")
OPTIMIZER_STATES = ("reset", "carry")
EXECUTORS = ("auto", "serial", "stacked", "distributed")
BACKENDS = ("nccl", "gloo")
EVALUATIONS = ("auto", "full", "layerwise", "clusters")
STORES = ("memory", "disk")
PRECISIONS = ("full", "bfloat16")
DEFAULT_EPOCHS = 400


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of one run.

    Attributes:
        num_subnets: m, or a schedule of ``(share of the budget, m)`` such as
            ``[(0.6, 8), (0.4, 1)]``: many subnets first, fewer later.
        local_steps: ζ, the optimiser steps of every subnet between two merges.
        epochs: The total budget, split over the subnets: 400 epochs at m = 4 are 100 epochs for
            each. Defaults to 400 where ``rounds`` is not given.
        rounds: The budget as a number of rounds instead of epochs.
        optimizer: ``"adam"``, ``"adamw"``, ``"sgd"`` (momentum 0.9), or a factory that takes
            parameters and returns an optimiser; its learning rates are then the base rates.
        lr: Base learning rate.
        weight_decay: Weight decay of the named optimisers.
        schedule: Learning rate over the budget: ``"step"`` (a tenth from 50% on, a hundredth from
            75% on, as in the papers), ``"cosine"``, ``"constant"``, or a function from the share of
            the budget in [0, 1) to a factor.
        optimizer_state: ``"reset"`` starts each round with a fresh optimiser (the papers);
            ``"carry"`` moves moments along with their parameters.
        sampler: How units are dealt.
        width_correction: Scale sums over narrowed inputs up to the whole width; None does so where
            no normalisation takes care of it (:func:`~gist.partition.subnet.corrected_paths`).
        depth_correction: Where units are residual blocks, scale the output of each, whenever the
            whole model is evaluated, by the mean share of its stage that a subnet held (ResIST).
        executor: Where subnets run: ``"serial"`` one after the other, ``"stacked"`` as one grouped
            model, ``"auto"`` whichever measures faster here (by rule where ``deterministic``).
            Under torchrun each says so of the subnets of one worker; ``"distributed"`` is as
            ``"serial"``, and refuses to run without workers.
        shared_batches: Whether all subnets of a round see the same batches, or each its own. None
            lets serial subnets see their own (the papers), stacked and auto ones the same.
        capacities: Speeds of the workers, relative to each other, where they are not equal; or
            ``"measured"``, when the run starts. Subnets are then sized so that their workers take
            about equally long (:class:`~gist.Proportional`).
        backend: What workers talk through: ``"nccl"`` or ``"gloo"``; None for NCCL between GPUs.
        worker_timeout: Seconds that a worker waits for the others in one exchange.
        memory_limit: Bytes each worker may take, or text such as ``"8GiB"``; None for what is free.
        store: Where the global parameters live: in ``"memory"``, or memory-mapped on ``"disk"``
            below ``out``.
        keep_best: Keep the model of the best validation round, and hand it back at the end; False
            hands back the last round's and saves the memory of one copy.
        precision: ``"full"`` computes in the model's dtype, ``"bfloat16"`` under autocast.
        compile: Compile the local steps with ``torch.compile``.
        clip_norm: Largest gradient norm of a subnet; None does not clip.
        early_stopping: Stop after this many evaluations without a better validation metric; may
            be changed when a run is resumed, which then ends where the new value says.
        eval_every: Evaluate after every so many rounds, and after the last.
        recalibrate_bn: Re-estimate BatchNorm statistics of the merged model on training data
            before it is evaluated; None does so where m > 1.
        deterministic: Refuse operations that are not deterministic on the device.
        fast_dev_run: A smoke run: one round of two steps.
        checkpoint_every: Write a checkpoint after every so many rounds; needs ``out``.
        out: Directory that receives model, history, settings and checkpoints.
        callbacks: Called with ``(trainer, record)`` after every round; True stops the run.
        progress: Show a progress bar; None does so on a terminal.
        seed: Seed of everything drawn during training.

    Raises:
        ConfigError: a value that cannot be used.
    """

    num_subnets: int | SubnetSchedule = 4
    local_steps: int = 20
    epochs: float | None = None
    rounds: int | None = None
    optimizer: str | OptimizerFactory = "adam"
    lr: float = 0.01
    weight_decay: float = 5e-4
    schedule: str | LearningRateSchedule = "step"
    optimizer_state: Literal["reset", "carry"] = "reset"
    sampler: Sampler = field(default_factory=DisjointUniform)
    width_correction: bool | None = None
    depth_correction: bool = True
    executor: str = "auto"
    shared_batches: bool | None = None
    capacities: str | Sequence[float] | None = None
    backend: str | None = None
    worker_timeout: float = 1800.0
    memory_limit: int | str | None = None
    store: str = "memory"
    keep_best: bool = True
    precision: str = "full"
    compile: bool = False
    clip_norm: float | None = None
    early_stopping: int | None = None
    eval_every: int = 1
    recalibrate_bn: bool | None = None
    deterministic: bool = False
    fast_dev_run: bool = False
    checkpoint_every: int | None = None
    out: str | os.PathLike[str] | None = None
    callbacks: tuple[Callable[[Any, Any], bool | None], ...] = ()
    progress: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self._normalize()
        for name in ("local_steps", "eval_every"):
            require_count(name, getattr(self, name))
        for name in ("rounds", "early_stopping", "checkpoint_every"):
            if getattr(self, name) is not None:
                require_count(name, getattr(self, name))
        for name in ("lr", "worker_timeout", "clip_norm", "epochs"):
            value, required = getattr(self, name), name in ("lr", "worker_timeout")
            if (value is not None or required) and not (_is_number(value) and value > 0):
                raise ConfigError(f"{name} must be a positive number", got=repr(value))
        if not (_is_number(self.weight_decay) and self.weight_decay >= 0):
            raise ConfigError("weight_decay must be 0 or more", got=repr(self.weight_decay))
        if self.epochs is not None and self.rounds is not None:
            raise ConfigError(
                "the budget is given twice",
                got=f"epochs={self.epochs}, rounds={self.rounds}",
                remedy="give either epochs or rounds",
            )
        _require_choice("optimizer", self.optimizer, OPTIMIZERS, or_function=True)
        _require_choice("schedule", self.schedule, SCHEDULES, or_function=True)
        _require_choice("optimizer_state", self.optimizer_state, OPTIMIZER_STATES)
        _require_choice("executor", self.executor, EXECUTORS)
        _require_choice("store", self.store, STORES)
        if self.backend is not None:
            _require_choice("backend", self.backend, BACKENDS)
        _require_choice("precision", self.precision, PRECISIONS)
        if self.memory_limit is not None:
            object.__setattr__(self, "memory_limit", parse_bytes("memory_limit", self.memory_limit))
        if self.store == "disk" and self.out is None:
            raise ConfigError("a store on disk needs a directory", remedy="give out='runs/name'")
        if self.executor == "stacked" and self.shared_batches is False:
            raise ConfigError(
                "stacked subnets see the same batches",
                got="executor='stacked', shared_batches=False",
                remedy="use executor='serial', or leave shared_batches out",
            )
        if self.checkpoint_every is not None and self.out is None:
            raise ConfigError("checkpoint_every needs a directory", remedy="give out='runs/name'")
        if not isinstance(self.sampler, Sampler) or not is_dataclass(self.sampler):
            raise ConfigError(
                "sampler must be a gist.Sampler, and a dataclass, so that a run can name it",
                got=repr(self.sampler),
                expected="such as DisjointUniform()",
                remedy="put @dataclass(frozen=True) on a sampler of your own",
            )
        optional_switches = ("width_correction", "recalibrate_bn", "progress", "shared_batches")
        switches = ("depth_correction", "deterministic", "fast_dev_run", "keep_best", "compile")
        for name in (*switches, *optional_switches):
            value, optional = getattr(self, name), name in optional_switches
            if not isinstance(value, bool) and not (optional and value is None):
                choices = "True, False or None" if optional else "True or False"
                raise ConfigError(f"{name} must be {choices}", got=repr(value))
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ConfigError("seed must be an integer", got=repr(self.seed))
        if not all(callable(callback) for callback in self.callbacks):
            raise ConfigError("callbacks must be functions", got=repr(self.callbacks))
        self._check_capacities()
        self._check_subnets()

    def _check_capacities(self) -> None:
        if self.capacities is None:
            return
        if self.capacities != "measured":
            given = () if isinstance(self.capacities, str) else tuple(self.capacities)
            if not given or not all(_is_number(speed) and speed > 0 for speed in given):
                raise ConfigError(
                    "capacities must be positive numbers, one for each worker",
                    got=repr(self.capacities),
                    expected="such as (1.0, 0.5), or 'measured'",
                )
            object.__setattr__(self, "capacities", tuple(float(speed) for speed in given))
        if type(self.sampler) is not DisjointUniform:
            raise ConfigError(
                "capacities size the subnets of a random partition, and of no other sampler",
                got=type(self.sampler).__name__,
                remedy="leave capacities or sampler out",
            )

    def sampler_for(self, capacities: Sequence[float] | None = None) -> Sampler:
        """How units are dealt to workers of these speeds; by default of the given ones."""
        if capacities is None and not isinstance(self.capacities, str):
            capacities = self.capacities
        return self.sampler if capacities is None else Proportional.to_speed(capacities)

    def _normalize(self) -> None:
        """Whole numbers of other libraries become int, a path a str, one callback a tuple."""
        for name in ("num_subnets", "local_steps", "rounds", "eval_every", "seed"):
            value = getattr(self, name)
            if not isinstance(value, bool) and hasattr(value, "__index__"):
                object.__setattr__(self, name, operator.index(value))
        if self.out is not None:
            object.__setattr__(self, "out", os.fspath(self.out))
        several = isinstance(self.callbacks, Iterable) and not callable(self.callbacks)
        given = tuple(self.callbacks) if several else (self.callbacks,)
        object.__setattr__(self, "callbacks", given)

    def _check_subnets(self) -> None:
        if isinstance(self.num_subnets, int):
            require_count("num_subnets", self.num_subnets)
            return
        try:
            phases = tuple((float(share), operator.index(m)) for share, m in self.num_subnets)
        except (TypeError, ValueError):
            phases = ()
        shares = [share for share, _ in phases]
        fits = phases and min(shares) > 0 and abs(sum(shares) - 1) < 1e-6
        if not fits or min(m for _, m in phases) < 1:
            raise ConfigError(
                "num_subnets must be a count or a schedule of (share of the budget, count)",
                got=repr(self.num_subnets),
                expected="shares that sum to 1, such as [(0.6, 8), (0.4, 1)]",
            )
        object.__setattr__(self, "num_subnets", phases)

    @property
    def phases(self) -> tuple[tuple[float, int], ...]:
        """``(share of the budget, m)`` in order; one phase where m is a number."""
        if isinstance(self.num_subnets, int):
            return ((1.0, self.num_subnets),)
        return tuple(self.num_subnets)

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> TrainConfig:
        """A config from keyword arguments.

        Raises:
            ConfigError: an unknown name, with the closest known one.
        """
        split_settings(settings, cls)
        return cls(**settings)

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON values; functions by their qualified name."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        values["sampler"] = {"name": type(self.sampler).__name__, **asdict(self.sampler)}  # type: ignore[call-overload]
        values["callbacks"] = [_name_of(callback) for callback in self.callbacks]
        for name in ("optimizer", "schedule"):
            if callable(values[name]):
                values[name] = _name_of(values[name])
        if not isinstance(self.num_subnets, int):
            values["num_subnets"] = [list(phase) for phase in self.phases]
        return values


@dataclass(frozen=True, kw_only=True)
class GraphConfig:
    """Settings of the graph side of a run.

    Attributes:
        clusters: Parts that the training graph is cut into; None trains on the whole graph.
        clusters_per_batch: Clusters whose union, with the edges between them, is a batch.
        batches: Any other source of batches, instead of clusters.
        inductive: Train on the subgraph of the training nodes alone; evaluate on the whole graph.
        evaluation: How the model is evaluated: ``"full"`` in one pass, ``"layerwise"`` layer by
            layer in blocks under ``memory_limit``, ``"clusters"`` on the unions of clusters (the
            papers, not exact), ``"auto"`` in one pass where it fits, else layer by layer. Over
            several workers ``"layerwise"``, and ``"auto"`` with a model of over 64 MiB, is layer by
            layer on all of them; else the model is put together on rank 0.

    Raises:
        ConfigError: a value that cannot be used.
    """

    clusters: int | None = None
    clusters_per_batch: int = 1
    batches: Any = None
    inductive: bool = False
    evaluation: str = "auto"

    def __post_init__(self) -> None:
        for name in ("clusters", "clusters_per_batch"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, bool) and hasattr(value, "__index__"):
                object.__setattr__(self, name, operator.index(value))
            if name == "clusters_per_batch" or value is not None:
                require_count(name, getattr(self, name))
        _require_choice("evaluation", self.evaluation, EVALUATIONS)
        if not isinstance(self.inductive, bool):
            raise ConfigError("inductive must be True or False", got=repr(self.inductive))
        if self.clusters is None and self.clusters_per_batch != 1:
            raise ConfigError(
                "clusters_per_batch needs clusters",
                got=f"clusters_per_batch={self.clusters_per_batch}, clusters=None",
                remedy="give clusters, the number of parts",
            )
        if self.clusters is not None and self.clusters_per_batch > self.clusters:
            raise ConfigError(
                "a batch cannot hold more clusters than there are",
                got=f"clusters={self.clusters}, clusters_per_batch={self.clusters_per_batch}",
            )
        if self.clusters is not None and self.batches is not None:
            raise ConfigError("give either clusters or batches, not both")

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON values; other batches than clusters by the name of their recipe."""
        recipe = None if self.batches is None else type(self.batches).__name__
        return {**vars(self), "batches": recipe}


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Settings of the data side of a run on independent samples: images, feature vectors, bags.

    Attributes:
        batch_size: Samples of a step.
        eval_batch_size: Samples that are scored at a time.
        shards: Deal the training samples to the subnets, so that each sees its own alone; False
            lets every subnet see all of them (the IST paper has both).
        steps_per_epoch: Batches that make one pass over the data, for a loader that cannot tell.
        sampled_outputs: Outputs drawn in each step, besides those of the batch's labels, that the
            loss is taken over; None takes all of them.
        train_eval_samples: Training samples that the training metric is taken over, at most.

    Raises:
        ConfigError: a value that cannot be used.
    """

    batch_size: int = 128
    eval_batch_size: int = 1000
    shards: bool = False
    steps_per_epoch: int | None = None
    sampled_outputs: int | None = None
    train_eval_samples: int = 2_000

    def __post_init__(self) -> None:
        optional = ("steps_per_epoch", "sampled_outputs")
        for name in ("batch_size", "eval_batch_size", "train_eval_samples", *optional):
            value = getattr(self, name)
            if value is not None and not isinstance(value, bool) and hasattr(value, "__index__"):
                object.__setattr__(self, name, operator.index(value))
            if value is not None or name not in optional:
                require_count(name, getattr(self, name))
        if not isinstance(self.shards, bool):
            raise ConfigError("shards must be True or False", got=repr(self.shards))

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return dict(vars(self))


@dataclass(frozen=True, kw_only=True)
class FederatedConfig:
    """Settings of the clients and the clock of a federated run.

    Attributes:
        clients: How many there are.
        in_flight: How many work at a time; for a synchronous strategy, its cohort.
        split: Who has which data: ``"label-shards"`` (two each; ``"label-shards:5"``: five),
            ``"dirichlet"`` (α = 0.5; ``"dirichlet:0.1"``) or ``"iid"``; for a graph, of the labels
            of its nodes, or ``"clusters"`` that METIS cuts; or a
            :class:`~gist.federated.splits.Split`.
        fleet: How fast clients are: ``"lognormal"``, ``"uniform"``, ``"asyncdrop"``, or a
            :class:`~gist.federated.fleet.Fleet`.
        strategy: Name of one of :data:`~gist.federated.strategies.STRATEGIES`, or a
            :class:`~gist.federated.strategies.Strategy`.
        capacity: Share of the units that a client can train, or levels of it, the fastest clients'
            first; None for the strategy's.
        duration: The budget, as seconds of the clock.
        timeout: Seconds after which the server stops to wait for an answer; None for never, but
            for clients that are lost, whose place is given away after twice their time.

    Raises:
        ConfigError: a value that cannot be used.
    """

    clients: int = 100
    in_flight: int = 10
    split: Any = "label-shards"
    fleet: Any = "lognormal"
    strategy: Any = "asyncdrop"
    capacity: float | Sequence[float] | None = None
    duration: float | None = None
    timeout: float | None = None

    def __post_init__(self) -> None:
        for name in ("clients", "in_flight"):
            value = getattr(self, name)
            if not isinstance(value, bool) and hasattr(value, "__index__"):
                object.__setattr__(self, name, operator.index(value))
            require_count(name, getattr(self, name))
        if self.in_flight > self.clients:
            raise ConfigError(
                "more clients cannot be at work than there are",
                got=f"in_flight={self.in_flight}, clients={self.clients}",
            )
        for name in ("duration", "timeout"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and value > 0):
                raise ConfigError(f"{name} must be a positive number of seconds", got=repr(value))

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON values; objects by their text."""
        plain = (int, float, str, type(None), list, tuple)
        return {k: v if isinstance(v, plain) else repr(v) for k, v in vars(self).items()}


_ELSEWHERE = {
    "batch": "batch_size",
    "gradient_clip_val": "clip_norm",
    "learning_rate": "lr",
    "lr_scheduler": "schedule",
    "m": "num_subnets",
    "max_epochs": "epochs",
    "max_grad_norm": "clip_norm",
    "max_norm": "clip_norm",
    "n_epochs": "epochs",
    "num_epochs": "epochs",
    "num_parts": "clusters",
    "output_dir": "out",
    "patience": "early_stopping",
    "random_state": "seed",
    "scheduler": "schedule",
    "subnets": "num_subnets",
    "verbose": "progress",
    "wd": "weight_decay",
    "zeta": "local_steps",
}
"""What settings are called elsewhere."""


def split_settings(settings: dict[str, Any], *kinds: Any) -> list[dict[str, Any]]:
    """Keyword arguments, dealt to the config classes that know them.

    Raises:
        ConfigError: a name that none knows, with the one that is meant, or else all of them.
    """
    known = [{entry.name for entry in fields(kind)} for kind in kinds]
    names = sorted(set().union(*known))
    for name in settings.keys() - set(names):
        close = [_ELSEWHERE.get(name, ""), *difflib.get_close_matches(name, names, n=1)]
        meant = next((each for each in close if each in names), None)
        raise ConfigError(
            f"unknown setting {name!r}",
            expected=None if meant else f"one of {', '.join(names)}",
            remedy=f"did you mean {meant!r}?" if meant else None,
        )
    return [{k: v for k, v in settings.items() if k in theirs} for theirs in known]


_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def parse_bytes(name: str, value: int | float | str) -> int:
    """Bytes from a number or from text such as ``"8GiB"`` or ``"500 MB"``.

    Raises:
        ConfigError: it is neither, or not positive.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        number, unit = "", "?"
    else:
        match = re.fullmatch(r"\s*([0-9.eE+]+)\s*([a-zA-Z]*)\s*", str(value))
        number, unit = match.groups() if match else ("", "?")
    try:
        count = int(float(number) * _UNITS[unit.lower()])
    except (ValueError, KeyError, OverflowError):
        count = 0
    if count < 1:
        raise ConfigError(
            f"{name} must be a positive number of bytes",
            got=repr(value),
            expected="such as 8_000_000_000 or '8GiB'",
        )
    return count


def learning_rate_factor(schedule: str | LearningRateSchedule, share: float) -> float:
    """The factor on the base learning rate after ``share`` of the budget, in [0, 1)."""
    if callable(schedule):
        try:
            return float(schedule(share))
        except (TypeError, ValueError) as error:
            raise ConfigError(
                "schedule must be a function from the share of the budget to a factor",
                got=error,
                expected="such as lambda share: 1 - share",
            ) from error
    if schedule == "step":
        return 1.0 if share < 0.5 else 0.1 if share < 0.75 else 0.01
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * share))
    return 1.0


def _name_of(function: Any) -> str:
    if isinstance(function, partial):
        values = [*map(repr, function.args), *(f"{k}={v!r}" for k, v in function.keywords.items())]
        return f"{_name_of(function.func)}({', '.join(values)})"
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _require_choice(
    name: str, value: Any, choices: tuple[str, ...], *, or_function: bool = False
) -> None:
    if or_function and callable(value):
        return
    if value not in choices:
        expected = " or ".join(map(repr, choices)) + (" or a function" if or_function else "")
        close = difflib.get_close_matches(str(value), choices, n=1)
        raise ConfigError(
            f"unknown {name}",
            got=repr(value),
            expected=expected,
            remedy=f"did you mean {close[0]!r}?" if close else None,
        )
