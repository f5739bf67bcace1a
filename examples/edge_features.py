"""Attention that sees features of the edges (GATv2), whole and in subnets.

On a random graph most of whose edges join different classes, one noisy number per edge says whether
its ends are of the same class: about +1 or -1. Attention can learn to listen to the right edges.

    python examples/edge_features.py
"""

from __future__ import annotations

import argparse
from statistics import mean, stdev

import torch

import gist
from gist import GISTTrainer, GraphData


def with_edge_features(data: GraphData, noise: float, seed: int) -> GraphData:
    """The graph with one feature per edge: +1 within a class, -1 between two, plus noise."""
    source, target = data.edge_index
    same = 2.0 * (data.y[source] == data.y[target]).float() - 1.0
    generator = torch.Generator().manual_seed(seed)
    attr = same + noise * torch.randn(same.shape, generator=generator)
    splits = {split: data.mask(split) for split in ("train", "val", "test")}
    return GraphData.from_edges(data.edge_index, data.x, data.y, edge_attr=attr, **splits)


def main() -> None:
    """Trains with and without features of the edges, and prints test accuracies."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=1500)
    parser.add_argument("--noise", type=float, default=0.5, help="Standard deviation.")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=400)
    parser.add_argument("--subnets", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    plain = gist.load_dataset(
        "csbm",
        num_nodes=args.nodes,
        num_features=32,
        num_classes=8,
        average_degree=15,
        homophily=0.4,
        feature_signal=1.0,
    )
    featured = with_edge_features(plain, args.noise, seed=0)
    print("features of edges | m | test accuracy")
    for data in (plain, featured):
        for m in args.subnets:
            found = []
            for seed in range(args.seeds):
                torch.manual_seed(seed)
                model = gist.nn.GAT(
                    data.num_features,
                    args.hidden,
                    data.num_classes,
                    num_layers=3,
                    heads=4,
                    v2=True,
                    edge_dim=data.num_edge_features or None,
                )
                trainer = GISTTrainer(
                    model, data, num_subnets=m, epochs=args.epochs, local_steps=20, seed=seed
                )
                found.append(100 * trainer.fit().test_metric)
            spread = stdev(found) if len(found) > 1 else 0.0
            print(f"{data.num_edge_features} | {m} | {mean(found):.1f} ± {spread:.1f}", flush=True)


if __name__ == "__main__":
    main()
