"""Two workers with different settings: refused. Run by test_faults.py, with what differs."""

from __future__ import annotations

import os
import sys
import tempfile

import torch

from tests.workers.equal import DATA, MODELS, make

rank = int(os.environ["RANK"])
what = sys.argv[1]
if what == "subnets":
    make("csbm gcn m=4 reset", num_subnets=4 + rank)
elif what == "out":  # a common habit, which here would be a deadlock
    make("csbm gcn m=4 reset", out=None if rank else tempfile.mkdtemp())
elif what == "patience":
    make("csbm gcn m=4 reset", early_stopping=3 + rank)
elif what == "capacities":
    make("csbm gcn m=4 reset", capacities=(1.0, 0.5) if rank else "measured")
elif what == "memory":
    from gist import GISTTrainer

    with torch.device("meta" if rank else "cpu"):
        model = MODELS["gcn"](7, 16, 3)
    GISTTrainer(model, DATA["csbm"], executor="serial")
