"""Trains small models, and writes what came out: to be compared over numbers of workers.

Run by test_equal.py, in one process and by workers.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import sys
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from torch import nn

import gist.nn
from gist import Bernoulli, GISTTrainer, LinkData, Overlapping, load_dataset, local_device
from gist.partition.spec import model_tensors

MODELS = {
    "gcn": lambda *s: gist.nn.GCN(*s, num_layers=3, dropout=0.5, norm="batch"),
    "sage": lambda *s: gist.nn.GraphSAGE(*s, num_layers=3, dropout=0.5),
    "gat": lambda *s: gist.nn.GAT(*s, num_layers=3, heads=2, dropout=0.3),
}
DATA: dict[str, Any] = {
    "csbm": load_dataset("csbm", num_nodes=120, num_features=7, num_classes=3, seed=1),
    "digits": load_dataset("digits"),
}
DATA["links"] = LinkData.split(DATA["csbm"], num_negatives=9)
DEVICE = os.environ.get("GIST_TEST_DEVICE", "cpu")
CLUSTERS = {
    "csbm": {"clusters": 6, "clusters_per_batch": 2},
    "digits": {"clusters": 40, "clusters_per_batch": 2},
}
CASES: dict[str, dict[str, Any]] = {
    f"{data} {model} m={m} {state}": {
        "data": data,
        "model": model,
        "num_subnets": m,
        "optimizer_state": state,
        **CLUSTERS[data],
    }
    for data, model, m, state in product(CLUSTERS, MODELS, (4, 8), ("reset", "carry"))
    if (data == "csbm") == ((m, state) in ((4, "reset"), (8, "carry")))  # each pair occurs
}
CASES |= {
    "overlapping": {"num_subnets": 5, "sampler": Overlapping(min_units=7)},
    "bernoulli": {"num_subnets": 4, "sampler": Bernoulli(keep=0.4), "optimizer_state": "carry"},
    "annealed": {"num_subnets": [(0.5, 5), (0.5, 1)], "optimizer_state": "carry"},
    "uneven, double": {"num_subnets": 7, "dtype": torch.float64, "width": 37},
    "sgd": {"num_subnets": 4, "optimizer": "sgd", "optimizer_state": "carry", "lr": 0.1},
    "sized": {"num_subnets": 4, "capacities": (1.0, 0.25), "width": 40},
    "best": {"num_subnets": 4, "keep_best": True, "rounds": 6},
    "links": {"data": "links", "num_subnets": 4, "keep_best": True, **CLUSTERS["csbm"]},
}

PREDICTED = ("uneven, double", "best", "links", "csbm gcn m=4 reset")


def digest(model: nn.Module) -> str:
    """Of every bit of every parameter and buffer."""
    tensors = model_tensors(model).items()
    data = b"".join(name.encode() + t.detach().cpu().numpy().tobytes() for name, t in tensors)
    return hashlib.sha256(data).hexdigest()


def make(name: str, **more: Any) -> GISTTrainer:
    """The trainer of a case."""
    settings = {"model": "sage", "data": "csbm", "rounds": 3, **CASES[name], **more}
    data = DATA[settings.pop("data")]
    width, dtype = settings.pop("width", 16), settings.pop("dtype", torch.float32)
    torch.manual_seed(0)
    outputs = 5 if isinstance(data, LinkData) else data.num_classes
    model = MODELS[settings.pop("model")](data.num_features, width, outputs).to(dtype)
    if DEVICE == "cuda":
        model, settings["deterministic"] = model.to(local_device()), True
    if dtype != torch.float32:
        data = replace(data, x=data.x.to(dtype))
    settings = {
        "local_steps": 2,
        "executor": "serial",
        "keep_best": False,
        "progress": False,
        "eval_every": 3,
        **settings,
    }
    return GISTTrainer(model, data, seed=5, **settings)


def outcome(name: str, **more: Any) -> dict[str, Any]:
    """Weights and history of a case, on rank 0; and what each rank sent and received, by round."""
    run = make(name, **more)
    result = run.fit()
    model = run.gather_model()
    totals = [[0, 0], *([r.bytes_sent, r.bytes_received] for r in result.history)]
    own = [[b - a for a, b in zip(*two, strict=True)] for two in pairwise(totals)]
    scores = run.predict() if name in PREDICTED else torch.empty(0)
    rounds = [[r.train_loss, r.val_metric, r.val_loss, r.test_metric] for r in result.history]
    return {
        "weights": None if model is None else digest(model),
        "rounds": rounds,
        "best": result.best.round,
        "scores": [str(scores.dtype), hashlib.sha256(scores.cpu().numpy().tobytes()).hexdigest()],
        "bytes": run.comm.gather_values(own),
    }


def main() -> None:
    torch.set_num_threads(1)
    gc.freeze()  # every run collects garbage: not among a hundred thousand objects of libraries
    found = {name: outcome(name) for name in CASES}
    if found["best"]["weights"] is not None:
        Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
