"""Starts real worker processes on Gloo, and hands on what they print when they fail.

``torchrun`` starts PyTorch's launcher, for tests of what it does: restarts and signals.
``run_workers`` gives the same environment to processes that are forked from one that has imported
everything: most of the time of a small run is the import of its libraries.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import psutil
from torch.distributed import TCPStore

from gist.execution.comm import listen

SCRIPTS = Path(__file__).parent
ROOT = SCRIPTS.parents[1]

Ended = subprocess.CompletedProcess[str]


def environment(**more: str) -> dict[str, str]:
    """One thread per process, nothing of a launcher around this test."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("TORCHELASTIC", "GLOO"))}
    dropped = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK")
    for name in (*dropped, "PYTHONDONTWRITEBYTECODE"):  # every start would compile everything
        clean.pop(name, None)
    fixed = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    return {**clean, **fixed, **more}


def torchrun(script: str, *args: str, workers: int, max_restarts: int = 0) -> Ended:
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
        timeout=180,
        env=environment(),
        check=False,
    )
    assert done.returncode == 0, f"{script} on {workers} workers:\n{done.stdout}\n{done.stderr}"
    return done


def run_workers(
    script: str,
    *args: str,
    workers: int,
    timeout: float = 180,
    check: bool = True,
    **env: str,
) -> list[Ended]:
    """Runs a script of this folder as the ranks of one run; what each left behind, by rank.

    Ranks that are not over after ``timeout`` seconds are killed. Unless ``check`` is False, a rank
    that fails is an error, with what all printed.
    """
    listener = listen("127.0.0.1")
    host, port = listener.getsockname()
    store = TCPStore(  # torchrun's agent keeps one too
        host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    common = {
        "WORLD_SIZE": str(workers),
        "LOCAL_WORLD_SIZE": str(workers),
        "MASTER_ADDR": host,
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        **env,
    }
    with tempfile.TemporaryDirectory() as folder:
        jobs: list[dict[str, Any]] = [
            {
                "script": str(SCRIPTS / script),
                "args": args,
                "env": environment(**common, RANK=str(rank), LOCAL_RANK=str(rank)),
                "out": f"{folder}/{rank}.out",
                "err": f"{folder}/{rank}.err",
                "cwd": str(Path.cwd()),
            }
            for rank in range(workers)
        ]
        files = [[Path(job[kind]) for kind in ("out", "err")] for job in jobs]
        for file in chain(*files):
            file.touch()
        codes = _fork(jobs, timeout)
        texts = [[file.read_text() for file in two] for two in files]
    ended = [Ended([script, *args], code, *text) for code, text in zip(codes, texts, strict=True)]
    told = (f"rank {r}: {e.returncode}\n{e.stdout}\n{e.stderr}" for r, e in enumerate(ended))
    assert not (check and any(codes)), "\n".join((f"{script} on {workers} workers", *told))
    return ended


@cache
def _zygotes() -> list[subprocess.Popen[str]]:
    """Two, as each has its own order of sets: ranks must not agree on one by chance."""
    return [
        subprocess.Popen(
            [sys.executable, str(SCRIPTS / "zygote.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
            start_new_session=True,
        )
        for _ in range(2)
    ]


def _fork(jobs: list[dict[str, Any]], timeout: float) -> list[int]:
    """Has the zygotes do the jobs, in turn; the exit codes."""
    codes = [0] * len(jobs)
    deadline = time.monotonic() + timeout
    zygotes = _zygotes()
    for turn, zygote in enumerate(zygotes):
        assert zygote.stdin is not None
        print(json.dumps(jobs[turn :: len(zygotes)]), file=zygote.stdin, flush=True)
    for turn, zygote in enumerate(zygotes):
        assert zygote.stdout is not None
        while not select.select([zygote.stdout], [], [], max(0.1, deadline - time.monotonic()))[0]:
            for worker in psutil.Process(zygote.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    worker.kill()
        codes[turn :: len(zygotes)] = json.loads(zygote.stdout.readline())
    return codes
