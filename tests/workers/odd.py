"""Two workers with different settings: refused, by both. Run by test_faults.py."""

from __future__ import annotations

import os
import tempfile

import torch

from gist import ConfigError, GISTTrainer
from tests.workers.equal import DATA, MODELS, make

CASE = "csbm gcn m=4 reset"


def start(what: str, rank: int) -> None:
    """Makes a trainer that differs in one thing from the other worker's."""
    if what == "subnets":
        make(CASE, num_subnets=4 + rank)
    elif what == "out":  # a common habit, which here would be a deadlock
        make(CASE, out=None if rank else tempfile.mkdtemp())
    elif what == "patience":
        make(CASE, early_stopping=3 + rank)
    elif what == "capacities":
        make(CASE, capacities=(1.0, 0.5) if rank else "measured")
    elif what == "memory":
        with torch.device("cpu" if rank else "meta"):
            model = MODELS["gcn"](7, 16, 3)
        GISTTrainer(model, DATA["csbm"], executor="serial")


def main() -> None:
    rank = int(os.environ["RANK"])
    for what in ("subnets", "out", "patience", "capacities", "memory"):
        try:
            start(what, rank)
        except ConfigError as error:
            print(f"{rank} {what}: {error}\n", end="", flush=True)


if __name__ == "__main__":
    main()
