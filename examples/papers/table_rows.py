"""What the paper-table scripts share: runs by name over several seeds, as rows of a table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch

from gist.experiment import Experiment, plan_run

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from tables import Row, finish

COLUMNS = (
    "model",
    "method",
    "subnets",
    "test_metric",
    "test_std",
    "last_test_metric",
    "seconds",
    "bytes_per_round",
    "paper",
)

EVALUATIONS = 8
"""Of every run, at most: on images they would take longer than the training between two merges."""

_SCHEMES = {"local-sgd": "local_sgd", "data-parallel": "data_parallel"}
"""Names of baselines in a plan's exchange; all others are those of subnets."""


def options(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every table has."""
    parser = argparse.ArgumentParser(
        description=(description or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file")
    parser.add_argument("--quick", action="store_true", help="digits and small models: a minute")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, help="the budget")
    parser.add_argument("--local-steps", type=int, help="of every subnet between two merges")
    return parser


def image_options(description: str | None, model: str) -> argparse.ArgumentParser:
    """The same with those of an image network on CIFAR-10."""
    parser = options(description)
    parser.add_argument("--model", default=model)
    parser.add_argument("--hidden", type=int, default=16, help="width of the first stage")
    parser.add_argument("--subnets", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--train-size", type=int, help="training images; all by default")
    return parser


def images(parsed: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Name and options of the images; for a quick run digits, and a small network."""
    if parsed.quick:
        parsed.hidden, parsed.subnets, parsed.seeds = 8, [2], 1
        parsed.epochs = parsed.epochs or 4.0
        return "digits-images", {}
    return "cifar10", {} if parsed.train_size is None else {"train_size": parsed.train_size}


def settings(parsed: argparse.Namespace, method: str, m: int, **more: Any) -> dict[str, Any]:
    """Settings of a run: those of the command line, and of the model."""
    given = {"epochs": parsed.epochs, "local_steps": parsed.local_steps}
    given |= {"num_subnets": None if method == "full" else m, "progress": False, **more}
    return {name: value for name, value in given.items() if value is not None}


def run(
    experiment: Experiment,
    data: Any,
    *,
    seeds: int,
    paper: float | None = None,
    watch: Callable[[], Any] | None = None,
) -> tuple[Row, list[Any]]:
    """Trains with several seeds; a row, and the trainers.

    Bytes are those that as many workers as subnets would exchange in a round, by the plan.

    Args:
        experiment: What to train.
        data: What on.
        seeds: How often.
        paper: What the paper has.
        watch: Makes a callback for each run.
    """
    summaries, trainers = [], []
    for seed in range(seeds):
        one = Experiment(
            dataset=experiment.dataset,
            method=experiment.method,
            data_options=experiment.data_options,
            settings=experiment.settings | ({"callbacks": watch()} if watch else {}),
            seed=seed,
        )
        trainer = _evaluated_seldom(one, data)
        summaries.append(one.summary(trainer, trainer.fit()))
        trainers.append(trainer)
    m = trainers[0].config.phases[0][1]
    row = {
        "model": summaries[0]["model"],
        "method": experiment.method,
        "subnets": m,
        **of_runs(summaries),
        "bytes_per_round": bytes_per_round(experiment, m),
        "paper": paper,
    }
    say(row)
    return row, trainers


def _evaluated_seldom(experiment: Experiment, data: Any) -> Any:
    """A trainer that evaluates about as often as all others, whatever a round is."""
    every = -(-len(experiment.trainer(data).rounds) // EVALUATIONS)
    return replace(experiment, settings={**experiment.settings, "eval_every": every}).trainer(data)


def of_runs(summaries: Sequence[Mapping[str, Any]]) -> Row:
    """Mean and deviation of what several runs came to, in percent; their median seconds."""
    tests = [100 * each["test_metric"] for each in summaries]
    return {
        "test_metric": mean(tests),
        "test_std": stdev(tests) if len(tests) > 1 else 0.0,
        "last_test_metric": 100 * mean(each["last_test_metric"] for each in summaries),
        "seconds": median(each["seconds"] for each in summaries),
    }


def say(row: Row) -> None:
    """Prints a row as soon as it is there."""
    print(
        f"{row['model']}, {row['method']}, m = {row['subnets']}: {row['test_metric']:.2f} ± "
        f"{row['test_std']:.2f}%, {row['seconds']:.1f} s",
        file=sys.stderr,
        flush=True,
    )


def bytes_per_round(experiment: Experiment, workers: int) -> int:
    """What ``workers`` exchange in a round, all together; nothing for one."""
    if workers == 1:
        return 0
    method = experiment.method or ""
    planned = plan_run(
        experiment.dataset,
        method="local-sgd" if method in _SCHEMES else method,
        data_options=experiment.data_options,
        settings={**experiment.settings, "rounds": 2, "epochs": None},
        workers=workers,
    )
    return planned.exchange[_SCHEMES.get(method, "gist")].total


def show(parsed: argparse.Namespace, rows: Sequence[Row]) -> None:
    """Prints the table, and writes it where asked to."""
    finish(parsed, list(rows), COLUMNS)


def start(parsed: argparse.Namespace) -> None:
    """Sets the number of threads."""
    torch.set_num_threads(parsed.threads)
