"""Where the time of a training step goes, operator by operator, and how far from its floor.

Every operator that a round runs is timed, with the bytes of its operands and results and the
floating-point operations of products. Its floor is the larger of operations over the peak of a
product and bytes over the bandwidth of memory, both measured at the start; each operand counts as
read once, each result as written once, so an operator that works in the cache can be below. "rest"
is what no operator accounts for: Python, and the dispatch that the measuring itself goes through.
Batches that are made beside the training, in another thread, are not seen.

    python examples/benchmarks/profile_step.py                # GraphSAGE, 4,096 wide, on clusters
    python examples/benchmarks/profile_step.py --dataset cora --local-steps 5
    python examples/benchmarks/profile_step.py --quick
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from tables import Row, finish, median, options, seconds_of, start
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from gist import GISTTrainer, load_dataset
from gist.costs.tally import flops_of
from gist.execution.allocator import keeps_freed_memory
from gist.experiment import Experiment
from gist.graph.clusters import Cluster
from gist.nn import GraphSAGE

COLUMNS = (
    "method",
    "operator",
    "calls",
    "milliseconds",
    "share",
    "gflop",
    "megabytes",
    "floor_milliseconds",
    "above_floor",
)


@dataclass
class Cost:
    """What the calls of one operator took together."""

    calls: int = 0
    seconds: float = 0.0
    flops: int = 0
    bytes: int = 0
    floor: float = 0.0

    def __iadd__(self, other: Cost) -> Cost:
        for field in fields(Cost):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))
        return self


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch is untyped here
    """Times every operator that runs under it, and counts its operations and bytes.

    Args:
        peak: Operations a second.
        stream: Bytes a second.
    """

    def __init__(self, peak: float, stream: float) -> None:
        super().__init__()
        self.peak, self.stream = peak, stream
        self.costs: defaultdict[str, Cost] = defaultdict(Cost)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Runs an operator and enters it."""
        kwargs = dict(kwargs or {})
        begin = time.perf_counter()
        out = func(*args, **kwargs)
        seconds = time.perf_counter() - begin
        flops = flops_of(func.overloadpacket, args, kwargs, out)
        moved = 0 if moves_nothing(func) else sum(map(nbytes, tree_iter((args, kwargs, out))))
        floor = max(flops / self.peak, moved / self.stream)
        self.costs[func.overloadpacket.__name__] += Cost(1, seconds, flops, moved, floor)
        return out


def moves_nothing(func: Any) -> bool:
    """Whether an operator makes a view, or memory without content."""
    aliases = [result.alias_info for result in func._schema.returns]
    view = any(alias is not None and not alias.is_write for alias in aliases)
    name = func.overloadpacket.__name__
    return view or "empty" in name or name == "_unsafe_view"


def nbytes(value: Any) -> int:
    """Bytes of a tensor, those of an expanded one once; 0 of anything else."""
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return 0
    return min(value.numel() * value.element_size(), value.untyped_storage().nbytes())


