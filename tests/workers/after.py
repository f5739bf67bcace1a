"""What a script does after a distributed run. Run by test_launch.py; prints OK on every rank."""

from __future__ import annotations

import sys

import pytest
import torch

from gist import ConfigError, GISTTrainer
from tests.workers.equal import DATA, MODELS, digest

SETTINGS = {
    "num_subnets": 4,
    "rounds": 2,
    "local_steps": 2,
    "executor": "serial",
    "progress": False,
}


def main() -> None:
    torch.manual_seed(0)
    data = DATA["csbm"]
    model = MODELS["sage"](data.num_features, 16, data.num_classes)
    run = GISTTrainer(model, data, out=sys.argv[1], checkpoint_every=1, **SETTINGS)
    run.fit(resume="auto")  # there is nothing yet
    whole = run.gather_model()
    for refused in (model.state_dict, lambda: GISTTrainer(model, data, **SETTINGS)):
        with pytest.raises(ConfigError, match="spread over the workers"):
            refused()
    trained = None if whole is None else digest(whole)
    assert whole is None or len(whole.state_dict()) > 0
    on = GISTTrainer(whole or model, data, **SETTINGS)  # trains on, from rank 0's values
    again = on.gather_model()
    assert again is None or digest(again) == trained
    on.fit()
    later = on.gather_model()
    assert later is None or digest(later) != trained

    same = MODELS["sage"](data.num_features, 16, data.num_classes)
    run = GISTTrainer(same, data, out=sys.argv[1], checkpoint_every=1, **SETTINGS)
    run.fit(resume="auto")  # all rounds are there
    whole = run.gather_model()
    assert whole is None or digest(whole) == trained
    print(f"OK {run.comm.rank}\n", end="", flush=True)


if __name__ == "__main__":
    main()
