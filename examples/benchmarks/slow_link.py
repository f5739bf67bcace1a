"""Two workers over a slow link: GIST, local SGD and data parallel training, same data and budget.

Each worker runs in a network namespace of its own; between the two lies a link whose rate ``tc``
limits (token bucket filter). That needs Linux, root and iproute2; without them the script says so
and ends with status 1.

    sudo python examples/benchmarks/slow_link.py
    sudo python examples/benchmarks/slow_link.py --quick --json slow_link.json
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tables import Row, finish, median, options

COLUMNS = (
    "rate",
    "method",
    "seconds",
    "speedup",
    "exchange_seconds",
    "bytes_per_round",
    "rounds",
    "test_metric",
)
RUN = str(Path(__file__).with_name("worker_run.py"))
PORT = "29511"


def sh(*command: str) -> None:
    """Runs a command of the system."""
    subprocess.run(command, check=True, capture_output=True)


@contextlib.contextmanager
def two_machines(rate: str) -> Iterator[list[str]]:
    """Two namespaces with a link of that rate between them; gives their names."""
    names = [f"gist-{os.getpid()}-{side}" for side in "ab"]
    try:
        for name in names:
            sh("ip", "netns", "add", name)
        sh(
            *("ip", "link", "add", "gist0", "netns", names[0], "type", "veth"),
            *("peer", "name", "gist0", "netns", names[1]),
        )
        for host, name in enumerate(names, start=1):
            inside = ("ip", "netns", "exec", name)
            sh(*inside, "ip", "addr", "add", f"10.77.0.{host}/24", "dev", "gist0")
            sh(*inside, "ip", "link", "set", "gist0", "up")
            sh(*inside, "ip", "link", "set", "lo", "up")
            sh(
                *(*inside, "tc", "qdisc", "add", "dev", "gist0", "root", "tbf", "rate", rate),
                *("burst", "256kb", "latency", "100ms"),
            )
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def train(machines: list[str], given: dict[str, Any]) -> Row:
    """What a run took."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        processes = [
            subprocess.Popen(
                ["ip", "netns", "exec", name, sys.executable, RUN, json.dumps(given), str(out)],
                env=os.environ
                | {
                    "RANK": str(rank),
                    "WORLD_SIZE": str(len(machines)),
                    "MASTER_ADDR": "10.77.0.1",
                    "MASTER_PORT": PORT,
                    "GLOO_SOCKET_IFNAME": "gist0",
                    "OMP_NUM_THREADS": "1",
                },
            )
            for rank, name in enumerate(machines)
        ]
        try:
            failed = [process.wait() for process in processes]
            if any(failed):
                raise SystemExit("a worker failed")
        finally:
            for process in processes:
                process.kill()
        row: Row = json.loads(out.read_text())
    return row


def main() -> None:
    """Measures, and prints the table."""
    parser = options(__doc__, threads=1, repeats=1)
    parser.add_argument("--rates", nargs="+", default=["100mbit", "1gbit"])
    parser.add_argument("--nodes", type=int, default=4_000)
    parser.add_argument("--clusters", type=int, default=20)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--local-steps", type=int, default=20)
    parser.add_argument("--epochs", type=float, default=160)
    parsed = parser.parse_args()
    if parsed.quick:
        parsed.nodes, parsed.clusters, parsed.hidden, parsed.epochs = 1_000, 10, 128, 8
        parsed.local_steps, parsed.rates = 4, ["100mbit"]
    if os.name != "posix" or os.geteuid() or not (shutil.which("ip") and shutil.which("tc")):
        raise SystemExit("network namespaces need Linux, root, and ip and tc (Debian: iproute2)")
    rows: list[Row] = []
    for rate in parsed.rates:
        with two_machines(rate) as machines:
            slowest = 0.0
            for name, method, subnets in (
                ("data parallel (DDP)", "data-parallel", 2),
                ("local SGD", "local-sgd", 2),
                ("gist, m = 2", "gist", 2),
                ("gist, m = 8", "gist", 8),
            ):
                settings = {
                    "hidden": parsed.hidden,
                    "layers": 3,
                    "num_subnets": subnets,
                    "local_steps": parsed.local_steps,
                    "epochs": parsed.epochs,
                    "clusters": parsed.clusters,
                    "clusters_per_batch": 5,
                    "evaluation": "full",
                    "schedule": "constant",
                    "lr": 0.01,
                    "eval_every": 1000,
                    "keep_best": False,
                    **({} if method == "data-parallel" else {"executor": "serial"}),
                }
                given = {
                    "method": method,
                    "nodes": parsed.nodes,
                    "settings": settings,
                    "threads": parsed.threads,
                }
                runs = [train(machines, given) for _ in range(parsed.repeats)]
                middle = median([row["seconds"] for row in runs])
                row = min(runs, key=lambda row: abs(row["seconds"] - middle))
                slowest = slowest or row["seconds"]
                rows.append(
                    row | {"rate": rate, "method": name, "speedup": slowest / row["seconds"]}
                )
    finish(parsed, rows, COLUMNS)


if __name__ == "__main__":
    main()