def peak_flops(size: int) -> float:
    """Operations a second of the best of several square products."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    return 2 * size**3 / min(seconds_of(lambda: torch.mm(a, b)) for _ in range(8))


def bandwidth(megabytes: int) -> float:
    """Bytes a second of the best of several sums of two long vectors into a third."""
    a, b, c = (torch.ones(megabytes * 2**18) for _ in range(3))
    return 3 * a.numel() * 4 / min(seconds_of(lambda: torch.add(a, b, out=c)) for _ in range(8))


def rounds_of(trainer: GISTTrainer, ledger: Ledger, repeats: int) -> tuple[float, float]:
    """Median seconds of a round without the ledger, and mean seconds with it, all warmed up."""
    plan = trainer.rounds[0]
    executor, assignment = trainer.executor, trainer.assign(plan)
    executor.run_round(plan, assignment)
    bare, timed = [], 0.0
    for _ in range(repeats):
        bare.append(seconds_of(lambda: executor.run_round(plan, assignment)))
        with ledger:
            timed += seconds_of(lambda: executor.run_round(plan, assignment))
    return median(bare), timed / repeats


def wide(parsed: Any, m: int) -> GISTTrainer:
    """GraphSAGE on one cluster of a generated graph at a time."""
    data = load_dataset("csbm", num_nodes=parsed.nodes, num_features=100, num_classes=47)
    torch.manual_seed(0)
    model = GraphSAGE(100, parsed.hidden, 47, parsed.layers, dropout=0.2)
    return GISTTrainer(
        model,
        data,
        num_subnets=m,
        local_steps=parsed.local_steps,
        rounds=1,
        executor="serial" if m == 1 else "stacked",
        batches=Cluster(num_parts=max(1, parsed.nodes // 2000), cache=False),
        keep_best=False,
        progress=False,
    )


def of_card(parsed: Any, m: int) -> GISTTrainer:
    """A dataset with the settings of its card."""
    settings = {
        "num_subnets": m,
        "local_steps": parsed.local_steps,
        "rounds": 1,
        "executor": "serial" if m == 1 else "stacked",
        "progress": False,
    }
    experiment = Experiment(
        dataset=parsed.dataset, method="full" if m == 1 else "gist", settings=settings
    )
    return experiment.trainer(experiment.load_data())


def measure(parsed: Any, m: int, peak: float, stream: float) -> list[Row]:
    """The rows of one method, the most expensive operators first, all per step."""
    ledger = Ledger(peak, stream)
    trainer = of_card(parsed, m) if parsed.dataset else wide(parsed, m)
    with keeps_freed_memory(0, 1):  # as in a run
        bare, timed = rounds_of(trainer, ledger, parsed.repeats)
    steps = trainer.rounds[0].local_steps
    ranked = sorted(ledger.costs.items(), key=lambda entry: -entry[1].seconds)
    shown, others = ranked[: parsed.top], Cost()
    for _, cost in ranked[parsed.top :]:
        others += cost
    if others.calls:
        shown.append((f"{len(ranked) - parsed.top} others", others))
    counted = steps * parsed.repeats
    name = "full" if m == 1 else f"gist, m = {m}"
    rows = []
    for operator, cost in shown:
        rows.append(
            {
                "operator": operator,
                "calls": cost.calls / counted,
                "milliseconds": 1000 * cost.seconds / counted,
                "gflop": cost.flops / 1e9 / counted,
                "megabytes": cost.bytes / 1e6 / counted,
                "floor_milliseconds": 1000 * cost.floor / counted,
                "above_floor": cost.seconds / cost.floor if cost.floor else float("nan"),
            }
        )
    sums = {
        key: sum(row[key] for row in rows)
        for key in ("calls", "milliseconds", "gflop", "megabytes", "floor_milliseconds")
    }
    nothing = dict.fromkeys(sums, float("nan")) | {"above_floor": float("nan")}
    inside = sums["milliseconds"]
    whole = 1000 * timed / steps
    rows.append(nothing | {"operator": "rest", "milliseconds": whole - inside})
    above = whole / sums["floor_milliseconds"]
    rows.append({"operator": "step", **sums, "milliseconds": whole, "above_floor": above})
    print(f"{name}: {1000 * bare / steps:.1f} ms a step without measuring operators", flush=True)
    return [row | {"method": name, "share": row["milliseconds"] / whole} for row in rows]


def main() -> None:
    """Prints the table."""
    parser = options(__doc__, repeats=1)
    parser.add_argument("--dataset", help="one with a card, instead of the wide model")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--subnets", type=int, default=8)
    parser.add_argument("--nodes", type=int, default=20_000)
    parser.add_argument("--local-steps", type=int, default=5)
    parser.add_argument("--top", type=int, default=8, help="operators to show")
    parsed = parser.parse_args()
    if parsed.quick:
        parsed.hidden, parsed.nodes, parsed.local_steps = 256, 4000, 5
    start(parsed)
    peak, stream = peak_flops(1024 if parsed.quick else 4096), bandwidth(256)
    print(f"peak {peak / 1e9:.0f} GFLOP/s, memory {stream / 1e9:.0f} GB/s", flush=True)
    rows = [row for m in (1, parsed.subnets) for row in measure(parsed, m, peak, stream)]
    finish(parsed, rows, COLUMNS)


if __name__ == "__main__":
    main()
