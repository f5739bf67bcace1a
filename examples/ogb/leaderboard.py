"""What the leaderboard scripts share: OGB's flags and log, runs over seeds, the submission file."""

from __future__ import annotations

import argparse
import gc
import io
import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import psutil
import torch

from gist import (
    ConfigError,
    DataError,
    GistError,
    GISTTrainer,
    GraphData,
    MissingDependencyError,
    RoundRecord,
    TrainResult,
)
from gist.checkpoint import write_atomically
from gist.cli import parse_subnets
from gist.execution.comm import is_launched, local_device
from gist.experiment import Experiment, versions
from gist.graph.convert import SPLITS
from gist.graph.ogb_files import EXTRA, official_score

STAND_INS = {"arxiv-like": "ogbn-arxiv"}
"""Generated datasets, and whose shape they have: that dataset's Evaluator scores them."""

MODELS = {"gcn": "GCN", "sage": "GraphSAGE", "gat": "GAT"}
PAPER = "https://arxiv.org/abs/2102.10424"
SEEDS = range(10)
"""What OGB asks of a submission."""

SETTINGS = {
    "model": "model",
    "hidden_channels": "hidden",
    "num_layers": "layers",
    "dropout": "dropout",
    "norm": "norm",
    "lr": "lr",
    "epochs": "epochs",
    "local_steps": "local_steps",
    "eval_steps": "eval_every",
    "num_partitions": "clusters",
    "batch_size": "clusters_per_batch",
}
"""Flags that are settings of a run, and their names there."""

_SAME_SCORE = 1e-4
"""A GPU may add in another order, and a node in ten thousand change its class."""


@dataclass(frozen=True, kw_only=True)
class Board:
    """One leaderboard.

    Attributes:
        script: Name of its file.
        title: For ``--help``.
        datasets: What it runs on, the default first.
        full: Settings of the full model: those of OGB's own example.
    """

    script: str
    title: str
    datasets: tuple[str, ...]
    full: dict[str, Any]


class Logger:
    """Scores of several runs, printed character by character as by the logger of OGB's examples.

    Unlike with that, runs may be of unequal length, and there may be one alone: its deviation is 0.

    Args:
        runs: Number of runs.

    Attributes:
        results: For each run its evaluations, ``(train, valid, test)`` in [0, 1].
    """

    def __init__(self, runs: int) -> None:
        self.results: list[list[tuple[float, float, float]]] = [[] for _ in range(runs)]

    def add_result(self, run: int, result: tuple[float, float, float]) -> None:
        """Adds one evaluation of a run."""
        self.results[run].append(result)

    def best(self, run: int) -> torch.Tensor:
        """Highest train, highest valid, and train and test where valid was highest first.

        Shapes:
            ``[4]`` in percent, float32 as OGB has it.
        """
        scores = 100 * torch.tensor(self.results[run])
        at = scores[scores[:, 1].argmax()]
        return torch.stack([scores[:, 0].max(), at[1], at[0], at[2]])

    def print_statistics(self, run: int | None = None) -> None:
        """Prints one run, or all of them."""
        if run is None:
            title = "All runs:"
            columns = torch.stack([self.best(each) for each in range(len(self.results))]).unbind(1)
            stds = [column.std() if len(column) > 1 else 0.0 for column in columns]
            values = [f"{c.mean():.2f} ± {s:.2f}" for c, s in zip(columns, stds, strict=True)]
        else:
            title = f"Run {run + 1:02d}:"
            values = [f"{value:.2f}" for value in self.best(run)]
        names = ("Highest Train", "Highest Valid", "  Final Train", "   Final Test")
        print(title, *map(": ".join, zip(names, values, strict=True)), sep="\n", flush=True)


def main(board: Board, argv: Sequence[str] | None = None) -> None:
    """Trains with every seed, prints as OGB's example does, writes the submission.

    Args:
        board: Which leaderboard.
        argv: Arguments of the script; those of this process by default.
    """
    parser = make_parser(board)
    arguments = sys.argv[1:] if argv is None else list(argv)
    parsed = parser.parse_args(arguments)
    with redirect_stdout(sys.stdout if is_main() else io.StringIO()):
        try:
            check_target(parsed.submission)
            outcome = run_all(board, parsed)
        except GistError as error:
            parser.exit(2, f"error: {error}\n")
    if is_main() and parsed.submission is not None:
        entry = submission(*outcome, parsed) | {"command": command_of(board, arguments)}
        write_atomically(parsed.submission, json.dumps(entry, indent=1) + "\n")


