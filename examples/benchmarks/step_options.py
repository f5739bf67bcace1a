"""What ``precision="bfloat16"`` and ``compile=True`` change: seconds of a step, and the loss.

GraphSAGE on clusters of a generated graph, the full model and stacked subnets, with every
combination of the two. The first round compiles and warms up; seconds are those of the second, a
step of all subnets; training losses are those of the last round. All combinations start alike and
see the same batches.

    python examples/benchmarks/step_options.py
    python examples/benchmarks/step_options.py --quick
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from tables import Row, finish, median, options, start

from gist import GISTTrainer, load_dataset
from gist.graph.clusters import Cluster
from gist.graph.data import GraphData
from gist.nn import GraphSAGE

COLUMNS = (
    "width",
    "subnets",
    "precision",
    "compile",
    "step_seconds",
    "speedup",
    "first_round_seconds",
    "train_loss",
)


def measure(data: GraphData, parsed: Any, width: int, m: int, how: tuple[str, bool]) -> Row:
    """One run of two rounds."""
    torch._dynamo.reset()  # what another case has compiled is no help here, nor a burden
    torch.manual_seed(0)
    model = GraphSAGE(data.num_features, width, data.num_classes, parsed.layers, dropout=0.2)
    precision, compiled = how
    trainer = GISTTrainer(
        model,
        data,
        num_subnets=m,
        local_steps=parsed.local_steps,
        rounds=2,
        eval_every=2,
        schedule="constant",
        lr=0.001,
        executor="serial" if m == 1 else "stacked",
        batches=Cluster(num_parts=max(1, parsed.nodes // 2000), cache=False),
        precision=precision,
        compile=compiled,
        keep_best=False,
        progress=False,
    )
    first, second = trainer.fit().history
    return {
        "step_seconds": (second.seconds - first.seconds) / parsed.local_steps,
        "first_round_seconds": first.seconds,
        "train_loss": second.train_loss,
    }


def main() -> None:
    """Prints the table."""
    parser = options(__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--subnets", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--nodes", type=int, default=20_000)
    parser.add_argument("--local-steps", type=int, default=5)
    parsed = parser.parse_args()
    if parsed.quick:
        parsed.widths, parsed.subnets, parsed.nodes, parsed.repeats = [128], [8], 4000, 1
    start(parsed)
    data = load_dataset("csbm", num_nodes=parsed.nodes, num_features=100, num_classes=47)
    found: dict[tuple[int, int, str, bool], list[Row]] = {}
    for _ in range(parsed.repeats):
        for case in product(parsed.widths, parsed.subnets, ("full", "bfloat16"), (False, True)):
            width, m, *how = case
            row = measure(data, parsed, width, m, (how[0], how[1]))
            found.setdefault(case, []).append(row)
            print(*case, f"{row['step_seconds']:.4g} s", flush=True)
    rows: list[Row] = []
    for (width, m, precision, compiled), runs in found.items():
        plain = found[width, m, "full", False]
        values = {key: median([run[key] for run in runs]) for key in runs[0]}
        rows.append(
            {
                "width": width,
                "subnets": m,
                "precision": precision,
                "compile": compiled,
                "speedup": median([run["step_seconds"] for run in plain]) / values["step_seconds"],
                **values,
            }
        )
    finish(parsed, rows, COLUMNS)


if __name__ == "__main__":
    main()
