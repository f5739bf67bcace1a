"""Figures of runs: pure functions from records to matplotlib figures, without global state.

Shape legend: ``U`` units shown, ``R`` rounds shown.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, MaxNLocator

from gist.history import RoundRecord, TrainResult
from gist.partition.samplers import Sampler

NOBODY, SEVERAL = -1, -2
"""Entries of :attr:`HeldUnits.holder` that are not the index of a subnet."""

LabelledRuns = Sequence[tuple[str, TrainResult]]

SECONDS: dict[str, Callable[[TrainResult], float]] = {
    "training": lambda result: result.seconds - result.repartition_seconds,
    "repartition": lambda result: result.repartition_seconds,
    "evaluation": lambda result: result.eval_seconds,
}
"""What the time of a run went into."""

_DPI = 160
_WIDTH = 8.0  # inches
_MAX_UNITS, _MAX_ROUNDS, _MAX_GROUPS = 64, 256, 8

# Both palettes are safe for colour-blind readers: Okabe & Ito (2008) without its yellow, which is
# too faint for a line, and the "muted" scheme of Paul Tol, which has no grey or black of its own.
_LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("-", "--", ":", "-.")
_SUBNETS = (
    *("#332288", "#88CCEE", "#CC6677", "#117733", "#DDCC77"),
    *("#882255", "#44AA99", "#999933", "#AA4499"),
)
_NOBODY_COLOUR, _SEVERAL_COLOUR, _INK = "#E4E4E4", "#000000", "#333333"


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldUnits:
    """Who held the units of one group, round by round.

    Attributes:
        group: Name of the group.
        size: Units it has.
        units: ``[U]``: the units shown, evenly spaced from 0.
        rounds: ``[R]``: the rounds shown, likewise.
        holder: ``[U, R]``: index of the subnet that held the unit, :data:`NOBODY` or
            :data:`SEVERAL`.
    """

    group: str
    size: int
    units: npt.NDArray[np.int64]
    rounds: npt.NDArray[np.int64]
    holder: npt.NDArray[np.int64]


def held_units(
    groups: Mapping[str, int],
    sampler: Sampler,
    history: Sequence[RoundRecord],
    *,
    seed: int,
    max_units: int = _MAX_UNITS,
    max_rounds: int = _MAX_ROUNDS,
) -> list[HeldUnits]:
    """Draws the assignments of a run again and notes who held what.

    Args:
        groups: Units per group.
        sampler: The run's sampler.
        history: Its rounds, which know how many subnets each had.
        seed: The run's seed.
        max_units: A wider group is thinned out to at most so many evenly spaced units.
        max_rounds: A longer run is thinned out likewise.

    Returns:
        One entry per group, in the order of ``groups``.
    """
    shown = history[:: _stride(len(history), max_rounds)]
    units = {name: np.arange(0, size, _stride(size, max_units)) for name, size in groups.items()}
    holder = {name: np.empty((len(chosen), len(shown)), int) for name, chosen in units.items()}
    for column, record in enumerate(shown):
        deal = sampler(groups, record.num_subnets, seed=seed, round=record.round)
        for name, size in groups.items():
            who = np.full(size, NOBODY)
            for subnet, held in enumerate(deal.held[name]):
                who[held] = np.where(who[held] == NOBODY, subnet, SEVERAL)
            holder[name][:, column] = who[units[name]]
    rounds = np.array([record.round for record in shown])
    return [
        HeldUnits(group=name, size=size, units=units[name], rounds=rounds, holder=holder[name])
        for name, size in groups.items()
    ]


def curves(runs: LabelledRuns, *, metric: str = "metric") -> Figure:
    """Training loss and validation metric against rounds, seconds of training, and of the clock.

    Args:
        runs: Label and result of each run; runs with the same label share a colour.
        metric: Name of the metric, whose values lie in [0, 1].

    Returns:
        2 x 2 panels; 2 x 3 where a run is federated, the last column of such runs alone. A ring
        marks each run's best round. Where there is one run only, and it is not federated, a line
        marks each change of its number of subnets.
    """
    positions = ["round", "seconds"]
    if any(record.clock is not None for _, result in runs for record in result.history):
        positions.append("clock")
    figure = Figure(figsize=(_WIDTH, 5.6), layout="constrained")
    axes = figure.subplots(2, len(positions), sharex="col", sharey="row")
    labels = list(dict.fromkeys(label for label, _ in runs))
    looks: dict[str, dict[str, Any]] = {
        label: {"color": _LINES[i % len(_LINES)], "linestyle": _DASHES[i // len(_LINES) % 4]}
        for i, label in enumerate(labels)
    }
    crowded = len(labels) < len(runs)
    for label, result in runs:
        history, best = result.history, [result.best]
        evaluated = [record for record in history if record.val_metric is not None]
        look = looks[label] | {"linewidth": 0.9 if crowded else 1.6}
        look |= {"alpha": 0.65} if crowded else {"marker": "." if len(history) < 30 else None}
        ring: dict[str, Any] = {
            "marker": "o",
            "s": 20 if crowded else 45,
            "facecolor": "none",
            "zorder": 3,
        }
        for position, (above, below) in zip(positions, axes.T, strict=True):
            origin = 1 if position == "round" else 0
            # Where there is no clock, x is NaN, and nothing is drawn.
            x = [origin + _all(some, position) for some in (history, evaluated, best)]
            above.plot(x[0], _all(history, "train_loss"), **look)
            below.plot(x[1], 100 * _all(evaluated, "val_metric"), **look)
            below.scatter(x[2], 100 * _all(best, "val_metric"), edgecolor=look["color"], **ring)
    if len(runs) == 1 and "clock" not in positions:
        _mark_phases(axes, runs[0][1].history)
    axes[0, 0].set_ylabel("training loss")
    axes[1, 0].set_ylabel(f"validation {metric.replace('_', ' ')} (%)")
    axes[1, 0].set_xlabel("round")
    axes[1, 1].set_xlabel("training time (s)")
    axes[1, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
    if "clock" in positions:
        axes[1, 2].set_xlabel("clock (s)")
        for ax in axes[1]:
            ax.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=ax is axes[1, 0]))
    for ax in axes.flat:
        _tidy(ax, grid="both")
    if len(labels) > 1:
        lines = [Line2D([], [], label=_short(label), **looks[label]) for label in labels]
        _legend(figure, lines)
    return figure


def distance_heatmap(distances: Mapping[str, Sequence[float]], epochs: Sequence[float]) -> Figure:
    """How far rankings of filters were from their last one, round by round (LoFT).

    Args:
        distances: For each group its distances, one for each round, as
            :meth:`gist.FilterRanks.distances` gives them.
        epochs: Budget spent at the end of these rounds.

    Returns:
        One row per group, one column per round; darker is farther.
    """
    values = np.array([list(row) for row in distances.values()])
    figure = Figure(figsize=(_WIDTH, 1.2 + 0.22 * len(values)), layout="constrained")
    ax = figure.subplots()
    image = ax.imshow(values, cmap="Blues", vmin=0, aspect="auto", interpolation="nearest")
    ax.set_yticks(range(len(distances)), [_short(group) for group in distances], fontsize=7)
    shown = np.unique(np.linspace(0, len(epochs) - 1, min(len(epochs), 8)).round().astype(int))
    ax.set_xticks(shown, [f"{epochs[i]:.3g}" for i in shown])
    ax.set_xlabel("epochs")
    _tidy(ax)
    _tidy(figure.colorbar(image, ax=ax, label="distance to the last ranking", aspect=30).ax)
    return figure


def partition_heatmap(held: Sequence[HeldUnits]) -> Figure:
    """Which subnet held which unit in which round, one panel per group.

    Args:
        held: From :func:`held_units`. Of many groups, evenly spaced ones are shown.

    Returns:
        Colours are subnets; units held by nobody or by several stand out.
    """
    shown = held[:: _stride(len(held), _MAX_GROUPS)]
    m = max(int(entry.holder.max()) for entry in shown) + 1
    colours = _subnet_colours(max(m, 1))
    colormap = ListedColormap([_SEVERAL_COLOUR, _NOBODY_COLOUR, *colours])
    height = sum(1.2 + len(entry.units) / 110 for entry in shown)  # over a pixel for each unit
    figure = Figure(figsize=(_WIDTH, 0.9 + height), layout="constrained")
    axes = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for ax, entry in zip(axes, shown, strict=True):
        every_unit, every_round = _step(entry.units), _step(entry.rounds)
        ax.imshow(
            entry.holder - SEVERAL,
            cmap=colormap,
            norm=Normalize(-0.5, len(colours) + 1.5),
            extent=(
                entry.rounds[0] + 0.5,  # rounds are counted from 1 where they are shown
                entry.rounds[-1] + every_round + 0.5,
                entry.units[-1] + every_unit - 0.5,
                entry.units[0] - 0.5,
            ),
            aspect="auto",
            interpolation="nearest",
        )
        thinned = f", every {_ordinal(every_unit)} shown" if every_unit > 1 else ""
        title = f"{_short(entry.group)}: {entry.size:,} units{thinned}"
        ax.set_title(title, fontsize=9, loc="left", color=_INK, parse_math=False)
        ax.set_ylabel("unit")
        _tidy(ax)
    every = _step(shown[0].rounds)
    axes[-1].set_xlabel("round" + (f" (every {_ordinal(every)} shown)" if every > 1 else ""))
    for axis in (axes[-1].xaxis, *(ax.yaxis for ax in axes)):
        axis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    patches = [Patch(color=c, label=f"subnet {i}") for i, c in enumerate(colours)]
    if m > len(_SUBNETS):
        bar = ScalarMappable(Normalize(-0.5, m - 0.5), ListedColormap(colours))
        ticks = MaxNLocator(nbins=8, integer=True)
        _tidy(figure.colorbar(bar, ax=axes, label="subnet", ticks=ticks, aspect=40).ax)
        patches = []
    for value, colour, label in (
        (NOBODY, _NOBODY_COLOUR, "no subnet"),
        (SEVERAL, _SEVERAL_COLOUR, "several subnets"),
    ):
        if any((entry.holder == value).any() for entry in shown):
            patches.append(Patch(color=colour, label=label))
    if patches:
        _legend(figure, patches)
    return figure


def cost_plot(runs: LabelledRuns) -> Figure:
    """Seconds, split by what they went into, and parameters of the model and of one subnet.

    Args:
        runs: Label and result of each run; of runs with the same label, the median is drawn.
    """
    labels = list(dict.fromkeys(label for label, _ in runs))
    grouped = [[result for other, result in runs if other == label] for label in labels]
    figure, (seconds, parameters) = _rows(labels, shares=(3, 2))
    y, left = np.arange(len(labels)), np.zeros(len(labels))
    for part, colour in zip(SECONDS, _LINES, strict=False):
        width = np.array([np.median([SECONDS[part](r) for r in group]) for group in grouped])
        seconds.barh(y, width, left=left, color=colour, height=0.6, label=part)
        left += width
    for i, total in enumerate(left):
        _annotate(seconds, total, i, seconds_text(total))
    seconds.set_xlabel("time (s)")
    whole = [group[0].num_parameters for group in grouped]
    largest = [max(group[0].parameters_per_subnet) for group in grouped]
    parameters.barh(y, whole, color=_NOBODY_COLOUR, height=0.6, label="global model")
    parameters.barh(y, largest, color=_LINES[3], height=0.36, label="largest subnet")
    for i, (all_, own) in enumerate(zip(whole, largest, strict=True)):
        _annotate(parameters, max(all_, own), i, f"{own / max(all_, 1):.1%}")
    parameters.set_xlabel("parameters")
    parameters.xaxis.set_major_formatter(EngFormatter(sep=""))
    parameters.xaxis.set_major_locator(MaxNLocator(nbins=4))
    for ax in (seconds, parameters):
        ax.set_xlim(0, 1.25 * ax.dataLim.x1 or 1)
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, **_LEGEND)
    return figure


def comparison(table: Mapping[str, Any]) -> Figure:
    """Validation and test metric with their standard deviations, and speedup, row by row.

    Args:
        table: ``metric`` and ``rows``; each row has ``method``, ``subnets``, ``val_mean``,
            ``val_std``, ``test_mean``, ``test_std`` (in [0, 1]), ``seconds`` and ``speedup`` (or
            None; where it is None in every row, seconds are drawn instead).
    """
    rows = table["rows"]
    figure, (metric, speed) = _rows([row_label(row) for row in rows], shares=(3, 2))
    y = np.arange(len(rows))
    for split, marker, shift in (("val", "o", -0.13), ("test", "s", 0.13)):
        mean = [100 * row[f"{split}_mean"] for row in rows]
        std = [100 * row[f"{split}_std"] for row in rows]
        look: dict[str, Any] = {"color": _LINES[split == "test"], "markersize": 5, "capsize": 2.5}
        look["label"] = "validation" if split == "val" else "test"
        metric.errorbar(mean, y + shift, xerr=std, marker=marker, linestyle="", **look)
    metric.set_xlabel(f"{str(table['metric']).replace('_', ' ')} (%), mean ± standard deviation")
    metric.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, **_LEGEND)
    _tidy(metric, grid="x")
    known = any(row["speedup"] is not None for row in rows)
    lengths = [(row["speedup"] or 0.0) if known else row["seconds"] for row in rows]
    speed.barh(y, lengths, color=_LINES[2], height=0.5)
    for i, row in enumerate(rows):
        took = seconds_text(row["seconds"])
        _annotate(speed, lengths[i], i, f"{lengths[i]:.1f}× ({took})" if row["speedup"] else took)
    speed.set_xlabel("speedup over the full model" if known else "training time (s)")
    speed.set_xlim(0, 1.5 * max(lengths) or 1)
    return figure


def row_label(row: Mapping[str, Any]) -> str:
    """Method and number of subnets of one row of a comparison."""
    name = str(row["method"]).replace("_", " ")
    return f"{name} model" if name == "full" else f"{name}, m = {subnets_text(row['subnets'])}"


def subnets_text(subnets: Any) -> str:
    """A number of subnets, or a list of such, each alone or as ``[share, number]``."""
    if not isinstance(subnets, list):
        return str(subnets)
    steps = (
        step if isinstance(step, list) and len(step) == 2 else (None, step) for step in subnets
    )
    return " → ".join(
        f"{m} ({share:.0%})" if isinstance(share, int | float) else str(m) for share, m in steps
    )


def seconds_text(seconds: float) -> str:
    """Three digits, or whole seconds."""
    return f"{seconds:,.0f} s" if seconds >= 100 else f"{seconds:.3g} s"


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=_DPI, facecolor="white", metadata={"Software": None})
    return stream.getvalue()


def save_figure(figure: Figure, path: Path) -> bytes:
    """Writes a PNG file under a temporary name, then renames it; returns its bytes."""
    content = png(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return content


_LEGEND: dict[str, Any] = {"frameon": False, "fontsize": 8, "handlelength": 1.6, "borderpad": 0.2}


def _legend(figure: Figure, handles: list[Any]) -> None:
    widest = max(len(handle.get_label()) for handle in handles)
    columns = max(1, min(len(handles), 108 // (6 + widest)))
    legend = figure.legend(handles=handles, loc="outside upper center", ncols=columns, **_LEGEND)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _rows(labels: list[str], *, shares: tuple[int, int]) -> tuple[Figure, tuple[Axes, Axes]]:
    """Two panels side by side with one labelled row per entry, first on top."""
    figure = Figure(figsize=(_WIDTH, 1.2 + 0.38 * max(len(labels), 2)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=shares)
    names = [_short(label) for label in labels]
    left.set_yticks(range(len(names)), names, parse_math=False)
    left.set_ylim(len(names) - 0.4, -0.6)
    for ax in (left, right):
        _tidy(ax)
        ax.tick_params(axis="y", length=0)
    return figure, (left, right)


def _mark_phases(axes: npt.NDArray[np.object_], history: Sequence[RoundRecord]) -> None:
    for before, after in pairwise(history):
        if before.num_subnets == after.num_subnets:
            continue
        for column, x in enumerate((after.round + 0.5, before.seconds)):
            for ax in axes[:, column]:
                ax.axvline(x, color=_INK, linewidth=0.8, linestyle=":")
            axes[0, column].annotate(
                f"m = {after.num_subnets}",
                (x, 1),
                (3, -9),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                fontsize=8,
                color=_INK,
            )


def _annotate(ax: Axes, x: float, y: float, text: str) -> None:
    ax.annotate(
        text, (x, y), (4, 0), textcoords="offset points", va="center", fontsize=8, color=_INK
    )


def _tidy(ax: Axes, grid: Literal["both", "x"] | None = None) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8, colors=_INK)
    for axis in (ax.xaxis, ax.yaxis):
        axis.label.set(fontsize=9, color=_INK, parse_math=False)
    if grid is not None:
        ax.grid(axis=grid, color=_NOBODY_COLOUR, linewidth=0.7)
        ax.set_axisbelow(True)


def _subnet_colours(m: int) -> list[Any]:
    if m <= len(_SUBNETS):
        return list(_SUBNETS[:m])
    return list(matplotlib.colormaps["viridis"](np.linspace(0.12, 1, m)))  # away from black


def _all(records: Sequence[Any], name: str) -> npt.NDArray[np.float64]:
    return np.array([getattr(record, name) for record in records], dtype=float)


def _stride(count: int, at_most: int) -> int:
    return max(1, -(-count // at_most))


def _step(positions: npt.NDArray[np.int64]) -> int:
    return int(positions[1] - positions[0]) if len(positions) > 1 else 1


def _ordinal(n: int) -> str:
    suffix = {1: "st", 2: "nd", 3: "rd"}.get(n % 10 if n % 100 not in (11, 12, 13) else 0, "th")
    return f"{n}{suffix}"


def _short(text: str, length: int = 40) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - 1]}…"
