"""ogbn-products with the flags, the defaults and the log of OGB's Cluster-GCN example; and subnets.

    python examples/ogb/products.py
    python examples/ogb/products.py --num_partitions 15000 --batch_size 32 --hidden_channels 256
    python examples/ogb/products.py --subnets 8 --submission products.json

See docs/leaderboards.md.
"""

from __future__ import annotations

from leaderboard import Board, main

BOARD = Board(
    script="products.py",
    title="Training on clusters of ogbn-products.",
    datasets=("ogbn-products",),
    full={
        "model": "sage",
        "hidden": 256,
        "layers": 3,
        "norm": None,
        "dropout": 0.5,
        "lr": 0.001,
        "weight_decay": 0.0,
        "schedule": "constant",
        "epochs": 50,
        "eval_every": 5,
        "clusters": 15_000,
        "clusters_per_batch": 32,
        "inductive": False,
    },
)

if __name__ == "__main__":
    main(BOARD)
