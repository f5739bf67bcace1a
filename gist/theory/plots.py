"""Figures of experiments: pure functions from records to matplotlib figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from gist.theory.lab import Contraction, Floor
from gist.theory.masked import RoundTrace

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe & Ito
_MARKERS = ("o", "s", "^", "D", "v", "P")
_GREY, _INK = "#E4E4E4", "#333333"
_LEGEND: dict[str, Any] = {"frameon": False, "fontsize": 8}
_SYMBOLS = {
    "num_subnets": "subnets p",
    "keep": "keep probability ξ",
    "local_steps": "local steps τ",
    "width": "width m",
    "lr": "step η",
    "scale": "scale κ of the initial weights",
    "delay": "delay E (rounds)",
}


def contraction_plot(records: Sequence[Contraction]) -> Figure:
    """What a round leaves of every mode of the residual: measured against predicted.

    Args:
        records: From :func:`~gist.theory.lab.contraction`.

    Returns:
        One point for each eigenvalue; on the grey line both agree.
    """
    figure = Figure(figsize=(5.6, 4.4), layout="constrained")
    ax = figure.subplots()
    low = min(min(record.predicted) for record in records)
    ax.plot([low, 1], [low, 1], color=_INK, linewidth=0.8, alpha=0.5)
    for i, record in enumerate(records):
        look: dict[str, Any] = {"color": _COLOURS[i % len(_COLOURS)], "linestyle": ""}
        look |= {"marker": _MARKERS[i % len(_MARKERS)], "markersize": 3.5, "label": record.name}
        ax.plot(record.predicted, record.measured, **look)
    ax.set_xlabel("share of a mode that a round leaves, predicted")
    ax.set_ylabel("measured")
    ax.legend(**_LEGEND)
    _tidy(ax)
    return figure


def floor_plot(records: Sequence[Floor]) -> Figure:
    """Where the loss ends, measured and predicted: one panel for each thing that was varied.

    Args:
        records: From :func:`~gist.theory.lab.floors`, of one or more series.
    """
    series = list(dict.fromkeys(record.varied for record in records))
    figure = Figure(figsize=(2.9 * len(series) + 0.6, 2.9), layout="constrained")
    panels = figure.subplots(1, len(series), sharey=True, squeeze=False)[0]
    for ax, varied in zip(panels, series, strict=True):
        these = [record for record in records if record.varied == varied]
        for name, colour, dash in (("predicted", _INK, "--"), ("measured", _COLOURS[0], "-")):
            shown = [(r.value, getattr(r, name)) for r in these if getattr(r, name) > 0]
            if shown:
                marker = "." if dash == "-" else None
                x, y = zip(*shown, strict=True)
                ax.plot(x, y, label=name, color=colour, linestyle=dash, marker=marker)
        ax.set_yscale("log")
        values = [record.value for record in these]
        if min(values) > 0 and max(values) > 4 * min(values):
            ax.set_xscale("log")
        ax.xaxis.set_ticks(values, [f"{value:.3g}" for value in values])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xlabel(_SYMBOLS[varied])
        _tidy(ax)
    panels[0].set_ylabel("loss in the end")
    panels[0].legend(**_LEGEND)
    return figure


def sawtooth_plot(traces: Sequence[RoundTrace]) -> Figure:
    """The loss within rounds: up where subnets are cut out, down in their steps and on merging.

    Args:
        traces: Of consecutive rounds, from
            :meth:`~gist.theory.masked.MaskedTraining.traced_round`.
    """
    figure = Figure(figsize=(7.0, 2.9), layout="constrained")
    ax = figure.subplots()
    dots: dict[str, Any] = {"color": _COLOURS[1], "linestyle": ":"}
    for i, trace in enumerate(traces):
        places = np.linspace(i, i + 1, len(trace.local) + 2)
        losses = [trace.before, *trace.local, trace.after]
        ax.plot(places, losses, **dots)
        ax.plot(places[1:-1], trace.local, color=_COLOURS[1], marker=".", markersize=3)
    whole = [traces[0].before, *(trace.after for trace in traces)]
    ax.plot(range(len(whole)), whole, color=_COLOURS[0], marker="o", linestyle="")
    ax.set_yscale("log")
    ax.set_xlabel("round")
    ax.set_ylabel("loss")
    handles = [
        Line2D([], [], color=_COLOURS[0], marker="o", linestyle="", label="network"),
        Line2D([], [], color=_COLOURS[1], marker=".", label="mean of the subnets"),
    ]
    ax.legend(handles=handles, **_LEGEND)
    _tidy(ax)
    return figure


def _tidy(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(which="both", labelsize=8, colors=_INK)
    for axis in (ax.xaxis, ax.yaxis):
        axis.label.set(fontsize=9, color=_INK, parse_math=False)
    ax.grid(color=_GREY, linewidth=0.7)
    ax.set_axisbelow(True)
