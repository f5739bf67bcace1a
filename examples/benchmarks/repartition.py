"""Re-partition: its share of a round, against local steps and width.

GraphSAGE with three layers on the whole of a small generated graph, m = 8. A re-partition deals the
units anew, fills every subnet from the global model and restarts its optimiser, and puts the
trained subnets back. Medians of whole rounds, the settings one after the other and all repeated.

    python examples/benchmarks/repartition.py
    python examples/benchmarks/repartition.py --store disk
    python examples/benchmarks/repartition.py --quick --json repartition.json
"""

from __future__ import annotations

import tempfile
from itertools import product
from pathlib import Path

import torch
from tables import Row, finish, median, options, seconds_of, start

from gist import GISTTrainer, GraphData, load_dataset
from gist.execution.executor import RoundReport
from gist.nn import GraphSAGE

COLUMNS = ("store", "executor", "width", "local_steps", "seconds", "repartition_seconds", "share")


def make_trainer(
    data: GraphData, *, width: int, subnets: int, executor: str, store: str, out: Path
) -> GISTTrainer:
    """A trainer whose rounds are run by hand."""
    torch.manual_seed(0)
    model = GraphSAGE(data.num_features, width, data.num_classes, num_layers=3, dropout=0.2)
    return GISTTrainer(
        model,
        data,
        num_subnets=subnets,
        local_steps=1,
        rounds=1,
        executor=executor,
        evaluation="full",
        store=store,
        out=out,
        progress=False,
    )


def round_of(trainer: GISTTrainer, index: int, local_steps: int) -> Row:
    """Seconds of one round, its assignment included, and what of them the re-partition took."""
    plan = trainer.rounds[0]
    plan = type(plan)(
        index=index,
        num_subnets=plan.num_subnets,
        rate_factors=(1.0,) * local_steps,
        epochs_spent=0.0,
    )
    reports: list[RoundReport] = []
    dealing = seconds_of(lambda: trainer.assign(plan))
    total = seconds_of(
        lambda: reports.append(trainer.executor.run_round(plan, trainer.assign(plan)))
    )
    return {"total": total, "moving": reports[0].repartition_seconds + dealing}


def main() -> None:
    """Prints one row per store, executor, width and number of local steps."""
    parser = options(__doc__, repeats=5)
    parser.add_argument("--nodes", type=int, default=2000, help="nodes of the graph")
    parser.add_argument("--subnets", type=int, default=8, help="m")
    parser.add_argument("--store", default="memory", choices=["memory", "disk"])
    parsed = parser.parse_args()
    start(parsed)
    widths, steps = [256, 1024, 4096], [1, 5, 20, 100]
    if parsed.quick:
        widths, steps = [128, 512], [1, 5, 20]
        parsed.nodes, parsed.repeats = min(parsed.nodes, 1000), min(parsed.repeats, 3)
    data = load_dataset("csbm", num_nodes=parsed.nodes, num_features=100, num_classes=47, seed=0)
    rows: list[Row] = []
    for width, executor in product(widths, ("stacked", "serial")):
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(
                data,
                width=width,
                subnets=parsed.subnets,
                executor=executor,
                store=parsed.store,
                out=Path(folder),
            )
            round_of(trainer, 0, 1)  # to warm up
            seen: dict[int, list[Row]] = {count: [] for count in steps}
            for repeat, count in product(range(parsed.repeats), steps):
                seen[count].append(round_of(trainer, repeat, count))
            for count, rounds in seen.items():
                rows.append(
                    {
                        "store": parsed.store,
                        "executor": executor,
                        "width": width,
                        "local_steps": count,
                        "seconds": median([row["total"] for row in rounds]),
                        "repartition_seconds": median([row["moving"] for row in rounds]),
                        "share": median([row["moving"] / row["total"] for row in rounds]),
                    }
                )
            del trainer
    finish(parsed, rows, COLUMNS)


if __name__ == "__main__":
    main()
