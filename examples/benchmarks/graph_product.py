"""The product of a normalised graph with features, by every library at hand: forward and backward.

A random graph of the size of ogbn-arxiv, ``D^-1/2 (A + I) D^-1/2`` times features. "gist" is our
product with the kernel that it takes by itself, "gist, dgl" the same with that one of
``GIST_PRODUCT_KERNEL``. The kernels take turns, the whole is repeated, and every result is checked
against ours. Freed memory is kept between the calls, as in a training run, so that no kernel pays
for new pages.

    python examples/benchmarks/graph_product.py
    python examples/benchmarks/graph_product.py --kernels gist --widths 64 --dtypes float64
    python examples/benchmarks/graph_product.py --quick --json graph_product.json
"""

from __future__ import annotations

import argparse
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import torch
from tables import Row, finish, median, options, seconds_of, start
from torch import Tensor
from torch_geometric import EdgeIndex
from torch_geometric.nn import MessagePassing

from gist.execution.allocator import keeps_freed_memory
from gist.graph.adjacency import Adjacency
from gist.graph.dgl_graph import import_dgl
from gist.graph.sparse import CSR, KERNELS, SparseMatrix, product_kernel

COLUMNS = (
    "width",
    "dtype",
    "kernel",
    "forward_seconds",
    "backward_seconds",
    "forward_ratio",
    "backward_ratio",
)
ARXIV = (169_343, 1_166_243)
"""Nodes and undirected edges."""

QUICK = (10_000, 70_000)

Product = Callable[[Tensor], Tensor]


def random_graph(num_nodes: int, num_edges: int) -> Adjacency:
    """Undirected edges between random nodes."""
    generator = torch.Generator().manual_seed(0)
    ends = torch.randint(num_nodes, (2, num_edges), generator=generator)
    return Adjacency(torch.cat([ends, ends.flip(0)], dim=1), num_nodes)


class OnKernel(CSR):
    """Compressed rows that are multiplied by one kernel, whatever the rule says."""

    def __init__(self, rows: CSR, kernel: str) -> None:
        super().__init__(rows.indptr, rows.indices, rows.values, rows.num_cols)
        self.kernel = KERNELS[kernel]

    def product(self, x: Tensor) -> Tensor:
        """``[M, d] -> [N, d]``."""
        return self.kernel(self.indptr, self.indices, self.values, x, self.num_cols)


class GatherScatter(MessagePassing):  # type: ignore[misc]  # PyG is untyped
    """PyG's message passing on an edge index: a message per edge, then summed by target."""

    def __init__(self) -> None:
        super().__init__(aggr="add")

    def forward(self, x: Tensor, edge_index: Tensor, weight: Tensor) -> Tensor:
        """``[N, d] -> [N, d]``."""
        out: Tensor = self.propagate(edge_index, x=x, weight=weight)
        return out

    def message(self, x_j: Tensor, weight: Tensor) -> Tensor:
        """Scales what an edge carries."""
        return weight.view(-1, 1) * x_j


class ScipyProduct(torch.autograd.Function):
    """scipy's sparse product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Any) -> Tensor:
        """``A @ x``."""
        ctx.matrix = matrix
        return torch.from_numpy(matrix @ x.numpy())

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        """``A.T @ g``; the matrix is symmetric."""
        return torch.from_numpy(ctx.matrix @ grad_outputs[0].numpy()), None


def kernels(graph: Adjacency, dtype: torch.dtype) -> Iterator[tuple[str, Product]]:
    """Every library's product with the same matrix."""
    ours = graph.matrix("gcn", dtype)
    nodes, rows = graph.num_nodes, ours.rows
    has_dgl = importlib.util.find_spec("dgl") is not None
    yield "gist", ours.matmul
    for name in KERNELS:
        if name != product_kernel("cpu", dtype) and (name != "dgl" or has_dgl):
            yield f"gist, {name}", SparseMatrix(OnKernel(rows, name), symmetric=True).matmul

    compressed = torch.sparse_csr_tensor(
        rows.indptr, rows.indices, rows.values, (nodes, nodes), check_invariants=False
    )
    yield "torch.sparse CSR", lambda x: compressed @ x

    targets = torch.arange(nodes).repeat_interleave(rows.indptr.diff())
    index = torch.stack([rows.indices.long(), targets])
    layer = GatherScatter()
    yield "PyG edge index", lambda x: layer(x, index, rows.values)

    edges = EdgeIndex(
        index.flip(0), sparse_size=(nodes, nodes), sort_order="row", is_undirected=True
    ).fill_cache_()
    yield "PyG EdgeIndex", lambda x: edges.matmul(x, rows.values)

    matrix = rows.to_scipy()
    yield "scipy", lambda x: ScipyProduct.apply(x, matrix)  # type: ignore[no-untyped-call]

    if has_dgl:
        dgl = import_dgl()
        dgl_graph = dgl.graph((index[0], index[1]), num_nodes=nodes)
        weight = rows.values.view(-1, 1)
        yield "DGL edge weights", lambda x: dgl.ops.u_mul_e_sum(dgl_graph, x, weight)
        scale = rows.indptr.diff().to(dtype).rsqrt().view(-1, 1)
        yield "DGL node scaling", lambda x: dgl.ops.copy_u_sum(dgl_graph, x * scale) * scale


