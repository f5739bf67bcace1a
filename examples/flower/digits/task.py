"""What server and clients share: the model, and who has which data."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from gist import SampleData, load_dataset
from gist.federated.splits import IID
from gist.nn import MLP


def make_model(context: Any) -> MLP:
    """The whole model; the server's values are the ones that count."""
    torch.manual_seed(int(context.run_config["seed"]))
    return MLP(64, int(context.run_config["hidden"]), 10, num_layers=3, norm="layer")


def own_data(context: Any) -> SampleData:
    """The data of one client: a part of the training samples; yours come from its own disk."""
    data = load_dataset("digits-images")
    clients, seed = int(context.run_config["clients"]), int(context.run_config["seed"])
    parts = IID().split(data.labels(data.train), clients, seed=seed)
    return replace(data, train=data.train[parts[int(context.node_config["partition-id"])]])
