"""A run that dies, is told to stop, or goes on: run by test_faults.py, in real processes.

Settings come as JSON: ``out``, ``result`` (a file for the final weights' digest), ``kill`` (a list
of ``[attempt, rank, round]`` at which a process kills itself in the middle of a round), ``resume``,
``stop_after`` (rounds), ``slow`` (seconds that a round takes longer).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from gist import GISTTrainer
from gist.execution.rounds import RoundExecutor
from gist.history import RoundRecord
from gist.termination import restarts
from tests.workers.equal import digest, make

CASE = "csbm sage m=8 carry"
ROUNDS = 6


def trainer(**more: Any) -> GISTTrainer:
    """The run."""
    return make(CASE, rounds=ROUNDS, keep_best=True, eval_every=1, **more)


def _die_in(kill: list[list[int]]) -> None:
    """Makes this process kill itself after the first of its subnets has been trained."""
    train = RoundExecutor._train

    def deadly(self: Any, program: Any, plan: Any, subnets: range) -> Any:
        losses = train(self, program, plan, subnets)
        if [restarts(), self.comm.rank, plan.index] in kill:
            os.kill(os.getpid(), signal.SIGKILL)
        return losses

    RoundExecutor._train = deadly  # type: ignore[method-assign]


def main() -> None:
    torch.set_num_threads(1)
    given = json.loads(sys.argv[1])
    _die_in(given.get("kill", []))

    def after_round(run: GISTTrainer, record: RoundRecord) -> bool:
        if run.comm.is_main:
            print(f"round {record.round} of attempt {restarts()} is over", flush=True)
        time.sleep(given.get("slow", 0))
        return record.round + 1 == given.get("stop_after")

    run = trainer(
        out=given.get("out"),
        checkpoint_every=1 if "out" in given else None,
        callbacks=(after_round,),
        worker_timeout=given.get("worker_timeout", 60),
    )
    run.fit(resume=given.get("resume"))
    model = run.gather_model()
    if model is not None and "result" in given:
        Path(given["result"]).write_text(digest(model))


if __name__ == "__main__":
    main()
