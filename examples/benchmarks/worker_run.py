"""One worker of a run, for workers.py and slow_link.py: trains; rank 0 writes what it took."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from gist.experiment import Experiment

DATA = {"num_features": 100, "num_classes": 47, "seed": 0}


def run(given: dict[str, Any]) -> dict[str, Any]:
    """Seconds, bytes, memory and metrics of a run; the largest of all workers where they differ."""
    torch.set_num_threads(given["threads"])
    experiment = Experiment(
        dataset="csbm",
        method=given["method"],
        data_options=DATA | {"num_nodes": given["nodes"]},
        settings={"model": "sage", "norm": "layer", "progress": False, **given["settings"]},
    )
    trainer = experiment.trainer(experiment.load_data())
    comm = trainer.comm
    before = comm.sent + comm.received + comm.told
    result = trainer.fit()
    rounds = len(result.history)
    own = {
        "seconds": result.seconds,
        "eval_seconds": result.eval_seconds,
        "exchange_seconds": result.repartition_seconds,
        "bytes_per_round": (result.bytes_sent + result.bytes_received) / rounds,
        "peak_memory_bytes": result.peak_memory_bytes,
        "all_bytes": comm.sent + comm.received + comm.told - before,
    }
    everyones = comm.gather_values(own)
    return {
        **{key: max(each[key] for each in everyones) for key in own},
        "rounds": rounds,
        "test_metric": result.test_metric,
        "train_loss": result.history[-1].train_loss,
        "workers": comm.size,
        "main": comm.is_main,
    }


if __name__ == "__main__":
    found = run(json.loads(sys.argv[1]))
    if found["main"]:
        Path(sys.argv[2]).write_text(json.dumps(found))