def make_parser(board: Board) -> argparse.ArgumentParser:
    """OGB's flags and ours, each spelled with underscores or with hyphens."""
    parser = argparse.ArgumentParser(
        prog=board.script,
        description=board.title,
        epilog="What is not given is as in OGB's own example for the full model, and as on the "
        "dataset's card for subnets.",
        allow_abbrev=False,
    )

    def flag(*names: str, to: Any = parser, **settings: Any) -> None:
        spellings = [f"--{each}" for name in names for each in (name, name.replace("_", "-"))]
        to.add_argument(*dict.fromkeys(spellings), **settings)

    flag("dataset", choices=board.datasets, default=board.datasets[0])
    flag("data_dir", type=Path, help="data folder, in place of GIST_DATA and the cache")
    flag("device", type=int, default=0, help="number of the GPU; where there is none, the CPU")
    flag("runs", type=count, default=len(SEEDS))
    flag("seed", type=int, default=0, help="of the first run; the next ones count on")
    flag("log_steps", type=count, default=1, help="print every so many rounds")
    flag("eval_steps", type=count, help="evaluate after every so many rounds")
    flag("model", choices=MODELS)
    flag("use_sage", action="store_const", const="sage", dest="model", help="as --model sage")
    flag("hidden_channels", type=count)
    flag("num_layers", type=count)
    flag("dropout", type=float)
    flag("norm", choices=("layer", "batch", "none"))
    flag("lr", type=float)
    flag("epochs", type=count, help="of all subnets together")
    flag("subnets", default="1", help="m, or a schedule as 0.6:8,0.4:1; 1 is the full model")
    flag("local_steps", type=count, help="steps of a round; those of an epoch for the full model")
    flag("num_partitions", "clusters", type=count, help="clusters to cut the graph into")
    flag("batch_size", type=count, help="clusters of a batch")
    flag("num_workers", type=int, help="of no effect: batches are slices, and need no processes")

    submitted = parser.add_argument_group("submission")
    flag("submission", to=submitted, type=Path, metavar="FILE", help="write what OGB asks for")
    flag("method", to=submitted, help="its name on the leaderboard")
    flag("contact", to=submitted, help="name and e-mail address")
    flag("code", to=submitted, metavar="URL", help="repository that reproduces the result")
    flag("paper", to=submitted, metavar="URL", help="of subnets, by default GIST's")
    flag("hardware", to=submitted, help="by default what is found here")
    flag("tuned", to=submitted, help="what was tried, the choice starred: 'lr: [0.001, 0.01*]'")
    flag("official", to=submitted, action="store_true", help="run by the method's authors")
    flag("external_data", to=submitted, action="store_true", help="other data was used")
    return parser


