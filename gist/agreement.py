"""What the workers of a run find out about each other before they train.

One that raises alone, or decides otherwise than the others, would leave them waiting.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from gist.config import TrainConfig
from gist.costs.room import Room
from gist.errors import ConfigError
from gist.execution.comm import Comm, available_cores
from gist.execution.speed import measure_speed


def check_workers(
    config: TrainConfig, comm: Comm, device: torch.device, *, say: Callable[[str], None]
) -> None:
    """Refuses settings that do not go with the number of workers; says where threads are too many.

    Raises:
        ConfigError: there are no workers for ``executor="distributed"``, or more than subnets.
    """
    if config.executor == "distributed" and not comm.is_distributed:
        raise ConfigError(
            "executor='distributed' needs workers",
            got="one process that no launcher started",
            remedy="start the script with torchrun --nproc-per-node W, or gist train with "
            "--workers W",
        )
    require_subnets(config, comm.size)
    threads, cores = torch.get_num_threads() * comm.ranks_here, available_cores()
    if comm.size > 1 and device.type == "cpu" and threads > cores:
        say(
            f"{comm.ranks_here} workers with {torch.get_num_threads()} threads each share {cores} "
            "cores, which may be many times slower: set OMP_NUM_THREADS"
        )


def require_subnets(config: TrainConfig, workers: int) -> None:
    """Refuses more workers than a run ever has subnets.

    In a phase with fewer subnets than workers, the last ones wait.

    Raises:
        ConfigError: see above.
    """
    most = max(m for _, m in config.phases)
    if most < workers:
        raise ConfigError(
            "more workers than subnets: some would have nothing to do",
            got=f"{workers} workers, num_subnets={most}",
            expected=f"at most {most} workers",
            remedy="raise num_subnets, or start fewer workers; the whole model trains "
            "on several with gist train --method data-parallel",
        )


def refuse_unlike(comm: Comm, own: Mapping[str, Any]) -> None:
    """Refuses workers that were started on different runs.

    Args:
        comm: The workers; all of them take part.
        own: What this one was started on, as JSON values.

    Raises:
        ConfigError: on all of them; names one that differs from rank 0, and it in what.
    """
    first = comm.from_main(own)
    differ = sorted(key for key in own if own[key] != first.get(key))
    odd = [rank for rank, each in enumerate(comm.gather_values(differ)) if each]
    if odd:
        raise ConfigError(
            "the workers were started on different runs",
            got=f"rank {odd[0]} differs from rank 0"
            + (f" in {', '.join(differ)}" if differ else ""),
            remedy="give all of them the same model, data and settings; what is drawn at random "
            "needs the same seed: call torch.manual_seed(...) before it",
        )


def least_room(comm: Comm, room: Room | None) -> Room | None:
    """The least room that any worker has: all of them run subnets, and evaluate, alike."""
    each = comm.gather_values(None if room is None else [room.most, room.evaluation])
    if room is None or comm.size == 1:
        return room
    known = [every for every in each if every is not None]
    most = min((m for m, _ in known if m is not None), default=None)
    evaluation = min((size for _, size in known if size is not None), default=None)
    return replace(room, most=most, evaluation=evaluation)


def settle_capacities(
    config: TrainConfig, comm: Comm, device: torch.device, *, say: Callable[[str], None]
) -> tuple[float, ...] | None:
    """Relative speeds of the workers, if they count; measured by all where asked for.

    Warns:
        UserWarning: another number of them than of workers.
    """
    if config.capacities is None:
        return None
    if isinstance(config.capacities, str):
        speeds = comm.gather_values(measure_speed(device))
        found = tuple(round(speed / max(speeds), 2) for speed in speeds)
        say(f"measured capacities of the workers: {', '.join(map(str, found))}")
        return found
    given = tuple(config.capacities)
    if comm.size > 1 and len(given) != comm.size and comm.is_main:
        warnings.warn(
            f"capacities are given for {len(given)} workers, and there are {comm.size}: subnets "
            "are sized for the former; give one capacity for each worker",
            stacklevel=4,
        )
    return given
