"""One device against itself: stacked subnets, our full model, and the same model in PyG and DGL.

GraphSAGE on clusters of a generated graph, under the budget rule: the full model takes one step per
batch, each of m subnets a number of steps that is m times smaller. Every row is timed on the same
batches in the same process, the methods one after the other and the whole repeated. Seconds are
those of the budget: steps times the median step, and for subnets the re-partitions as well.

    python examples/benchmarks/one_device.py
    python examples/benchmarks/one_device.py --quick --json one_device.json
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from tables import Row, finish, median, options, seconds_of, start
from torch import Tensor, nn
from torch_geometric.nn import SAGEConv

from gist import GISTTrainer, load_dataset
from gist.execution.allocator import keeps_freed_memory
from gist.graph.batch import GraphBatch
from gist.graph.clusters import Cluster
from gist.graph.data import GraphData
from gist.nn import GraphSAGE

COLUMNS = ("layers", "subnets", "method", "seconds", "step_seconds", "steps", "speedup")
LOCAL_STEPS = 20
DROPOUT = 0.2


class Peer(nn.Module):
    """The same network with another library's convolution: conv, LayerNorm, ReLU, dropout."""

    def __init__(self, conv: Callable[[int, int], nn.Module], widths: list[int]) -> None:
        super().__init__()
        pairs = list(pairwise(widths))
        self.convs = nn.ModuleList([conv(a, b) for a, b in pairs])
        self.norms = nn.ModuleList(
            [nn.LayerNorm(width, elementwise_affine=False) for width in widths[1:-1]]
        )

    def forward(self, x: Tensor, call: Callable[[nn.Module, Tensor], Tensor]) -> Tensor:
        """``call`` runs one convolution on the batch's graph."""
        for conv, norm in zip(self.convs, self.norms, strict=False):
            x = F.dropout(norm(call(conv, x)).relu(), DROPOUT, self.training)
        return call(self.convs[-1], x)


def peer_step(model: Peer, batch: GraphBatch, graph: Any, adam: torch.optim.Optimizer) -> None:
    """One training step of a peer."""

    def call(conv: nn.Module, x: Tensor) -> Tensor:
        out: Tensor = conv(graph, x) if graph is not batch.graph.edge_index else conv(x, graph)
        return out

    adam.zero_grad(set_to_none=True)
    scores = model(batch.x, call)
    loss = F.cross_entropy(scores if batch.targets is None else scores[batch.targets], batch.y)
    loss.backward()
    adam.step()


def pyg_conv(inputs: int, outputs: int) -> nn.Module:
    """PyG's GraphSAGE layer, mean aggregation."""
    return SAGEConv(inputs, outputs)


def dgl_conv(inputs: int, outputs: int) -> nn.Module:
    """DGL's GraphSAGE layer, mean aggregation."""
    import dgl.nn

    layer: nn.Module = dgl.nn.SAGEConv(inputs, outputs, "mean")
    return layer


def has_dgl() -> bool:
    """Whether DGL can be imported."""
    try:
        import dgl  # noqa: F401
    except Exception:
        return False
    return True


def time_peer(
    conv: Callable[[int, int], nn.Module], data: GraphData, batches: list[GraphBatch], shape: Any
) -> list[float]:
    """Seconds of a step on each batch, after one to warm up."""
    layers, hidden = shape
    widths = [data.num_features, *[hidden] * (layers - 1), data.num_classes]
    torch.manual_seed(0)
    model = Peer(conv, widths).train()
    adam = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)
    graphs: list[Any] = [batch.graph.edge_index for batch in batches]
    if conv is dgl_conv:
        import dgl

        graphs = [
            dgl.graph((index[0], index[1]), num_nodes=len(batch.x))
            for index, batch in zip(graphs, batches, strict=True)
        ]
    pairs = list(zip(batches, graphs, strict=True))
    peer_step(model, *pairs[0], adam)
    return [seconds_of(lambda pair=pair: peer_step(model, *pair, adam)) for pair in pairs[1:]]


def time_ours(data: GraphData, recipe: Cluster, shape: Any, m: int, steps: int) -> Row:
    """Median seconds of a step of all subnets, and of one re-partition, in a real round."""
    layers, hidden = shape
    torch.manual_seed(0)
    model = GraphSAGE(data.num_features, hidden, data.num_classes, layers, dropout=DROPOUT)
    trainer = GISTTrainer(
        model,
        data,
        num_subnets=m,
        local_steps=steps,
        rounds=1,
        executor="serial" if m == 1 else "stacked",
        batches=recipe,
        keep_best=False,
        progress=False,
    )
    plan = trainer.rounds[0]
    executor, assignment = trainer.executor, trainer.assign(plan)
    executor.trial_seconds(plan, assignment, steps=1)  # to warm up
    reports: list[Any] = []
    seconds = seconds_of(lambda: reports.append(executor.run_round(plan, assignment)))
    moving = reports[0].repartition_seconds
    return {"step": (seconds - moving) / steps, "repartition": moving}


def measure(data: GraphData, recipe: Cluster, layers: int, parsed: Any) -> list[Row]:
    """The rows of one depth."""
    shape = (layers, parsed.hidden)
    source = recipe.bind(data)
    batches = list(source.batches(seed=0, round=0, subnet=0, steps=parsed.steps + 1))
    budget = parsed.epochs * source.steps_per_epoch
    peers = {"full, PyG": pyg_conv} | ({"full, DGL": dgl_conv} if has_dgl() else {})
    step: dict[tuple[int, str], list[float]] = {}
    moving: dict[int, list[float]] = {}
    for _ in range(parsed.repeats):
        for name, conv in peers.items():
            step.setdefault((1, name), []).extend(time_peer(conv, data, batches, shape))
            gc.collect()
        for m in (1, *parsed.subnets):
            name = "full, ours" if m == 1 else "stacked"
            row = time_ours(data, recipe, shape, m, parsed.steps if m == 1 else LOCAL_STEPS)
            step.setdefault((m, name), []).append(row["step"])
            moving.setdefault(m, []).append(row["repartition"] if m > 1 else 0.0)
            gc.collect()
    rows = []
    for (m, name), times in step.items():
        steps = max(1, budget // m)
        rounds = -(-steps // LOCAL_STEPS)
        seconds = steps * median(times) + rounds * median(moving.get(m, [0.0])) * (m > 1)
        rows.append(
            {
                "layers": layers,
                "subnets": m,
                "method": name,
                "step_seconds": median(times),
                "steps": steps,
                "seconds": seconds,
            }
        )
    fastest = min(row["seconds"] for row in rows if row["subnets"] == 1)
    return [row | {"speedup": fastest / row["seconds"]} for row in rows]


def main() -> None:
    """Prints the table."""
    parser = options(__doc__)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--subnets", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--nodes", type=int, default=20_000)
    parser.add_argument("--clusters", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=16, help="the budget")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a full model")
    parsed = parser.parse_args()
    if parsed.quick:
        parsed.hidden, parsed.layers, parsed.subnets, parsed.repeats = 512, [2, 3], [2, 8], 1
        parsed.nodes = 10_000
    start(parsed)
    data = load_dataset("csbm", num_nodes=parsed.nodes, num_features=100, num_classes=47)
    recipe = Cluster(num_parts=parsed.clusters, cache=False)
    rows: list[Row] = []
    for layers in parsed.layers:
        with keeps_freed_memory(0, 1):  # as in a run, and for all alike
            rows += measure(data, recipe, layers, parsed)
        print(f"{layers} layers done", flush=True)
    finish(parsed, rows, COLUMNS)


if __name__ == "__main__":
    main()
