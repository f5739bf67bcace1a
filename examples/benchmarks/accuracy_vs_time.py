"""Accuracy against training time: the full model, subnets, and schedules from many to one.

A fixed budget alone is not an honest measure: narrow subnets can be left under-trained by it, and a
full model may be done long before it ends. So the full model and the annealed schedules also get
less than the budget, which shortens their learning-rate schedule with it, and the most subnets get
more. For every run this reports the test metric at the best validation round, the training seconds,
and the seconds until the validation metric has reached the full model's final one minus half a
point: the last of three evaluations in a row whose mean has, or the end of a run whose last
evaluation has; infinity for a seed that never gets there. Runs of one seed follow each other, so
that a slow hour falls on all of them; all numbers are medians over the seeds. The full model is the
row with one subnet.

    python examples/benchmarks/accuracy_vs_time.py
    python examples/benchmarks/accuracy_vs_time.py --datasets csbm --plot curves.png
    python examples/benchmarks/accuracy_vs_time.py --quick
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from tables import Row, finish, median, options, start

from gist.config import SubnetSchedule
from gist.experiment import Experiment
from gist.graph.data import GraphData
from gist.history import TrainResult

COLUMNS = (
    "dataset",
    "subnets",
    "local_steps",
    "budget",
    "test_metric",
    "seconds",
    "seconds_to_target",
    "reached",
    "speedup_to_target",
)
MARGIN = 0.005
WINDOW = 3

EVALUATE_AFTER = 5
"""Least steps of a subnet between two evaluations, which take time and are not counted."""

WIDE: dict[str, dict[str, Any]] = {"csbm": {"hidden": 1024, "epochs": 200}}
"""What differs from a dataset's card: on the generated graph, a step is mostly hidden products."""

HARD: dict[str, dict[str, Any]] = {"csbm": {"feature_signal": 0.5, "homophily": 0.5}}
"""Options of generated data: one that is not learnt within a few epochs."""

SHORT, LONG = 0.4, 4.0
"""Shares of the budget that some runs get instead of the whole of it."""

ANNEALED: dict[str, SubnetSchedule] = {
    "8:0.6,1:0.4": [(0.6, 8), (0.4, 1)],
    "8:0.4,4:0.2,2:0.2,1:0.2": [(0.4, 8), (0.2, 4), (0.2, 2), (0.2, 1)],
}
"""Schedules of subnets, ``m:share of the budget``."""


Case = tuple[int | str, int, float]
"""Subnets, local steps, share of the budget."""


def seconds_to(result: TrainResult, target: float) -> float:
    """Training seconds at which ``WINDOW`` evaluations, or the last of the run, have the target."""
    points = [(r.seconds, r.val_metric) for r in result.history if r.val_metric is not None]
    for i in range(len(points) - WINDOW + 1):
        window = points[i : i + WINDOW]
        if sum(value for _, value in window) / WINDOW >= target:
            return window[-1][0]
    return points[-1][0] if points[-1][1] >= target else math.inf


def final_metric(result: TrainResult) -> float:
    """The validation metric at the end: the mean of the last ``WINDOW`` evaluations."""
    values = [r.val_metric for r in result.history if r.val_metric is not None][-WINDOW:]
    return sum(values) / len(values)


def run(dataset: str, data: GraphData, method: str, seed: int, settings: Any) -> TrainResult:
    """One run; settings not given are those of the dataset's card."""
    experiment = Experiment(
        dataset=dataset, method=method, settings={"progress": False, **settings}, seed=seed
    )
    return experiment.trainer(data).fit()


def plan(parsed: Any) -> list[Case]:
    """What is run, the full model with the whole budget first: it sets the target."""
    full, most = parsed.full_steps, max(parsed.subnets)
    runs: list[Case] = [(1, full, 1.0), (1, full, SHORT)]
    runs += [(m, steps, 1.0) for m in parsed.subnets for steps in parsed.local_steps]
    runs += [(most, steps, LONG) for steps in parsed.local_steps]
    runs += [
        (name, steps, share)
        for name in ANNEALED
        for steps in parsed.local_steps
        if steps > 1
        for share in (1.0, SHORT)
    ]
    return runs


