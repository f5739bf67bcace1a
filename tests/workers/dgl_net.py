"""Trains a small model of DGL's layers, and writes its weights: run by test_dgl.py."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from gist import GISTTrainer, load_dataset
from gist.graph.dgl_graph import import_dgl

dgl = import_dgl()
from dgl.nn import GATConv, SAGEConv  # noqa: E402  # once DGL knows its backend


class Net(nn.Module):
    """Attention, dropout, and a mean over neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = GATConv(7, 4, num_heads=3, feat_drop=0.2, allow_zero_in_degree=True)
        self.norm = nn.BatchNorm1d(12)
        self.conv2 = SAGEConv(12, 3, "mean", feat_drop=0.3)

    def forward(self, g: Any, x: Tensor) -> Tensor:
        return self.conv2(g, self.norm(self.conv1(g, x).flatten(-2)).relu())


def train() -> nn.Module | None:
    """The model after three rounds; on rank 0."""
    data = load_dataset("csbm", num_nodes=120, num_features=7, num_classes=3, seed=1)
    g = dgl.graph(tuple(data.edge_index), num_nodes=data.num_nodes)
    g.ndata["feat"], g.ndata["label"] = data.x, data.y
    for split in ("train", "val", "test"):
        g.ndata[f"{split}_mask"] = data.mask(split)
    torch.manual_seed(0)
    settings = {"clusters": 6, "clusters_per_batch": 2, "progress": False, "keep_best": False}
    run = GISTTrainer(
        Net(), g, wiring=["conv1", "norm", "conv2"], num_subnets=4, local_steps=2, rounds=3, seed=5,
        executor="serial", optimizer_state="carry", **settings,
    )  # fmt: skip
    run.fit()
    return run.gather_model()


if __name__ == "__main__":
    torch.set_num_threads(1)
    if (model := train()) is not None:
        torch.save(model.state_dict(), sys.argv[1])
