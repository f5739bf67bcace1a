"""A forked worker is what a fresh process would be, and none is left behind."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import psutil
import pytest

from tests.workers.spawn import run_workers

pytestmark = pytest.mark.xdist_group("workers")

FRESH = """
import json, os, random, sys
import numpy as np, torch
print(json.dumps({
    "rank": os.environ["RANK"], "given": os.environ["GIVEN"], "args": sys.argv[1:],
    "cwd": os.getcwd(), "path": sys.path[0], "threads": len(os.listdir("/proc/self/task")),
    "intra": torch.get_num_threads(), "seed": torch.initial_seed(), "hash": hash("gist"),
    "numpy": np.random.rand(), "random": random.random(), "input": sys.stdin.read(),
    "group": torch.distributed.is_initialized(), "bad_fork": torch.cuda._is_in_bad_fork(),
}))
"""
FAILS = """
import os, signal, sys
sys.stderr.write("said")
if os.environ["RANK"] == "0": os.kill(os.getpid(), signal.SIGKILL)
if os.environ["RANK"] == "1": sys.exit(7)
raise ValueError("wrong")
"""
HANGS = """
import pathlib, os, sys, time
pathlib.Path(sys.argv[1], os.environ["RANK"]).write_text(str(os.getpid()))
print("waits", flush=True)
time.sleep(600)
"""


def script(folder: Path, text: str) -> str:
    path = folder / "script.py"
    path.write_text(text)
    return str(path)


def test_a_forked_worker_is_as_fresh_as_any(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = run_workers(script(tmp_path, FRESH), "a", "b", workers=3, GIVEN="yes")
    found = [json.loads(done.stdout) for done in ended]
    for rank, each in enumerate(found):
        assert each["rank"] == str(rank)
        assert (each["given"], each["args"], each["input"]) == ("yes", ["a", "b"], "")
        assert each["cwd"] == each["path"] == str(tmp_path)
        assert each["threads"] == each["intra"] == 1
        assert not each["group"]
        assert not each["bad_fork"], "CUDA can still be used"
    for own in ("numpy", "random", "seed"):
        assert len({each[own] for each in found}) == 3
    assert len({each["hash"] for each in found}) == 2, "sets are ordered in two ways"


def test_how_each_worker_ended_is_told(tmp_path: Path):
    ended = run_workers(script(tmp_path, FAILS), workers=3, check=False)
    assert [done.returncode for done in ended] == [-signal.SIGKILL, 7, 1]
    assert ended[1].stderr == "said"
    assert "ValueError: wrong" in ended[2].stderr


def test_workers_that_are_late_are_killed(tmp_path: Path):
    ended = run_workers(script(tmp_path, HANGS), str(tmp_path), workers=3, timeout=3, check=False)
    assert [done.returncode for done in ended] == [-signal.SIGKILL] * 3
    assert {done.stdout for done in ended} == {"waits\n"}
    assert not any(psutil.pid_exists(int((tmp_path / str(r)).read_text())) for r in range(3))