def measure(dataset: str, parsed: Any, curves: dict[str, Any]) -> list[Row]:
    """The rows of one dataset."""
    found: dict[Case, list[tuple[float, float, float]]] = {}
    data = Experiment(dataset=dataset, data_options=HARD.get(dataset, {})).load_data()
    wide = WIDE.get(dataset, {})
    budget = parsed.epochs or Experiment(dataset=dataset, settings=wide).resolved()["epochs"]
    for seed in range(parsed.repeats):
        target = None
        for key in plan(parsed):
            name, steps, share = key
            given = {
                **wide,
                "num_subnets": ANNEALED.get(name, name),
                "local_steps": steps,
                "eval_every": max(1, EVALUATE_AFTER // steps),
                "epochs": share * budget,
            }
            result = run(dataset, data, "full" if name == 1 else "gist", seed, given)
            if target is None:
                target = final_metric(result) - MARGIN
            values = (result.test_metric, result.seconds, seconds_to(result, target))
            found.setdefault(key, []).append(values)
            curves.setdefault((dataset, *key), []).append(
                [(r.seconds, r.val_metric) for r in result.history if r.val_metric is not None]
            )
            print(dataset, seed, *key, *(f"{value:.4g}" for value in values), flush=True)
    rows = []
    base = None
    for (name, steps, share), seeds in found.items():
        reached = sum(math.isfinite(v[2]) for v in seeds)
        to_target = median([v[2] for v in seeds])
        base = to_target if base is None else base
        rows.append(
            {
                "dataset": dataset,
                "subnets": name,
                "local_steps": steps,
                "budget": share,
                "test_metric": median([v[0] for v in seeds]),
                "seconds": median([v[1] for v in seeds]),
                "seconds_to_target": to_target,
                "reached": f"{reached}/{len(seeds)}",
                "speedup_to_target": base / to_target if math.isfinite(to_target) else math.nan,
            }
        )
    return rows


def plot(curves: dict[Any, Any], rows: list[Row], path: Path) -> None:
    """Validation metric against training seconds: for each dataset the full model and the best."""
    import matplotlib.pyplot as plt

    datasets = sorted({key[0] for key in curves})
    figure, axes = plt.subplots(
        1, len(datasets), figsize=(4.5 * len(datasets), 3.2), squeeze=False, layout="constrained"
    )
    for axis, dataset in zip(axes[0], datasets, strict=True):
        shown = {}
        for row in rows:
            if row["dataset"] == dataset:
                best = shown.get(row["subnets"])
                if best is None or row["seconds_to_target"] < best["seconds_to_target"]:
                    shown[row["subnets"]] = row
        for name, row in shown.items():
            steps, share = row["local_steps"], row["budget"]
            points = curves[dataset, name, steps, share][0]
            m = "full" if name == 1 else name
            axis.plot(*zip(*points, strict=True), label=f"{m}, ζ = {steps}, {share:g}", lw=1)
        axis.set(title=dataset, xlabel="training seconds", ylabel="validation", xscale="log")
        axis.legend(fontsize=6)
        axis.grid(True, alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Prints the table."""
    parser = options(__doc__, threads=1)
    parser.add_argument("--datasets", nargs="+", default=["cora", "citeseer", "csbm"])
    parser.add_argument("--subnets", type=int, nargs="+", default=[2, 4, 8], help="m, above 1")
    parser.add_argument("--local-steps", type=int, nargs="+", default=[1, 5, 20, 100])
    parser.add_argument("--full-steps", type=int, default=5, help="steps between evaluations")
    parser.add_argument("--epochs", type=float, help="the budget; the card's by default")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves of seed 0")
    parsed = parser.parse_args()
    if min(parsed.subnets) < 2:
        parser.error("--subnets: the full model, m = 1, runs anyway")
    if parsed.quick:
        parsed.datasets, parsed.repeats, parsed.subnets = ["digits"], 1, [2, 8]
        parsed.local_steps, parsed.epochs = [5, 20], 80.0
    start(parsed)
    rows: list[Row] = []
    curves: dict[str, Any] = {}
    for dataset in parsed.datasets:
        rows += measure(dataset, parsed, curves)
    finish(parsed, rows, COLUMNS)
    if parsed.plot is not None:
        plot(curves, rows, parsed.plot)


if __name__ == "__main__":
    main()
