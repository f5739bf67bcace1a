"""Link prediction on Cora: the full model against independent subnets.

A GCN puts out embeddings, and the score of a pair of nodes is the dot product of theirs. 5% of the
links are held out for validation and 10% for testing, drawn anew with every seed; all models of a
seed predict the same ones. Everyone gets the same budget of epochs, which subnets share. Printed
are the test metrics at the best validation MRR, means and standard deviations over the seeds.

MRR ranks each link among 100 pairs that share one of its nodes. Hits@K counts links that score
above the K-th best of as many pairs without a link as there are links.

    GIST_DATA=... python examples/link_prediction.py
    GIST_DATA=... python examples/link_prediction.py --subnets 1,8 --epochs 800 --seeds 1
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from dataclasses import replace
from statistics import mean, stdev

import torch

from gist import GISTTrainer, LinkData, load_dataset
from gist.baselines import full_model_settings
from gist.nn import GCN

HITS = (10, 50)


def main() -> None:
    """Trains every number of subnets with every seed, and prints one line for each number."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--subnets", default="1,2,4", help="numbers of subnets; 1: the full model")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=400, help="shared by the subnets")
    parser.add_argument("--local-steps", type=int, default=50)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--out-channels", type=int, default=64, help="width of an embedding")
    parser.add_argument("--lr", type=float, default=0.01)
    parsed = parser.parse_args()
    graph = load_dataset("cora", normalize_features=False)
    found: dict[int, list[list[float]]] = defaultdict(list)
    for seed in range(parsed.seeds):
        data = LinkData.split(graph, seed=seed)
        hits = LinkData.split(graph, metric=f"hits@{HITS[0]}", seed=seed)
        for subnets in map(int, parsed.subnets.split(",")):
            settings = {
                "num_subnets": subnets,
                "epochs": parsed.epochs,
                "local_steps": parsed.local_steps,
                "lr": parsed.lr,
                "schedule": "constant",
                "executor": "stacked",
                "seed": seed,
            }
            if subnets == 1:
                settings = full_model_settings(settings)
            torch.manual_seed(seed)
            model = GCN(graph.num_features, parsed.hidden, parsed.out_channels, 2, norm=None)
            trainer = GISTTrainer(model, data, **settings)
            result = trainer.fit()
            z = trainer.predict()
            measured = [replace(hits, metric=f"hits@{k}").evaluate(z) for k in HITS]
            shares = [share for each in measured for share in each.values()]
            found[subnets].append([result.test_metric, *shares])
    print("  m  " + "  ".join(f"{name:>13}" for name in ("MRR", *(f"Hits@{k}" for k in HITS))))
    for subnets, rows in found.items():
        columns = zip(*rows, strict=True)
        cells = [f"{mean(c):.3f} ± {stdev(c) if len(c) > 1 else 0:.3f}" for c in columns]
        print(f"{subnets:3}  " + "  ".join(f"{cell:>13}" for cell in cells))


if __name__ == "__main__":
    main()
