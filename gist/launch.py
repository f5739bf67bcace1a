"""Starts the workers of a run on this machine: torchrun, with everything bound to loopback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from datetime import timedelta
from types import FrameType

import torch.distributed as dist

from gist.errors import ConfigError
from gist.execution.comm import listen

_LOOPBACK = "127.0.0.1"
_FORWARDED = (signal.SIGTERM, signal.SIGINT)

GRACE_SECONDS = 600
"""For a worker that was told to stop: to finish its round, and to write a checkpoint."""


def is_worker() -> bool:
    """Whether torchrun, or another launcher, started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch(command: Sequence[str], *, workers: int, max_restarts: int = 0) -> int:
    """Runs a Python command in so many processes, and returns torchrun's exit status.

    The store at which the workers meet is kept by this process, and listens on the loopback address
    alone; Gloo's connections stay there too. Each worker may use its share of the cores unless
    ``OMP_NUM_THREADS`` says otherwise. SIGTERM and SIGINT are handed on.

    Args:
        command: What follows ``python``, such as ``["-m", "gist", "train", ...]``.
        workers: Number of processes.
        max_restarts: How often all of them are started again when one has died.

    Raises:
        ConfigError: PyTorch was built without torch.distributed.
    """
    if not dist.is_available():
        raise ConfigError("this PyTorch has no torch.distributed", remedy="leave --workers out")
    listener = listen(_LOOPBACK)
    port = listener.getsockname()[1]
    store = dist.TCPStore(
        _LOOPBACK,
        port,
        is_master=True,
        timeout=timedelta(seconds=GRACE_SECONDS),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(_cores() // workers, 1)))
    # Else the agent opens a store for the workers, on all addresses; so rank 0 does, on its own.
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torchrun = [
        *(sys.executable, "-m", "torch.distributed.run"),
        f"--nproc-per-node={workers}",
        f"--max-restarts={max_restarts}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={_LOOPBACK}:{port}",
        "--rdzv-conf=is_host=false",
        f"--shutdown-timeout={GRACE_SECONDS}",
        f"--local-addr={_LOOPBACK}",
        *_entry(command),
    ]
    process = subprocess.Popen(torchrun, env=environment)

    def forward(number: int, frame: FrameType | None) -> None:
        if process.poll() is None:
            process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in _FORWARDED}
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if process.poll() is None:
            process.kill()
        del store


def _entry(command: Sequence[str]) -> list[str]:
    return ["-m", *command[1:]] if command[0] == "-m" else [*command]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