def count(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def is_main() -> bool:
    """Whether this process prints and writes for all that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def run_all(
    board: Board, parsed: argparse.Namespace
) -> tuple[Experiment, Logger, list[TrainResult]]:
    """Trains and scores with every seed.

    Returns:
        The first run, the scores of all, and what they took.

    Raises:
        ConfigError: settings that cannot be used.
        DataError: the dataset is not there.
        MissingDependencyError: OGB is not installed.
    """
    find_ogb()
    experiment, device = experiment_of(board, parsed), device_of(parsed.device)
    settings = ", ".join(f"{key} {value}" for key, value in experiment.resolved().items())
    print(f"{method_of(experiment, parsed)} on {parsed.dataset}{mark(parsed.dataset)}")
    print(settings, flush=True)
    data = experiment.load_data()
    logger, results = Logger(parsed.runs), list[TrainResult]()
    for number in range(parsed.runs):
        report = reporter(logger, number, parsed.log_steps)
        watched = {**experiment.settings, "callbacks": report, "progress": False}
        seeded = replace(experiment, settings=watched, seed=parsed.seed + number)
        trainer = seeded.trainer(data, device)
        results.append(trainer.fit())
        confirm(trainer, data, results[-1].best)
        logger.print_statistics(number)
        del trainer
        gc.collect()
    if parsed.dataset in STAND_INS:
        print(f"On {parsed.dataset}{mark(parsed.dataset)}:")
    logger.print_statistics()
    seconds = median(result.seconds for result in results)
    print(
        f"{results[0].num_parameters:,} parameters; {seconds:.1f} s training a run; "
        f"{peak_memory(results) / 2**30:.2f} GiB peak memory{mark(parsed.dataset)}"
    )
    return experiment, logger, results


def submission(
    experiment: Experiment, logger: Logger, results: list[TrainResult], parsed: argparse.Namespace
) -> dict[str, Any]:
    """What OGB's form asks for, and what it takes to get the same; scores in [0, 1]."""
    best = [max(scores, key=lambda score: score[1]) for scores in logger.results]
    valid, test = [score[1] for score in best], [score[2] for score in best]
    entry = {
        "method": method_of(experiment, parsed),
        "dataset": experiment.dataset,
        "stand_in_for": STAND_INS.get(experiment.dataset),
        "ogb_version": find_ogb(),
        "metric": "acc",
        "test_mean": mean(test),
        "test_std": deviation(test),
        "valid_mean": mean(valid),
        "valid_std": deviation(valid),
        "num_parameters": results[0].num_parameters,
        "hardware": parsed.hardware or hardware(),
        "paper": parsed.paper or (None if experiment.method == "full" else PAPER),
        "code": parsed.code,
        "contact": parsed.contact,
        "official": parsed.official,
        "external_data": parsed.external_data,
        "tuned_hyperparameters": parsed.tuned or chosen(experiment),
        "seeds": list(range(parsed.seed, parsed.seed + parsed.runs)),
        "test": test,
        "valid": valid,
        "seconds": [result.seconds for result in results],
        "peak_memory_bytes": peak_memory(results),
        "settings": experiment.resolved(),
        "versions": versions() | {"ogb": find_ogb()},
    }
    return entry | {"to_do": to_do(entry)}


def peak_memory(results: Sequence[TrainResult]) -> int:
    """Bytes, the most of all runs."""
    return max(result.peak_memory_bytes for result in results)


def deviation(scores: Sequence[float]) -> float:
    """The unbiased standard deviation; 0 of a single run."""
    return stdev(scores) if len(scores) > 1 else 0.0


def check_target(path: Path | None) -> None:
    """Refuses a file that could not be written, hours later.

    Raises:
        ConfigError: there is no such folder to write to, or the file is one.
    """
    if path is not None and (path.is_dir() or not os.access(path.parent, os.W_OK)):
        raise ConfigError(
            "the submission cannot be written there",
            got=path,
            expected="a file in a folder that is there and can be written to",
        )


def find_ogb() -> str:
    """Version of OGB, whose Evaluator is needed in the end.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        return version("ogb")
    except PackageNotFoundError as error:
        raise MissingDependencyError("OGB is not installed", remedy=EXTRA) from error


def experiment_of(board: Board, parsed: argparse.Namespace) -> Experiment:
    """The first run: flags over OGB's settings for the full model, over the card's for subnets."""
    given = {name: getattr(parsed, flag) for flag, name in SETTINGS.items()}
    given = {name: value for name, value in given.items() if value is not None}
    if given.get("norm") == "none":
        given["norm"] = None
    subnets = parse_subnets(parsed.subnets)
    if subnets == 1:
        given = {**board.full, **given}
        batches = math.ceil((given["clusters"] or 1) / given["clusters_per_batch"])
        given.setdefault("local_steps", batches)
    return Experiment(
        dataset=parsed.dataset,
        method="full" if subnets == 1 else "gist",
        data_options={} if parsed.data_dir is None else {"root": parsed.data_dir},
        settings={**given, "num_subnets": subnets},
        seed=parsed.seed,
    )


def device_of(number: int) -> str:
    """The GPU of that number, under torchrun the worker's own; the CPU where there is none.

    Raises:
        ConfigError: there are GPUs, but not that one.
    """
    if is_launched() or not torch.cuda.is_available():
        return str(local_device())
    if not 0 <= number < torch.cuda.device_count():
        raise ConfigError(
            "there is no such GPU", got=number, expected=f"below {torch.cuda.device_count()}"
        )
    return f"cuda:{number}"


def reporter(
    logger: Logger, run: int, log_steps: int
) -> Callable[[GISTTrainer, RoundRecord], None]:
    """What logs and prints each round; epochs are those of all subnets so far."""

    def report(trainer: GISTTrainer, record: RoundRecord) -> None:
        line = f"Run: {run + 1:02d}, Epoch: {round(record.epochs, 2):02.10g}, "
        line += f"Loss: {record.train_loss:.4f}"
        if record.val_metric is not None:
            train, valid, test = (getattr(record, f"{split}_metric") for split in SPLITS)
            logger.add_result(run, (train, valid, test))
            line += f", Train: {100 * train:.2f}%, Valid: {100 * valid:.2f}% "
            line += f"Test: {100 * test:.2f}%"
        if (record.round + 1) % log_steps == 0:
            print(line, flush=True)

    return report


def confirm(trainer: GISTTrainer, data: GraphData, best: RoundRecord) -> None:
    """Scores the best round's model with OGB's Evaluator.

    Raises:
        DataError: it finds another score than was logged.
    """
    name, scores = STAND_INS.get(data.name, data.name), trainer.predict().cpu()

    def check() -> None:
        for split in SPLITS:
            found = official_score(name, scores, data.y, data.mask(split).nonzero()[:, 0])
            logged = getattr(best, f"{split}_metric")
            if abs(found - logged) > _SAME_SCORE:
                raise DataError(
                    f"OGB's Evaluator finds another score on the {split} split than was logged",
                    got=found,
                    expected=logged,
                )

    trainer.comm.on_main(check)


def method_of(experiment: Experiment, parsed: argparse.Namespace) -> str:
    """Its name on the leaderboard."""
    model = MODELS[experiment.resolved()["model"]]
    own = model if experiment.method == "full" else f"GIST ({model}, m = {parsed.subnets})"
    return parsed.method or own


def mark(dataset: str) -> str:
    """What is said wherever a number of a stand-in is printed."""
    if dataset not in STAND_INS:
        return ""
    return f" (a generated stand-in for {STAND_INS[dataset]}: no result on {STAND_INS[dataset]})"


def chosen(experiment: Experiment) -> str:
    """Hyper-parameters as OGB's form has them: what was tried, with a star at the choice."""
    settings = experiment.resolved()
    names = {"hidden": "hidden_channels", "layers": "num_layers", "dropout": "dropout", "lr": "lr"}
    return ", ".join(f"{shown}: [{settings[name]}*]" for name, shown in names.items())


def hardware() -> str:
    """The machine, in a line."""
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        return f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GiB)"
    cpu = platform.processor() or platform.machine()
    if (known := Path("/proc/cpuinfo")).exists():
        models = [line for line in known.read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].partition(": ")[2] if models else cpu
    memory = psutil.virtual_memory().total / 2**30
    return f"{cpu}, {os.cpu_count()} cores, {memory:.0f} GiB memory"


def to_do(entry: dict[str, Any]) -> list[str]:
    """What keeps a result off the leaderboard so far; empty for one that can be submitted."""
    missing = [f"give --{name}" for name in ("contact", "code", "paper") if entry[name] is None]
    if entry["seeds"] != list(SEEDS):
        missing.append("run with the seeds 0 to 9: --runs 10 --seed 0")
    if entry["stand_in_for"] is not None:
        missing.append(f"run on {entry['stand_in_for']}: this is a generated stand-in")
    return missing


def command_of(board: Board, arguments: Sequence[str]) -> str:
    """What to type in the root of the source tree to get the same."""
    workers = os.environ.get("WORLD_SIZE")
    start = ["torchrun", f"--nproc-per-node={workers}"] if is_launched() else ["python"]
    return shlex.join([*start, f"examples/ogb/{board.script}", *arguments])
