"""ogbn-arxiv with the flags, the defaults and the log of OGB's own example; and with subnets.

    python examples/ogb/arxiv.py
    python examples/ogb/arxiv.py --use_sage
    python examples/ogb/arxiv.py --subnets 4 --submission arxiv.json
    python examples/ogb/arxiv.py --subnets 4 --dataset arxiv-like --runs 2

``arxiv-like`` is a generated stand-in of ogbn-arxiv's shape; see docs/leaderboards.md.
"""

from __future__ import annotations

from leaderboard import Board, main

BOARD = Board(
    script="arxiv.py",
    title="Full-batch training on ogbn-arxiv.",
    datasets=("ogbn-arxiv", "arxiv-like"),
    full={
        "model": "gcn",
        "hidden": 256,
        "layers": 3,
        "norm": "batch",
        "dropout": 0.5,
        "lr": 0.01,
        "weight_decay": 0.0,
        "schedule": "constant",
        "epochs": 500,
        "eval_every": 1,
        "clusters": None,
        "clusters_per_batch": 1,
        "inductive": False,
    },
)

if __name__ == "__main__":
    main(BOARD)