def takes_part(name: str, beginnings: list[str] | None) -> bool:
    """Whether a kernel is asked for; by default all but those that ours does not take by itself."""
    if beginnings is None:
        return not name.startswith("gist, ")
    return name.startswith(tuple(beginnings))


def times(product: Product, x: Tensor, grad: Tensor) -> tuple[float, float]:
    """Seconds of one forward and one backward pass."""
    x.grad = None
    out: list[Tensor] = []
    forward = seconds_of(lambda: out.append(product(x)))
    backward = seconds_of(lambda: out[0].backward(grad))  # type: ignore[no-untyped-call]
    return forward, backward


def check(name: str, product: Product, ours: Product, x: Tensor) -> None:
    """Every kernel computes the same; what it builds on first use is built here."""
    results = []
    for each in (product, ours):
        x.grad = None
        out = each(x)
        out.backward(torch.ones_like(out))  # type: ignore[no-untyped-call]
        assert x.grad is not None
        results.append((out.detach(), x.grad))
    for got, expected in zip(*results, strict=True):
        error = float((got - expected).norm() / expected.norm())
        assert error < 1e-4, f"{name} is off by {error:.1e}"


def at_width(
    graph: Adjacency,
    products: dict[str, Product],
    width: int,
    dtype: torch.dtype,
    parsed: argparse.Namespace,
) -> list[Row]:
    """Rows of one width and dtype, fastest forward pass first."""
    x = torch.randn(graph.num_nodes, width, dtype=dtype, requires_grad=True)
    grad = torch.randn(graph.num_nodes, width, dtype=dtype)
    # A message per edge, scaled; both kept, and both with a gradient.
    messages = 4 * width * graph.gcn.rows.indices.numel() * x.element_size()
    if "PyG edge index" in products and messages > psutil.virtual_memory().available:
        products = {name: each for name, each in products.items() if name != "PyG edge index"}
        print(
            f"width {width}: left out: PyG edge index, whose messages take {messages / 1e9:.0f} GB"
        )
    for name, product in products.items():
        check(name, product, graph.matrix("gcn", dtype).matmul, x)
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in products}
    for _ in range(parsed.repeats):
        for name, product in products.items():
            measured[name].append(times(product, x, grad))
    rows: list[Row] = []
    for name, pairs in measured.items():
        forward, backward = (median(seconds) for seconds in zip(*pairs, strict=True))
        rows.append(
            {
                "width": width,
                "dtype": str(dtype).removeprefix("torch."),
                "kernel": name,
                "forward_seconds": forward,
                "backward_seconds": backward,
            }
        )
    for direction in ("forward", "backward"):
        fastest = min(row[f"{direction}_seconds"] for row in rows)
        for row in rows:
            row[f"{direction}_ratio"] = row[f"{direction}_seconds"] / fastest
    return sorted(rows, key=lambda row: float(row["forward_seconds"]))


def main() -> None:
    """Measures and prints."""
    parser = options(__doc__, repeats=7)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "float64"])
    parser.add_argument(
        "--kernels", nargs="+", help="how their names begin; by default all but our other ones"
    )
    parsed = parser.parse_args()
    start(parsed)
    warnings.filterwarnings("ignore", "Sparse ")  # torch, of tensors that PyG makes
    graph = random_graph(*(QUICK if parsed.quick else ARXIV))
    edges = graph.gcn.rows.indices.numel()
    print(f"{graph.num_nodes:,} nodes, {edges:,} entries with self loops, {parsed.threads} threads")
    rows: list[Row] = []
    with keeps_freed_memory(0, 1):
        for dtype in (getattr(torch, name) for name in parsed.dtypes):
            every = kernels(graph, dtype)
            products = {name: each for name, each in every if takes_part(name, parsed.kernels)}
            for width in parsed.widths:
                rows += at_width(graph, products, width, dtype, parsed)
    finish(parsed, rows, COLUMNS)


if __name__ == "__main__":
    main()
