"""Side by side: subnet training against the full model, same data, same budget, several seeds."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, median, median_low, stdev
from typing import Any

from rich import box
from rich.table import Table

from gist.checkpoint import write_atomically
from gist.config import SubnetSchedule
from gist.errors import ConfigError, one_of
from gist.experiment import Experiment
from gist.families.federated import FEDERATED
from gist.plan import plan_rounds

_SHORT_NAME = 6
"""Letters of a method's name in a table with room between its columns."""


def compare(
    base: Experiment,
    subnets: Sequence[int | SubnetSchedule],
    *,
    full: bool = True,
    baselines: Sequence[str] = (),
    seeds: int = 1,
    device: str = "cpu",
    out: Path | None = None,
    on_run: Callable[[str, dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Runs every method with every seed, the methods of one seed in turn.

    All methods are evaluated about as often over the budget, none more often than the one with the
    fewest rounds is: the best of many evaluations is no match for the best of few. ``eval_every``
    or ``early_stopping``, where set, is left to mean what it does in a run.

    Args:
        base: Dataset and settings that all runs share.
        subnets: Values of m to compare.
        full: Whether to run the full model, which speedups then refer to.
        baselines: Names of baselines, which are run too for each number of subnets above 1; a
            schedule of subnets has none.
        seeds: Number of seeds, from ``base.seed`` on.
        device: Where to run.
        out: Receives ``table.json`` and, below ``runs/``, every run.
        on_run: Called with the name and the summary of each finished run.

    Returns:
        ``dataset``, ``metric`` and ``rows``, one row per method: mean and standard deviation of the
        metrics over the seeds (unbiased), median seconds, speedup, peak memory, parameters.

    Raises:
        ConfigError: an unknown baseline, or a setting that cannot be used.
    """
    if base.method in FEDERATED:
        raise ConfigError(
            "a comparison is of numbers of subnets, which federated training does not have",
            got=f"method={base.method!r}",
            remedy="run `gist train --method federated --strategy ...` for each strategy, and "
            "`gist report` on all of them",
        )
    for name in baselines:
        one_of("baseline", name, base.family.baselines)
    data = base.load_data()
    methods = [replace(base, method="full", beside=base.method)] if full else []
    methods += [replace(base, settings={**base.settings, "num_subnets": m}) for m in subnets]
    methods += [
        replace(
            base,
            method=name,
            beside=base.method,
            settings={**base.settings, "num_subnets": m},
        )
        for name in baselines
        for m in subnets
        if isinstance(m, int) and m > 1
    ]
    rounds = []
    for method in methods:  # what is computed once (kept products, kernels) is charged to none
        settings = {**method.settings, "fast_dev_run": True, "progress": False}
        trainer = replace(method, settings=settings).trainer(data, device)
        trainer.fit()
        config = replace(trainer.config, fast_dev_run=bool(method.settings.get("fast_dev_run")))
        rounds.append(len(plan_rounds(config, trainer.objective.steps_per_epoch)))
        del trainer
    if not base.settings.keys() & {"eval_every", "early_stopping"}:
        methods = [
            replace(method, settings={**method.settings, "eval_every": -(-count // min(rounds))})
            for method, count in zip(methods, rounds, strict=True)
        ]
    runs: list[list[dict[str, Any]]] = [[] for _ in methods]
    folders: list[list[str]] = [[] for _ in methods]
    for seed in range(base.seed, base.seed + seeds):
        for i, method in enumerate(methods):
            name = f"{_label(method)}-seed{seed}"
            settings = dict(method.settings)
            if out is not None:
                settings["out"] = str(out / "runs" / name)
                folders[i].append(f"runs/{name}")
            experiment = replace(method, settings=settings, seed=seed)
            trainer = experiment.trainer(data, device)
            summary = experiment.summary(trainer, trainer.fit())
            if out is not None:
                write_run_config(out / "runs" / name, summary)
            runs[i].append(summary)
            if on_run is not None:
                on_run(name, summary)
            del trainer
            gc.collect()
    rows = [_row(m, r, f) for m, r, f in zip(methods, runs, folders, strict=True)]
    for row in rows:
        row["speedup"] = rows[0]["seconds"] / row["seconds"] if full else None
    table = {"dataset": runs[0][0]["dataset"], "metric": runs[0][0]["metric"], "rows": rows}
    if out is not None:
        write_atomically(out / "table.json", json.dumps(table, indent=1))
    return table


def write_run_config(folder: Path, summary: dict[str, Any]) -> None:
    """Adds dataset, method and model, which a trainer does not know, to a run's directory."""
    path = folder / "config.json"
    known = json.loads(path.read_text())
    keys = ("dataset", "method", "model", "model_settings", "versions", "command")
    added = {key: summary[key] for key in keys if key in summary}
    write_atomically(path, json.dumps({**known, **added}, indent=1))


def render(table: dict[str, Any]) -> Table:
    """The comparison as a table for the terminal, 80 columns wide or less."""
    total = table["rows"][0]["num_parameters"]
    seeds = table["rows"][0]["seeds"]
    crowded = any(len(row["method"]) > _SHORT_NAME for row in table["rows"])
    view = Table(
        title=f"{table['dataset']}: {table['metric']} in %, at the best validation round",
        caption=f"{seeds} seed{'s' if seeds > 1 else ''}; MiB: peak memory; "
        f"per subnet: parameters of {total:,}",
        box=box.SIMPLE_HEAD,
        padding=(0, 0 if crowded else 1, 0, 0),
        show_edge=False,
    )
    view.add_column("method", no_wrap=True)
    view.add_column("m", overflow="fold")
    for column in ("validation", "test", "seconds", "speedup", "MiB", "per subnet"):
        view.add_column(column, justify="right", no_wrap=True)
    for row in table["rows"]:
        view.add_row(
            row["method"],
            _column_text(row["subnets"]),
            _percent(row["val_mean"], row["val_std"], row["seeds"]),
            _percent(row["test_mean"], row["test_std"], row["seeds"]),
            f"{row['seconds']:.2f}",
            "" if row["speedup"] is None else f"{row['speedup']:.1f}x",
            f"{row['peak_memory_bytes'] / 2**20:,.0f}",
            f"{row['parameters_per_subnet']:,}",
        )
    return view


def _row(method: Experiment, runs: list[dict[str, Any]], folders: list[str]) -> dict[str, Any]:
    val = [run["val_metric"] for run in runs]
    test = [run["test_metric"] for run in runs]
    return {
        "method": method.method,
        "subnets": runs[0]["subnets"],
        "seeds": len(runs),
        "val_mean": mean(val),
        "val_std": stdev(val) if len(val) > 1 else 0.0,
        "test_mean": mean(test),
        "test_std": stdev(test) if len(test) > 1 else 0.0,
        "seconds": median(run["seconds"] for run in runs),
        "evaluations": median_low(run["evaluations"] for run in runs),
        "peak_memory_bytes": max(run["peak_memory_bytes"] for run in runs),
        "num_parameters": runs[0]["num_parameters"],
        "parameters_per_subnet": max(runs[0]["parameters_per_subnet"]),
        "settings": _chosen(runs[0]),
        "runs": folders,
    }


def _chosen(run: dict[str, Any]) -> dict[str, Any]:
    names = ("local_steps", "schedule", "lr", "weight_decay")
    return {**run["model_settings"], **{name: run["settings"][name] for name in names}}


def differing_settings(table: dict[str, Any]) -> list[str]:
    """One line per method whose settings are not the first one's: dataset cards choose per m."""
    settings = [row["settings"] for row in table["rows"]]
    names = [n for n in settings[0] if any(given[n] != settings[0][n] for given in settings)]
    lines = []
    for row in table["rows"] if names else []:
        values = ", ".join(f"{name} {row['settings'][name]}" for name in names)
        lines.append(f"{row['method']} m = {_column_text(row['subnets'])}: {values}")
    return lines


def _label(method: Experiment) -> str:
    if method.method == "full":
        return "full"
    subnets = method.settings["num_subnets"]
    if isinstance(subnets, int):
        return f"{method.method}-m{subnets}"
    return f"{method.method}-" + "-".join(f"{share:g}x{m}" for share, m in subnets)


def _column_text(subnets: Any) -> str:
    return str(subnets) if isinstance(subnets, int) else "→".join(str(m) for _, m in subnets)


def _percent(value: float, deviation: float, seeds: int) -> str:
    text = f"{100 * value:.1f}"
    return f"{text} ± {100 * deviation:.1f}" if seeds > 1 else text
