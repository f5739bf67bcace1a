"""Whether a run has room in memory, found out before it starts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.filesize import decimal
from torch import nn

from gist.config import TrainConfig
from gist.costs.already import bytes_already
from gist.costs.graph_run import GraphRun
from gist.costs.run import Choice, NotPredictableError, RunOnStage
from gist.costs.sample_run import SampleRun
from gist.errors import ConfigError
from gist.execution.allocator import GROWTH
from gist.execution.comm import Comm
from gist.execution.memory import free_memory, memory_in_use
from gist.graph.inference import passes_messages
from gist.graph.objective import GraphObjective
from gist.graph.outline import OutlineObjective
from gist.partition.grouped.grouping import never_grouped
from gist.partition.spec import PartitionSpec, model_tensors
from gist.samples.data import SampleData
from gist.samples.loaders import first_batch
from gist.samples.objective import SampleObjective
from gist.samples.outline import OutlineSamples

_COPIES = 20
"""More than the tensors of the size of the model, or of a layer's features, that a run ever has."""

_COPIES_SCORED = 4
"""Likewise of a layer's features, without a backward pass."""


@dataclass(frozen=True, kw_only=True)
class Room:
    """What a run takes, and what it may take.

    Attributes:
        needed: Bytes of its peak, or more; None where they cannot be told.
        limit: Bytes that it may take.
        most: Subnets that are stacked at most; None for any number.
        evaluation: Bytes that an evaluation may take beside all that stays; None where there is
            room for anything.
    """

    needed: int | None
    limit: int
    most: int | None = None
    evaluation: int | None = None


def find_room(
    model: nn.Module,
    spec: PartitionSpec,
    objective: GraphObjective | SampleObjective,
    config: TrainConfig,
    device: torch.device,
    *,
    comm: Comm | None = None,
    shards: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> Room:
    """What a run takes, refused where that is more than it may.

    A run that is small by a rough bound is let pass at once; any other is rehearsed
    (:mod:`gist.costs.rehearsal`), which takes a second or two.

    Args:
        model: The whole model.
        spec: Its partition spec.
        objective: The data side.
        config: Settings; ``memory_limit`` is what the run may take, by default what is in use and
            free.
        device: Where it is to run.
        comm: The workers that the subnets are spread over; those of one machine share what is free.
        shards: Whether each of them has a share of the model, or all of it.
        say: Called with why nothing could be told, where that is so.

    Raises:
        ConfigError: it does not fit; says what takes the memory, and what to change.
    """
    comm = comm or Comm()
    in_use = memory_in_use(device)
    limit = config.memory_limit
    if limit is None:
        limit = in_use + free_memory(device) // (comm.ranks_here if device.type == "cpu" else 1)
    assert isinstance(limit, int), "parsed by TrainConfig"
    if limit <= in_use:
        raise ConfigError(
            "memory_limit is less than what is in use before the run starts",
            got=decimal(limit),
            expected=f"more than {decimal(in_use)}: this process, its libraries, model and data",
            remedy="raise memory_limit, or use store='disk' for the model",
        )
    if isinstance(objective, GraphObjective):
        bound = in_use + _bound_on_graph(model, objective)
    else:
        apart = config.executor == "serial" or config.shared_batches is False
        most = 1 if apart or never_grouped(model, spec) else max(m for _, m in config.phases)
        bound = in_use + _bound_on_samples(model, objective, most)
    if bound * GROWTH <= limit:
        return Room(needed=bound, limit=limit)
    try:
        run = _on_stage(model, spec, objective, config, device, comm.size if shards else 1)
        choice = run.choose()
    except NotPredictableError as error:
        say(f"not checked whether the run fits into memory: {error}")
        return Room(needed=None, limit=limit)
    if choice.peak > limit:
        raise _too_large(run, choice)
    return Room(
        needed=choice.peak,
        limit=limit,
        most=choice.most if choice.limited else None,
        evaluation=choice.evaluation.may_take,
    )


def _on_stage(
    model: nn.Module,
    spec: PartitionSpec,
    objective: GraphObjective | SampleObjective,
    config: TrainConfig,
    device: torch.device,
    workers: int,
) -> RunOnStage[Any]:
    data = objective.data
    there = list(model_tensors(model).values())
    if isinstance(objective, GraphObjective):
        there += objective.data.tensors()
    elif isinstance(data, SampleData):
        there += [data.x, data.y]
    given: dict[str, Any] = {
        "device": device,
        "counted": bytes_already(there, device),
        "workers": workers,
    }
    if isinstance(objective, GraphObjective):
        outline, how = OutlineObjective.like(objective), objective.evaluation
        return GraphRun(model, spec, outline, config, evaluation=how, **given)
    most = max(m for _, m in config.phases)
    return SampleRun(model, spec, OutlineSamples.like(objective, most), config, **given)


def _bound_on_graph(model: nn.Module, objective: GraphObjective) -> int:
    """More than a run takes: every tensor that it may ever make at once, and several times."""
    data = objective.data
    rows = data.num_nodes
    if passes_messages(model) or objective.scores_edges:
        rows += data.num_edges
    tensors = model_tensors(model).values()
    columns = data.num_features + data.num_classes + sum(max(t.shape, default=0) for t in tensors)
    parameters = sum(tensor.nbytes for tensor in tensors)
    return _COPIES * (parameters + rows * columns * data.x.element_size()) + 64 * data.num_edges


def _bound_on_samples(model: nn.Module, objective: SampleObjective, side_by_side: int) -> int:
    """Likewise, of so many subnets at once; scores are computed without a backward pass."""
    data, config, like = objective.data, objective.config, objective.data.example()
    batch, scored, together = config.batch_size, config.eval_batch_size, 0
    if isinstance(data, SampleData):
        together = data.num_samples * (data.metric == "roc_auc")
    else:
        batch = len(first_batch(data.train)[0])
        scored = max(batch, scored)
    tensors = model_tensors(model).values()
    parameters = sum(tensor.nbytes for tensor in tensors)
    columns = data.num_classes + sum(max(t.shape, default=0) for t in tensors)
    sample = math.prod(like.shape[1:]) + columns * _places(model, like.shape[1:])
    rows = _COPIES * batch * side_by_side + _COPIES_SCORED * scored
    kept = 2 * together * data.num_classes
    return _COPIES * parameters + (rows * sample + kept) * like.element_size()


def _places(model: nn.Module, shape: torch.Size) -> int:
    """Places of a sample at which a layer may have columns: pixels of an image, or words of a text.

    One, where a sample is a vector, or is made one by a network of matrices.
    """
    entries, weights = math.prod(shape), [tensor.shape for tensor in model.parameters()]
    flat = all(len(each) < 3 for each in weights) and any(entries in each for each in weights)
    return 1 if flat else entries // min(shape)


def _too_large(run: RunOnStage[Any], choice: Choice) -> ConfigError:
    phase = choice.peak_phase
    items = sorted(choice.memory[phase].items(), key=lambda item: -item[1])
    parts = ", ".join(
        f"{name.replace('_', ' ')} {decimal(size)}"
        for name, size in items
        if size > choice.peak / 50
    )
    given = run.config.memory_limit is not None
    return ConfigError(
        "the run does not fit into memory",
        got=f"{decimal(choice.peak)} in {phase.replace('_', ' ')}: {parts}",
        expected=f"at most {decimal(run.limit)}, {'the memory_limit' if given else 'what is free'}",
        remedy=f"any of: {'; '.join(run.remedies(choice))}",
    )
