"""How time and memory of a round grow with the width, the number of subnets and the graph.

GraphSAGE with three layers on clusters of about 2,000 nodes of a generated graph. Three sweeps: the
width at m = 8, m at a fixed width, and the nodes at a fixed width and m = 8. Every point is a fresh
process, so that its peak memory is its own; seconds are those of the second of two rounds, the
first warms up; with repeats, their median. Points that do not fit into memory, as the run itself or
the kernel finds, are left out, and say so.

    python examples/benchmarks/scaling.py --plots docs/_static
    python examples/benchmarks/scaling.py --quick
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from tables import Row, finish, median, options

COLUMNS = (
    "sweep",
    "width",
    "subnets",
    "nodes",
    "executor",
    "seconds_per_round",
    "peak_memory_bytes",
)
LAYERS = 3
CLUSTER_NODES = 2_000
FEATURES, CLASSES = 100, 47


def run_point(width: int, subnets: int, nodes: int, steps: int) -> Row:
    """Trains two rounds, and reports the second."""
    from gist import GISTTrainer, load_dataset
    from gist.nn import GraphSAGE

    data = load_dataset("csbm", num_nodes=nodes, num_features=FEATURES, num_classes=CLASSES)
    torch.manual_seed(0)
    model = GraphSAGE(FEATURES, width, CLASSES, LAYERS, dropout=0.2)
    trainer = GISTTrainer(
        model,
        data,
        num_subnets=subnets,
        local_steps=steps,
        rounds=2,
        eval_every=2,
        clusters=max(1, nodes // CLUSTER_NODES),
        keep_best=False,
        progress=False,
        executor="serial" if subnets == 1 else "stacked",
    )
    result = trainer.fit()
    first, second = result.history
    return {
        "seconds_per_round": second.seconds - first.seconds,
        "peak_memory_bytes": result.peak_memory_bytes,
        "executor": trainer.executor.name,
    }


def misfit(returncode: int, errors: str) -> str | None:
    """What a process ended with that needed more memory than there is; None for anything else."""
    if returncode == -signal.SIGKILL:
        return "killed, as the kernel does when memory runs out"
    refusals = [line for line in errors.splitlines() if line.startswith("gist.errors.ConfigError:")]
    return refusals[-1] if refusals and "does not fit into memory" in refusals[-1] else None


def in_fresh_process(point: dict[str, int], parsed: argparse.Namespace) -> Row | None:
    """Runs a point in a process of its own; None where it does not fit.

    Raises:
        RuntimeError: it failed for another reason.
    """
    given = json.dumps(point | {"steps": parsed.steps})
    command = [sys.executable, __file__, "--threads", str(parsed.threads), "--point", given]
    seconds, peaks, executor = [], [], ""
    for _ in range(parsed.repeats):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            if (why := misfit(done.returncode, done.stderr)) is None:
                raise RuntimeError(f"{point}: exit status {done.returncode}\n{done.stderr}")
            print(f"{point}: left out, does not fit: {why}", flush=True)
            return None
        row = json.loads(done.stdout.splitlines()[-1])
        seconds.append(row["seconds_per_round"])
        peaks.append(row["peak_memory_bytes"])
        executor = row["executor"]
    return {
        "executor": executor,
        "seconds_per_round": median(seconds),
        "peak_memory_bytes": max(peaks),
    }


def plot(rows: list[Row], folder: Path) -> None:
    """One figure per sweep: seconds and memory against what is swept."""
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    for sweep, key in (("width", "width"), ("m", "subnets"), ("nodes", "nodes")):
        points = [row for row in rows if row["sweep"] == sweep]
        figure, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
        panels: list[tuple[str, Any]] = [
            ("seconds per round", lambda row: row["seconds_per_round"]),
            ("peak memory, GiB", lambda row: row["peak_memory_bytes"] / 2**30),
        ]
        for axis, (label, value) in zip(axes, panels, strict=True):
            values = [value(row) for row in points]
            axis.plot([row[key] for row in points], values, "o-")
            axis.set(xlabel=sweep, ylabel=label, xscale="log", yscale="log")
            if max(values) < 3 * min(values):  # a decade, so that noise looks like what it is
                axis.set_ylim(min(values) / 3, max(values) * 3)
            axis.grid(True, which="both", alpha=0.3)
        figure.savefig(folder / f"scaling_{key}.png", dpi=110)
        plt.close(figure)


def main() -> None:
    """Prints the table, and draws the plots where asked to."""
    parser = options(__doc__, repeats=1)
    parser.add_argument("--steps", type=int, default=5, help="local steps of a round")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="write the plots here")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    torch.set_num_threads(parsed.threads)
    if parsed.point is not None:
        print(json.dumps(run_point(**json.loads(parsed.point))))
        return
    widths = [512, 1024, 2048, 4096, 8192, 16_384, 32_768]
    counts, nodes = [1, 2, 4, 8, 16, 32], [10_000, 30_000, 100_000, 300_000, 500_000]
    fixed = 4096
    if parsed.quick:
        widths, counts, nodes, fixed = [128, 256], [1, 8], [4_000, 8_000], 256
    points = [("width", {"width": w, "subnets": 8, "nodes": 10_000}) for w in widths]
    points += [("m", {"width": fixed, "subnets": m, "nodes": 10_000}) for m in counts]
    points += [("nodes", {"width": min(512, fixed), "subnets": 8, "nodes": n}) for n in nodes]
    rows: list[Row] = []
    for sweep, point in points:
        measured = in_fresh_process(point, parsed)
        if measured is not None:
            rows.append({"sweep": sweep, **point, **measured})
            print(f"{sweep}: {rows[-1]}", flush=True)
    finish(parsed, rows, COLUMNS)
    if parsed.plots is not None:
        plot(rows, parsed.plots)


if __name__ == "__main__":
    main()
