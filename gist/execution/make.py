"""The store and the executor that a run's settings ask for."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from gist.config import TrainConfig
from gist.errors import ConfigError, PartitionError
from gist.execution.auto import AutoExecutor
from gist.execution.comm import Comm
from gist.execution.distributed import ShardedStore
from gist.execution.executor import Executor
from gist.execution.initialise import has_no_memory
from gist.execution.local import make_optimizer
from gist.execution.mapped import MappedStore, disk_copies
from gist.execution.objective import Objective
from gist.execution.serial import SerialExecutor
from gist.execution.stacked import StackedExecutor, check_optimizer
from gist.execution.store import MemoryStore, Store
from gist.partition.grouped.grouping import NotGroupableError
from gist.partition.optim_state import CarriedState
from gist.partition.spec import PartitionSpec


def make_store(
    model: nn.Module, spec: PartitionSpec, config: TrainConfig, comm: Comm, device: torch.device
) -> Store:
    """The store that ``config.store`` asks for.

    Raises:
        ConfigError: a model on the ``meta`` device for a store in memory; and see
            :class:`~gist.execution.mapped.MappedStore`.
    """
    if comm.is_distributed:
        if config.store == "disk":
            raise ConfigError(
                "over several workers the model is in memory, a share of it in each",
                got="store='disk'",
                remedy="leave store out, or start one process",
            )
        return ShardedStore(model, spec, comm, device, seed=config.seed)
    if config.store == "disk":
        assert config.out is not None, "checked by TrainConfig"
        copies = disk_copies(
            keep_best=config.keep_best, checkpoints=config.checkpoint_every is not None
        )
        return MappedStore(model, spec, Path(config.out), seed=config.seed, copies=copies)
    if has_no_memory(model):
        raise ConfigError(
            "a model on the meta device has no values",
            got=type(model).__name__,
            remedy="use store='disk' with out=..., or build the model in memory",
        )
    return MemoryStore(model, spec)


def make_executor(
    model: nn.Module,
    spec: PartitionSpec,
    objective: Objective,
    config: TrainConfig,
    *,
    store: Store | None = None,
    comm: Comm | None = None,
    carried: CarriedState | None = None,
    most: int | None = None,
    check_grouping: Callable[[], object] = lambda: None,
    say: Callable[[str], None] = lambda text: None,
) -> Executor:
    """The executor that ``config.executor`` asks for.

    Args:
        model: The global model.
        spec: Its partition spec.
        objective: Batches and loss.
        config: Run settings.
        store: Where the global parameters live; the model itself by default.
        comm: The ranks that the subnets are spread over; this process alone by default.
        carried: The optimiser's state between rounds; by default as ``config`` says.
        most: Subnets that memory has room for side by side; None for any number.
        check_grouping: Raises :class:`PartitionError` where the grouped form of the model's
            subnets does not compute what they compute.
        say: Called with what was picked and why.

    Warns:
        UserWarning: subnets cannot be stacked, so they run one after the other.
    """
    serial = SerialExecutor(model, spec, objective, config, store, comm, carried)
    each = -(-max(m for _, m in config.phases) // serial.comm.size)
    if config.executor in ("serial", "distributed") or each == 1:
        return serial
    if most == 1:
        say("serial execution (memory has no room for two subnets side by side)")
        return serial
    if config.shared_batches is False:
        say("serial execution (shared_batches=False: every subnet sees batches of its own)")
        return serial
    try:
        check_optimizer(make_optimizer(config, _stand_ins(model)))
        check_grouping()
    except PartitionError as error:
        if config.executor == "stacked" or not isinstance(error, NotGroupableError):
            warnings.warn(
                f"subnets run one after the other, because they cannot be stacked: {error}",
                stacklevel=3,
            )
        else:
            say(f"serial execution ({error.what})")
        return serial
    stacked = StackedExecutor(model, spec, objective, config, store, comm, carried, most=most)
    if config.executor == "stacked":
        return stacked
    stacked.carried = serial.carried
    return AutoExecutor([serial, stacked], by_rule=config.deterministic, say=say)


def _stand_ins(model: nn.Module) -> list[nn.Parameter]:
    """Parameters of the model's shapes, for an optimiser that will not step."""
    return [
        nn.Parameter(torch.zeros((), dtype=p.dtype).expand(p.shape), requires_grad=p.requires_grad)
        for p in model.parameters()
    ]
