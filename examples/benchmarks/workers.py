"""Workers on one machine, one thread each: against one, local SGD and data parallel training.

Three tables, each of real torchrun processes on Gloo:

- the same subnets on 1, 2, … workers (executor "serial": the same bits);
- GIST, local SGD and DDP on the same workers, data and budget;
- a model too wide for one worker: peak memory of the worker that takes most, and what
  ``gist plan`` promised; the run has a ``memory_limit`` of that and 2% more.

    python examples/benchmarks/workers.py --tables workers memory
    python examples/benchmarks/workers.py --tables methods --nodes 4000 --clusters 20 --hidden 512
    python examples/benchmarks/workers.py --quick --json workers.json
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tables import Row, finish, median, options
from worker_run import DATA

from gist.experiment import plan_run
from gist.launch import launch

COLUMNS = (
    "table",
    "method",
    "workers",
    "hidden",
    "seconds",
    "speedup",
    "exchange_seconds",
    "bytes_per_round",
    "peak_memory_bytes",
    "planned_bytes",
    "test_metric",
)
TABLES = ("workers", "methods", "memory")
RUN = str(Path(__file__).with_name("worker_run.py"))


def train(workers: int, **given: Any) -> Row:
    """What a run took."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        command = [RUN, json.dumps(given), str(out)]
        if workers == 1:
            environment = os.environ | {"OMP_NUM_THREADS": str(given["threads"])}
            status = subprocess.run([sys.executable, *command], env=environment).returncode
        else:
            status = launch(command, workers=workers)
        if status:
            raise SystemExit(status)
        row: Row = json.loads(out.read_text())
    return row


def repeated(parsed: Any, workers: int, **given: Any) -> Row:
    """The run with the median seconds."""
    rows = [train(workers, threads=parsed.threads, **given) for _ in range(parsed.repeats)]
    middle = median([row["seconds"] for row in rows])
    return min(rows, key=lambda row: abs(row["seconds"] - middle))


def compare(parsed: Any) -> list[Row]:
    """The first two tables."""
    settings: dict[str, Any] = {
        "hidden": parsed.hidden,
        "layers": 3,
        "num_subnets": parsed.subnets,
        "local_steps": parsed.local_steps,
        "epochs": parsed.epochs or 24,
        "clusters": parsed.clusters,
        "clusters_per_batch": 5,
        "evaluation": "full",
        "schedule": "constant",
        "lr": 0.01,
        "eval_every": 1000,
        "keep_best": False,
    }
    common = {"nodes": parsed.nodes}
    serial = settings | {"executor": "serial"}
    rows: list[Row] = []
    for workers in parsed.workers if "workers" in parsed.tables else ():
        row = repeated(parsed, workers, method="gist", settings=serial, **common)
        rows.append(row | {"table": "workers", "method": "gist"})
        rows[-1]["speedup"] = rows[0]["seconds"] / row["seconds"]
    most = parsed.workers[-1]
    settings |= {"epochs": parsed.epochs or 160}
    serial = settings | {"executor": "serial"}
    peers = settings | {"num_subnets": most}
    runs = {
        f"gist, m = {parsed.subnets}": ("gist", serial),
        f"gist, m = {most}": ("gist", serial | {"num_subnets": most}),
        "local SGD": ("local-sgd", peers | {"executor": "serial"}),
        "data parallel (DDP)": ("data-parallel", peers),
    }
    slowest = 0.0
    for name, (method, chosen) in reversed(runs.items()) if "methods" in parsed.tables else ():
        row = repeated(parsed, most, method=method, settings=chosen, **common)
        slowest = slowest or row["seconds"]
        rows.append(row | {"table": "methods", "method": name, "speedup": slowest / row["seconds"]})
    return [row | {"hidden": parsed.hidden, "planned_bytes": None} for row in rows]


def wide(parsed: Any) -> list[Row]:
    """The third table."""
    rows = []
    for workers in parsed.wide_workers:
        settings = {
            "hidden": parsed.wide,
            "layers": 3,
            "num_subnets": parsed.wide_subnets,
            "local_steps": 2,
            "rounds": 2,
            "clusters": 10,
            "clusters_per_batch": 1,
            "evaluation": "layerwise",
            "executor": "serial",
            "keep_best": False,
            "lr": 0.001,
        }
        plan = plan_run(
            "csbm",
            data_options=DATA | {"num_nodes": parsed.wide_nodes},
            settings={"model": "sage", "norm": "layer", **settings},
            workers=workers,
        )
        # Else a run keeps freed memory for its next step, and grows to twice the plan. Processes
        # differ by a few MB in what their libraries take.
        limited = settings | {"memory_limit": round(1.02 * plan.peak_memory_bytes)}
        given = {"method": "gist", "nodes": parsed.wide_nodes, "settings": limited}
        row = train(workers, threads=parsed.threads, **given)
        row |= {"table": "memory", "method": f"gist, m = {parsed.wide_subnets}", "speedup": None}
        rows.append(row | {"hidden": parsed.wide, "planned_bytes": plan.peak_memory_bytes})
    return rows


def main() -> None:
    """Measures, and prints the tables."""
    parser = options(__doc__, threads=1)
    parser.add_argument("--tables", nargs="+", default=list(TABLES), choices=TABLES)
    parser.add_argument("--nodes", type=int, default=10_000)
    parser.add_argument("--clusters", type=int, default=50)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--subnets", type=int, default=4)
    parser.add_argument("--local-steps", type=int, default=20)
    parser.add_argument("--epochs", type=float, help="default: 24, of the methods 160")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--wide", type=int, default=16_384, help="width of the third table")
    parser.add_argument("--wide-workers", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--wide-subnets", type=int, default=8)
    parser.add_argument("--wide-nodes", type=int, default=2_000)
    parsed = parser.parse_args()
    if parsed.quick:
        parsed.nodes, parsed.clusters, parsed.hidden, parsed.epochs = 1_000, 10, 64, 8
        parsed.local_steps, parsed.repeats, parsed.wide, parsed.wide_workers = 4, 1, 256, [2]
    rows = compare(parsed)
    rows += wide(parsed) if "memory" in parsed.tables else []
    finish(parsed, rows, COLUMNS)


if __name__ == "__main__":
    main()
