"""Where the time of a training step goes: operators by self time, full model and one subnet.

python examples/benchmarks/profile_step.py cora --subnets 8
python examples/benchmarks/profile_step.py cora --subnets 8 --dense    # ÂX kept as dense
"""

from __future__ import annotations

import argparse

import torch
from torch.profiler import ProfilerActivity, profile

from gist.experiment import Experiment
from gist.graph import adjacency

STEPS = 40


def profiled(experiment: Experiment) -> list[tuple[str, float]]:
    """Operators and their milliseconds per optimiser step, most expensive first."""
    data = experiment.load_data()
    experiment.trainer(data).fit()  # warm up: kernels, kept products
    trainer = experiment.trainer(data)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        result = trainer.fit()
    steps = sum(record.local_steps * record.num_subnets for record in result.history)
    events = [(e.key, e.self_cpu_time_total / 1000 / steps) for e in recorded.key_averages()]
    return sorted(events, key=lambda event: -event[1])


def main() -> None:
    """Prints one table per method."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("dataset")
    parser.add_argument("--subnets", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dense", action="store_true", help="keep ÂX dense")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.dense:
        adjacency.SPARSE_BELOW = 0.0
    common = {"local_steps": 20, "norm": "layer"}
    for method, m in (("full", 1), ("gist", options.subnets)):
        settings = {**common, "num_subnets": m, "epochs": STEPS}
        events = profiled(Experiment(dataset=options.dataset, method=method, settings=settings))
        total = sum(milliseconds for _, milliseconds in events)
        print(f"\n{options.dataset}, {method}, m = {m}: {total:.2f} ms a step")
        for name, milliseconds in events[:8]:
            print(f"  {name:40} {milliseconds:8.2f}")


if __name__ == "__main__":
    main()
