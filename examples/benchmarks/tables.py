"""What the benchmark scripts share: options, timing, tables on the screen and as JSON."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

Row = dict[str, Any]


def options(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(
        description=(description or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file")
    parser.add_argument("--quick", action="store_true", help="small sizes: less than a minute")
    parser.add_argument("--threads", type=int, default=defaults.get("threads", 2))
    parser.add_argument("--repeats", type=int, default=defaults.get("repeats", 3))
    return parser


def start(parsed: argparse.Namespace) -> None:
    """Sets the number of threads."""
    torch.set_num_threads(parsed.threads)


def seconds_of(step: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def median(values: Sequence[float]) -> float:
    """The median; NaN of nothing."""
    return statistics.median(values) if values else float("nan")


def finish(parsed: argparse.Namespace, rows: list[Row], columns: Sequence[str]) -> None:
    """Prints the rows as a table, and writes them where asked to.

    What is no number, or not finite, is ``-`` in the table and null in the file.
    """
    kept = [{column: _value(row[column]) for column in columns} for row in rows]
    table = Table(*columns)
    for row in kept:
        table.add_row(*map(_text, row.values()))
    Console(width=max(100, 16 * len(columns))).print(table)
    if parsed.json is not None:
        parsed.json.write_text(json.dumps(kept, indent=1, allow_nan=False) + "\n")


def _value(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
