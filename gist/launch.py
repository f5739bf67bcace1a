"""Starts the workers of a run on this machine: torchrun, with everything bound to loopback."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from gist.errors import ConfigError
from gist.execution.comm import available_cores, listen

_LOOPBACK = "127.0.0.1"

GRACE_SECONDS = 600
"""For a worker that was told to stop: to finish its round, and to write a checkpoint."""


def launch(command: Sequence[str], *, workers: int, max_restarts: int = 0) -> int:
    """Runs a Python command in so many processes, and returns their exit status.

    This process is torchrun's agent meanwhile, and keeps the store at which it would meet others,
    which listens on the loopback address alone; rank 0's store and Gloo's connections stay there
    too. Each worker may use its share of the cores unless ``OMP_NUM_THREADS`` says otherwise.
    SIGTERM and SIGINT are handed on.

    Args:
        command: What follows ``python``, such as ``["-m", "gist", "train", ...]``.
        workers: Number of processes.
        max_restarts: How often all of them are started again when one has died.

    Returns:
        0; or the status of the worker that failed first, 128 more than the signal's number where it
        was killed.

    Raises:
        ConfigError: PyTorch was built without torch.distributed.
    """
    if not dist.is_available():
        raise ConfigError("this PyTorch has no torch.distributed", remedy="leave --workers out")
    from torch.distributed import TCPStore  # type: ignore[attr-defined]
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    listener = listen(_LOOPBACK)
    port = listener.getsockname()[1]
    store = TCPStore(
        _LOOPBACK,
        port,
        is_master=True,
        timeout=timedelta(seconds=GRACE_SECONDS),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    settings = {
        "OMP_NUM_THREADS": os.environ.get(
            "OMP_NUM_THREADS", str(max(available_cores() // workers, 1))
        ),
        # Else the agent opens a store for the workers, on all addresses; now rank 0 opens one.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    if sys.platform == "linux":
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            settings[name] = os.environ.get(name, "lo")
    arguments = [
        f"--nproc-per-node={workers}",
        f"--max-restarts={max_restarts}",
        "--monitor-interval=0.1",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={_LOOPBACK}:{port}",
        "--rdzv-conf=is_host=false",
        f"--shutdown-timeout={GRACE_SECONDS}",
        f"--local-addr={_LOOPBACK}",
        *command,
    ]
    try:
        with _environment(settings), _quiet("torch.distributed.elastic"):
            run(parse_args(arguments))  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            print(f"worker {rank} was killed by {failure.signal_name()}", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as error:
        return 128 + int(error.sigval)
    finally:
        del store
    return 0


@contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    """What the workers find in theirs."""
    before = dict(os.environ)
    os.environ.update(settings)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Logs of a library that repeat what workers have said, left out."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
