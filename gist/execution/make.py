"""The executor that a run's settings ask for."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from torch import nn

from gist.config import TrainConfig
from gist.errors import PartitionError
from gist.execution.auto import AutoExecutor
from gist.execution.executor import Executor
from gist.execution.local import make_optimizer
from gist.execution.objective import Objective
from gist.execution.serial import SerialExecutor
from gist.execution.stacked import StackedExecutor, check_optimizer
from gist.execution.store import Store
from gist.partition.grouped.grouping import NotGroupableError
from gist.partition.spec import PartitionSpec


def make_executor(
    model: nn.Module,
    spec: PartitionSpec,
    objective: Objective,
    config: TrainConfig,
    *,
    store: Store | None = None,
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
        most: Subnets that memory has room for side by side; None for any number.
        check_grouping: Raises :class:`PartitionError` where the grouped form of the model's
            subnets does not compute what they compute.
        say: Called with what was picked and why.

    Warns:
        UserWarning: subnets cannot be stacked, so they run one after the other.
    """
    serial = SerialExecutor(model, spec, objective, config, store)
    if config.executor == "serial" or max(m for _, m in config.phases) == 1:
        return serial
    if most == 1:
        say("serial execution (memory has no room for two subnets side by side)")
        return serial
    if config.shared_batches is False:
        say("serial execution (shared_batches=False: every subnet sees batches of its own)")
        return serial
    try:
        check_optimizer(make_optimizer(config, model.parameters()))
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
    stacked = StackedExecutor(model, spec, objective, config, store, most=most)
    if config.executor == "stacked":
        return stacked
    stacked.carried = serial.carried
    return AutoExecutor([serial, stacked], by_rule=config.deterministic, say=say)
