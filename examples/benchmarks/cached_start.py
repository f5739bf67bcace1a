"""Starting on a large saved graph: seconds and memory before the first batch.

A random graph of the shape of ogbn-products (csbm) is saved, and its layout by clusters kept; that
takes many minutes, and is skipped where it was done before. Then fresh processes open the graph,
make a model and a trainer, and take the first batch. Memory is what the process has more than after
its imports; "own" leaves out pages that are shared with files.

    python examples/benchmarks/cached_start.py --folder products-like
    python examples/benchmarks/cached_start.py --quick --json cached_start.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import torch
from tables import Row, finish, options, seconds_of, start

import gist
from gist import Cluster, GISTTrainer, GraphData
from gist.graph.layout import keep_layout

COLUMNS = (
    "nodes",
    "edges",
    "open_seconds",
    "trainer_seconds",
    "batch_seconds",
    "process_mib",
    "resident_mib",
    "own_mib",
    "peak_mib",
)
MIB = 2**20


def prepare(parsed: argparse.Namespace) -> None:
    """Saves the graph and its layout, where they are not there yet."""
    graph = parsed.folder / "graph"
    if not graph.is_dir():
        gist.load_dataset("csbm", num_nodes=parsed.nodes, average_degree=parsed.degree).save(graph)
    seconds = seconds_of(
        lambda: keep_layout(GraphData.load(graph), parsed.clusters, cache=parsed.folder)
    )
    print(f"{parsed.clusters:,} clusters in {seconds:.0f} s", file=sys.stderr)


def measure(parsed: argparse.Namespace) -> Row:
    """Opens the graph and takes the first batch."""
    process = psutil.Process()
    before = process.memory_full_info()
    made: dict[str, object] = {}

    def open_graph() -> None:
        made["data"] = GraphData.load(parsed.folder / "graph")

    def make_trainer() -> None:
        data = made["data"]
        assert isinstance(data, GraphData)
        torch.manual_seed(0)
        model = gist.nn.GraphSAGE(data.num_features, parsed.hidden, data.num_classes, 3)
        batches = Cluster(num_parts=parsed.clusters, parts_per_batch=10, cache=parsed.folder)
        made["trainer"] = GISTTrainer(model, data, batches=batches, num_subnets=8, rounds=1)

    def take_batch() -> None:
        trainer = made["trainer"]
        assert isinstance(trainer, GISTTrainer)
        made["batch"] = next(iter(trainer.objective.batches(seed=0, round=0, subnet=0, steps=1)))

    seconds = [seconds_of(step) for step in (open_graph, make_trainer, take_batch)]
    after = process.memory_full_info()
    data = made["data"]
    assert isinstance(data, GraphData)
    memory = (
        before.rss,
        after.rss - before.rss,
        after.uss - before.uss,
        peak_bytes() - before.rss,
    )
    values = [data.num_nodes, data.num_edges, *seconds, *(size / MIB for size in memory)]
    return dict(zip(COLUMNS, values, strict=True))


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def main() -> None:
    """Prepares, and measures in fresh processes: one row for each."""
    parser = options(__doc__)
    parser.add_argument("--folder", type=Path, help="where the graph is kept; by default nowhere")
    parser.add_argument("--nodes", type=int, default=2_449_029)
    parser.add_argument("--degree", type=float, default=50.5, help="mean number of neighbours")
    parser.add_argument("--clusters", type=int, default=15_000)
    parser.add_argument("--hidden", type=int, default=400)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    start(parsed)
    if parsed.measure:
        print(json.dumps(measure(parsed)))
        return
    if parsed.quick:
        parsed.nodes, parsed.degree, parsed.clusters, parsed.repeats = 3000, 10.0, 50, 1
    with tempfile.TemporaryDirectory() as temporary:
        parsed.folder = parsed.folder or Path(temporary)
        prepare(parsed)
        command = [sys.executable, __file__, "--measure", "--threads", str(parsed.threads)]
        command += ["--folder", str(parsed.folder), "--clusters", str(parsed.clusters)]
        command += ["--hidden", str(parsed.hidden)]
        rows = [
            json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            for _ in range(parsed.repeats)
        ]
    finish(parsed, rows, COLUMNS)


if __name__ == "__main__":
    main()
