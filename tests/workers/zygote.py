"""Imports once what workers need, and forks them: a script that spawn.py starts.

Each line of JSON on stdin lists workers; the answer is a line with their exit codes. A worker runs
its script as a fresh interpreter would, with its own environment, and with its output in files. It
has computed nothing yet, and there are no threads that it could miss. Workers and this process end
with the process that started them, even if that one is killed.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import sklearn.datasets  # noqa: F401  # for "digits"
import torch
import torch_geometric.nn  # noqa: F401

import gist.nn  # noqa: F401

PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Has the kernel kill this process when the one that started it is no more."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def work(script: str, args: list[str], env: dict[str, str], out: str, err: str, cwd: str) -> None:
    """Runs a script, in the place of this process."""
    for fd, path in enumerate((os.devnull, out, err)):
        os.dup2(os.open(path, os.O_RDWR), fd)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    np.random.seed()  # noqa: NPY002  # else ranks would draw alike, as fresh processes do not
    torch.default_generator.seed()
    sys.argv = [script, *args]
    sys.path[0] = str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")


def main() -> None:
    end_with_parent()
    gc.freeze()  # pages with objects of libraries stay shared
    assert os.listdir("/proc/self/task") == [str(os.getpid())], "threads are lost in a fork"
    assert not torch.cuda.is_initialized()
    for line in sys.stdin:
        workers: list[dict[str, Any]] = json.loads(line)
        started: list[int] = []
        for worker in workers:
            pid = os.fork()
            if pid == 0:
                end_with_parent()
                return work(**worker)
            started.append(pid)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in started]
        print(json.dumps(codes), flush=True)


if __name__ == "__main__":
    main()
