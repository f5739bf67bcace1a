"""Small runs of every baseline, to be compared over numbers of workers.

Run by test_workers.py, in one process and by workers.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gist import GISTTrainer, load_dataset
from gist.baselines import DataParallelTrainer, EnsembleTrainer, local_sgd_settings
from gist.errors import ConfigError
from gist.nn import GCN
from gist.partition.spec import model_tensors

DATA = load_dataset("csbm", num_nodes=120, num_features=7, num_classes=3, seed=1)
SETTINGS = {
    "rounds": 3,
    "local_steps": 2,
    "clusters": 6,
    "clusters_per_batch": 2,
    "executor": "serial",
    "progress": False,
    "seed": 5,
}
CASES: dict[str, dict[str, Any]] = {
    "local-sgd": {"num_subnets": 3, "optimizer_state": "carry"},
    "local-sgd, batch norm": {"num_subnets": 4, "norm": "batch"},
    "ensemble": {"num_subnets": 3},
    "ensemble, stacked": {"num_subnets": 4, "norm": None, "executor": "stacked"},
    "data-parallel": {"num_subnets": 4},
    "data-parallel, batch norm": {"num_subnets": 2, "norm": "batch", "clip_norm": 0.5},
    "data-parallel, sgd": {"num_subnets": 4, "optimizer": "sgd", "lr": 0.1, "keep_best": False},
}


def make(case: str, **more: Any) -> GISTTrainer:
    """The trainer of a case."""
    settings = {**SETTINGS, **CASES[case], **more}
    torch.manual_seed(0)
    model = GCN(7, 16, 3, num_layers=3, dropout=0.5, norm=settings.pop("norm", "layer"))
    method = case.partition(",")[0]
    if method == "ensemble":
        return EnsembleTrainer(model, DATA, **settings)
    if method == "data-parallel":
        return DataParallelTrainer(model, DATA, **settings)
    return GISTTrainer(model, DATA, **local_sgd_settings(settings))


def stop(trainer: Any, record: Any) -> bool:
    """A power cut after the second round."""
    return bool(record.round == 1)


def weights(trainer: GISTTrainer) -> dict[str, Tensor]:
    """The outcome's tensors on rank 0; of an ensemble the logits that it predicts with."""
    logits = trainer.predict()
    if isinstance(trainer, EnsembleTrainer):
        return {"logits": logits}
    model = trainer.gather_model()
    return {} if model is None else {n: t.detach() for n, t in model_tensors(model).items()}


def outcome(case: str, **more: Any) -> dict[str, Any]:
    """What a run left behind."""
    trainer = make(case, **more)
    result = trainer.fit()
    return {
        "weights": {name: tensor.tolist() for name, tensor in weights(trainer).items()},
        "rounds": [[r.train_loss, r.val_metric, r.val_loss] for r in result.history],
        "bytes": [[r.bytes_sent, r.bytes_received] for r in result.history],
        "test": trainer.evaluate("test"),
        "workers": trainer.comm.size,
    }


def main() -> None:
    torch.set_num_threads(1)
    gc.freeze()  # every run collects garbage: not among a hundred thousand objects of libraries
    folder = Path(sys.argv[1])
    found = {case: outcome(case, out=folder / case) for case in CASES}
    for case in CASES:
        trainer = make(case, out=folder / f"{case}, cut", checkpoint_every=1, callbacks=(stop,))
        trainer.fit()
    try:
        make("data-parallel", num_subnets=3)
    except ConfigError as error:
        found["uneven"] = str(error)
    if trainer.comm.is_main:
        (folder / "out.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
