"""Starts real worker processes on Gloo, and hands on what they print when they fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parent
ROOT = SCRIPTS.parents[1]


def environment(**more: str) -> dict[str, str]:
    """One thread per process, nothing of a launcher around this test."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("TORCHELASTIC", "GLOO"))}
    dropped = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK")
    for name in (*dropped, "PYTHONDONTWRITEBYTECODE"):  # every start would compile everything
        clean.pop(name, None)
    fixed = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    return {**clean, **fixed, **more}


def torchrun(
    script: str,
    *args: str,
    workers: int,
    max_restarts: int = 0,
    timeout: float = 180,
    check: bool = True,
    **env: str,
) -> subprocess.CompletedProcess[str]:
    """Runs a script of this folder under torchrun, on a free port."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            f"--nproc-per-node={workers}",
            f"--max-restarts={max_restarts}",
            "--monitor-interval=0.1",
            str(SCRIPTS / script),
            *args,
        ],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment(**env),
        check=False,
    )
    if check:
        assert done.returncode == 0, f"{script} on {workers} workers:\n{done.stdout}\n{done.stderr}"
    return done
