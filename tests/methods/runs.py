"""One table of settings for the tests of every method: small runs that learn something.

Run as a script, it trains all of them, in one process or by workers, and writes what came out.
"""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import gist.nn
from gist import GISTTrainer, SampleData, SubnetTrainer, Whole, load_dataset
from gist.methods import ISTTrainer, LoFTTrainer, ResISTTrainer
from gist.partition.spec import model_tensors

GRAPH = load_dataset("csbm", num_nodes=120, num_features=7, num_classes=3, seed=1)


def pictures(count: int = 96, size: int = 6, classes: int = 3) -> SampleData:
    """Noisy images of as many patterns."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(count) % classes
    patterns = torch.randint(0, 256, (classes, 1, size, size), generator=generator)
    noise = torch.randint(0, 256, (count, 1, size, size), generator=generator)
    x = ((5 * patterns[y] + noise) // 6).to(torch.uint8)
    return SampleData.of((x, y), fractions=(0.5, 0.25, 0.25), name="pictures")


def bags() -> SampleData:
    """The same, as sparse features of which most are zero."""
    data = pictures()
    x = data.x.flatten(1).float() / 255
    x = torch.where(x > 0.6, x, 0.0).to_sparse_csr()
    splits = {"train": data.train, "val": data.val, "test": data.test}
    return SampleData.of((x, data.y), **splits, name="bags")


DATA = {"graph": GRAPH, "pictures": pictures(), "bags": bags()}


def mlp(**settings: Any) -> nn.Module:
    return gist.nn.MLP(36, 48, 3, num_layers=3, **settings)


def resnet() -> nn.Module:
    return gist.nn.PreActResNet((1, 4), (4, 8), block="basic", in_channels=1, num_classes=3)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A method, what it trains, and how.

    Attributes:
        trainer: Of the method.
        model: Makes the model.
        data: Name of the data.
        settings: Of the run.
        rounds: In which the loss falls for sure.
        stacks: Whether subnets can be trained side by side.
    """

    trainer: Callable[..., SubnetTrainer]
    model: Callable[[], nn.Module]
    data: str = "pictures"
    settings: dict[str, Any] = field(default_factory=dict)
    rounds: int = 10
    stacks: bool = False


CASES = {
    "gist": Case(
        trainer=GISTTrainer,
        model=lambda: gist.nn.GCN(7, 32, 3, num_layers=2, dropout=0.1),
        data="graph",
        settings={"num_subnets": 4, "lr": 0.05},
        rounds=40,
        stacks=True,
    ),
    "ist": Case(
        trainer=ISTTrainer,
        model=lambda: mlp(dropout=0.2),
        settings={"num_subnets": 4},
        rounds=20,
        stacks=True,
    ),
    "ist, shards": Case(
        trainer=ISTTrainer,
        model=lambda: mlp(norm="layer"),
        settings={"num_subnets": 4, "shards": True, "batch_size": 8},
        rounds=40,
    ),
    "ist, bags": Case(
        trainer=ISTTrainer,
        model=lambda: mlp(input="bag"),
        data="bags",
        settings={"num_subnets": 4, "optimizer_state": "carry"},
    ),
    "resist": Case(
        trainer=ResISTTrainer,
        model=resnet,
        settings={"num_subnets": 4, "min_blocks": 2, "warmup_rounds": 1, "lr": 0.05},
    ),
    "resist, more subnets than blocks": Case(
        trainer=ResISTTrainer,
        model=resnet,
        settings={"num_subnets": 4, "lr": 0.05, "optimizer_state": "carry"},
    ),
    "resist, local sgd": Case(
        trainer=ResISTTrainer,
        model=resnet,
        settings={"num_subnets": 4, "sampler": Whole(), "lr": 0.05},
    ),
    "loft": Case(trainer=LoFTTrainer, model=resnet, settings={"num_subnets": 4, "lr": 0.05}),
    "loft, chain": Case(
        trainer=LoFTTrainer,
        model=lambda: gist.nn.VGG(((4,), (8, 8)), in_channels=1, num_classes=3),
        settings={"num_subnets": 4, "lr": 0.05},
    ),
}


def make(name: str, **more: Any) -> SubnetTrainer:
    """The trainer of a case."""
    case = CASES[name]
    torch.manual_seed(0)
    settings = {
        "rounds": 4,
        "lr": 0.1,
        "local_steps": 3,
        "executor": "serial",
        "schedule": "constant",
        "progress": False,
        "seed": 5,
        **({} if case.data == "graph" else {"batch_size": 16}),
        **case.settings,
        **more,
    }
    return case.trainer(case.model(), DATA[case.data], **settings)


def digest(model: nn.Module) -> str:
    """Of every bit of every parameter and buffer."""
    tensors = model_tensors(model).items()
    data = b"".join(name.encode() + t.detach().cpu().numpy().tobytes() for name, t in tensors)
    return hashlib.sha256(data).hexdigest()


def outcome(name: str) -> dict[str, Any]:
    """Weights and history of a case, on rank 0; and what each rank sent and received, by round."""
    trainer = make(name)
    result = trainer.fit()
    model = trainer.gather_model()
    moved = [[0, 0], *([r.bytes_sent, r.bytes_received] for r in result.history)]
    own = [[b - a for a, b in zip(*two, strict=True)] for two in itertools.pairwise(moved)]
    return {
        "weights": None if model is None else digest(model),
        "rounds": [[r.train_loss, r.val_metric, r.val_loss, r.test_metric] for r in result.history],
        "best": result.best.round,
        "bytes": trainer.comm.gather_values(own),
    }


def main() -> None:
    torch.set_num_threads(1)
    gc.freeze()
    found = {name: outcome(name) for name in CASES}
    if found["gist"]["weights"] is not None:
        Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
