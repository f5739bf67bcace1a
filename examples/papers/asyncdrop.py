"""AsyncDrop against other federated strategies, at equal time of the clock.

The AsyncDrop paper (Dun et al., AISTATS 2023) trains 104 clients with a few labels each; its
largest accuracies on CIFAR-10, and seconds to 35%, stand beside. By default this is a small
network. `--fleet asyncdrop` is the clock that the authors assume, on which a client that drops a
quarter of the units needs a quarter less time; `lognormal`, the default, counts operations and
bytes. `best` is the largest test accuracy of all evaluations, as the paper has it; `clients_*` are
accuracies on the clients' own training samples.

    python examples/papers/asyncdrop.py
"""

from __future__ import annotations

import sys
from statistics import mean, stdev
from typing import Any

from table_rows import images, options, start
from tables import Row, finish

from gist.experiment import Experiment
from gist.federated.strategies import STRATEGIES

PAPER = {
    "asyncdrop": (50.67, 1579),
    "asyncdrop-uniform": (48.98, 2010),
    "async-fedavg": (45.79, 2106),
    "fedbuff": (35.81, 3013),
}
"""Accuracy in percent on CIFAR-10, and seconds to 35%, by the paper's table 2."""

COLUMNS = (
    "strategy",
    "best",
    "best_std",
    "last",
    "seconds_to_target",
    "reached",
    "merges",
    "megabytes_down",
    "megabytes_up",
    "staleness",
    "least_coverage",
    "clients_mean",
    "clients_worst",
    "paper",
    "paper_seconds",
)

ASYNCHRONOUS = ("asyncdrop", "asyncdrop-uniform", "async-fedavg", "fedasync", "fedbuff")


def main() -> None:
    """Prints the table."""
    parser = options(__doc__)
    parser.add_argument("--dataset", default="cifar10", choices=["cifar10", "mnist"])
    parser.add_argument("--model", default="preact-resnet18")
    parser.add_argument("--hidden", type=int, default=8, help="width of the first stage, or an MLP")
    parser.add_argument("--norm", default="batch", help="layer: alike for all clients")
    parser.add_argument("--train-size", type=int, help="training images; all by default")
    parser.add_argument(
        "--strategies",
        nargs="+",
        choices=list(STRATEGIES),
        default=[*ASYNCHRONOUS, "async-fjord", "fedavg", "fedprox"],
    )
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--in-flight", type=int, default=10)
    parser.add_argument("--fleet", default="lognormal")
    parser.add_argument("--split", default="label-shards")
    parser.add_argument("--duration", type=float, default=1000.0, help="seconds of the clock")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--target", type=float, default=0.35, help="test accuracy to be reached")
    parser.add_argument("--evaluations", type=int, default=20, help="of each run")
    parsed = parser.parse_args()
    dataset, data_options = parsed.dataset, {}
    if parsed.epochs is not None or (parsed.train_size is not None and dataset != "cifar10"):
        parser.error("the budget is --duration, and --train-size is of cifar10")
    if parsed.quick or dataset == "cifar10":
        parsed.subnets = []
        dataset, data_options = images(parsed)
    if parsed.quick:
        parsed.clients, parsed.in_flight, parsed.duration = 20, 4, 200.0
        parsed.strategies = parsed.strategies[:3]
    start(parsed)
    experiment = Experiment(
        dataset=dataset,
        method="federated",
        data_options=data_options,
        settings={
            "model": parsed.model,
            "hidden": parsed.hidden,
            "norm": parsed.norm,
            "local_steps": parsed.local_steps or 20,
            "batch_size": parsed.batch_size,
            "lr": parsed.lr,
            "clients": parsed.clients,
            "in_flight": parsed.in_flight,
            "fleet": parsed.fleet,
            "split": parsed.split,
            "duration": parsed.duration,
            "progress": False,
        },
    )
    data = experiment.load_data()
    rows = [_row(parsed, experiment, data, strategy) for strategy in parsed.strategies]
    finish(parsed, rows, COLUMNS)


def _row(parsed: Any, experiment: Experiment, data: Any, strategy: str) -> Row:
    """One strategy, over all seeds."""
    bests, lasts, times, reports = [], [], [], []
    for seed in range(parsed.seeds):
        settings = {**experiment.settings, "strategy": strategy}
        one = Experiment(
            dataset=experiment.dataset,
            method="federated",
            data_options=experiment.data_options,
            settings=settings,
            seed=seed,
        )
        planned = len(one.trainer(data).rounds)
        settings["eval_every"] = max(planned // parsed.evaluations, 1)
        trainer: Any = one.trainer(data)
        trainer.fit()
        tests = [r.test_metric for r in trainer.history if r.test_metric is not None]
        bests.append(100 * max(tests))
        lasts.append(100 * tests[-1])
        times.append(trainer.time_to(parsed.target))
        reports.append(trainer.report())
    reached = [time for time in times if time is not None]
    stale = [
        sum(int(late) * n for late, n in report["staleness"].items())
        / max(sum(report["staleness"].values()), 1)
        for report in reports
    ]
    known = PAPER if parsed.dataset == "cifar10" and not parsed.quick else {}
    paper, paper_seconds = known.get(strategy, (None, None))
    row: Row = {
        "strategy": strategy,
        "best": mean(bests),
        "best_std": stdev(bests) if len(bests) > 1 else 0.0,
        "last": mean(lasts),
        "seconds_to_target": mean(reached) if reached else None,
        "reached": len(reached),
        "merges": mean(report["merges"] for report in reports),
        "megabytes_down": mean(report["bytes_down"] / 1e6 for report in reports),
        "megabytes_up": mean(report["bytes_up"] / 1e6 for report in reports),
        "staleness": mean(stale),
        "least_coverage": min(min(report["least_coverage"].values()) for report in reports),
        "clients_mean": 100 * mean(report["client_metric"]["mean"] for report in reports),
        "clients_worst": 100 * mean(report["client_metric"]["worst"] for report in reports),
        "paper": paper,
        "paper_seconds": paper_seconds,
    }
    print(
        f"{strategy}: {row['best']:.2f} ± {row['best_std']:.2f}%, "
        f"{parsed.target:.0%} in {row['seconds_to_target']} s",
        file=sys.stderr,
        flush=True,
    )
    return row


if __name__ == "__main__":
    main()
