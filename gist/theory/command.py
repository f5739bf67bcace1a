"""What ``gist theory`` computes: records as JSON values, a table, and a figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from gist.datasets import load_dataset
from gist.errors import ConfigError
from gist.graph.data import GraphData
from gist.theory.assumptions import graph_report
from gist.theory.lab import Contraction, Floor, contraction, floors
from gist.theory.plots import contraction_plot, floor_plot

EXPERIMENTS = ("contraction", "floors", "graph")

Outcome = tuple[dict[str, Any], Table | str, Figure | None]
"""Of an experiment: JSON values, what is shown, and the figure, if there is one."""


def run(what: str, dataset: str | None, **settings: Any) -> Outcome:
    """Runs an experiment by name.

    Args:
        what: One of :data:`EXPERIMENTS`.
        dataset: Name of the graph, for ``"graph"`` alone.
        **settings: ``width``, ``seed``; of contraction ``rounds``, ``repeats``; of floors ``vary``,
            ``values``; of a graph ``num_subnets``, ``local_steps``.

    Raises:
        ConfigError: an unknown experiment, a dataset that is missing, is none of its, or no graph.
    """
    if what not in EXPERIMENTS:
        raise ConfigError("unknown experiment", got=repr(what), expected=" or ".join(EXPERIMENTS))
    if (what == "graph") != (dataset is not None):
        raise ConfigError(
            "the experiment `graph` is on a dataset, and no other is",
            got=f"{what}, dataset={dataset!r}",
            remedy="gist theory graph DATASET",
        )
    if dataset is not None:
        return _graph(dataset, **_of(settings, "num_subnets", "local_steps"))
    if what == "contraction":
        return _contraction(contraction(**_of(settings, "width", "seed", "rounds", "repeats")))
    given = _of(settings, "vary", "values", "width", "seed")
    return _floors(
        floors(given.pop("vary", "num_subnets"), given.pop("values", (1, 2, 4, 8)), **given)
    )


def _of(settings: dict[str, Any], *names: str) -> dict[str, Any]:
    """The given ones among the settings; others are refused."""
    given = {name: value for name, value in settings.items() if value is not None}
    if others := sorted(given.keys() - {*names, "seed"}):
        raise ConfigError(
            "this experiment does not have these settings",
            got=", ".join(others),
            expected=", ".join(names),
        )
    return {name: given[name] for name in names if name in given}


def _graph(name: str, **settings: Any) -> Outcome:
    data = load_dataset(name)
    if not isinstance(data, GraphData):
        raise ConfigError("this dataset is no graph", got=repr(name))
    report = graph_report(data, **settings)
    values = {**asdict(report), "vacuous": report.vacuous, "findings": [*report.findings]}
    if not math.isfinite(report.radius):
        values["radius"] = None
    return values, str(report), None


def _contraction(records: Sequence[Contraction]) -> Outcome:
    table = Table("scheme", "slowest mode", "measured", "median difference", "bound", "loss ratio")
    rows = []
    for record in records:
        differences = [abs(m - p) for m, p in zip(record.measured, record.predicted, strict=True)]
        values = [record.predicted[0], record.measured[0], median(differences)]
        values += [record.bound, record.loss_ratio]
        table.add_row(record.name, *(f"{value:.4f}" for value in values))
        rows.append({**asdict(record), "scheme": record.name})
    return {"contraction": rows}, table, contraction_plot(records)


def _floors(records: Sequence[Floor]) -> Outcome:
    table = Table(records[0].varied, "scheme", "rounds", "measured", "predicted")
    rows = []
    for record in records:
        loss = [f"{record.measured:.3g}", f"{record.predicted:.3g}"]
        table.add_row(f"{record.value:g}", record.name, str(record.rounds), *loss)
        rows.append({**asdict(record), "scheme": record.name})
    return {"floors": rows}, table, floor_plot(records)
