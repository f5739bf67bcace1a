"""Every grouped layer against m narrow ones: outputs, gradients, statistics, shared inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_geometric.nn as pyg
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch_geometric.nn.models import MLP

import gist.nn
from gist.graph.adjacency import Adjacency
from gist.partition.grouped.grouping import Grouping
from gist.partition.spec import model_tensors

Make = Callable[[int, int], nn.Module]
"""A layer of k input and o output features."""


def randomized(module: nn.Module) -> nn.Module:
    """``module`` in float64 with random parameters and statistics."""
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
        for name, buffer in module.named_buffers():
            if "running" in name:
                buffer.uniform_(0.5, 2.0)
    return module


def group(layers: list[nn.Module]) -> nn.Module:
    """The grouped form of layers of one shape, with their values."""
    grouped = Grouping(len(layers)).layer(copy.deepcopy(layers[0]))
    fill(grouped, layers)
    return grouped


@torch.no_grad()
def fill(grouped: nn.Module, layers: list[nn.Module]) -> None:
    """Writes the layers' values; their tensors must have the same names in the same order."""
    assert list(model_tensors(grouped)) == list(model_tensors(layers[0]))
    for name, tensor in model_tensors(grouped).items():
        tensor.copy_(torch.stack([model_tensors(layer)[name] for layer in layers]))


def apart(out: Tensor, m: int) -> Tensor:
    """Outputs [n, m, o]; what came out the same for all subnets may have stayed [n, o]."""
    return out if out.dim() == 3 else out.unsqueeze(1).expand(-1, m, -1)


def assert_equal_narrow(
    make: Callable[[], nn.Module],
    m: int,
    x: Tensor,
    *args: Any,
    narrow_args: tuple[Any, ...] | None = None,
    constant: bool = False,
) -> None:
    """A grouped layer and m narrow ones agree on features [n, m, k], or shared [n, k].

    Compares outputs, gradients of inputs and of every parameter, and what buffers became.
    """
    layers = [randomized(make()).train() for _ in range(m)]
    grouped = group(layers)
    wanted = x.is_floating_point() and not constant
    ours, theirs = (x if constant else x.detach().requires_grad_(wanted) for _ in range(2))
    got = apart(grouped(ours, *args), m)
    narrow_args = args if narrow_args is None else narrow_args
    each = [
        layer(theirs[:, i] if x.dim() == 3 else theirs, *narrow_args)
        for i, layer in enumerate(layers)
    ]
    expected = torch.stack(each, dim=1)
    assert got.shape == expected.shape
    assert torch.allclose(got, expected, rtol=1e-10, atol=1e-10)

    if expected.requires_grad:
        cotangent = torch.randn_like(expected)
        got.backward(cotangent)
        expected.backward(cotangent)
    if wanted:
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)
    for name, parameter in grouped.named_parameters():
        grads = [dict(layer.named_parameters())[name].grad for layer in layers]
        if grads[0] is None:
            assert parameter.grad is None or not parameter.grad.any()
        else:
            assert torch.allclose(parameter.grad, torch.stack(grads), rtol=1e-9, atol=1e-9), name
    for name, buffer in grouped.named_buffers():  # such as running statistics
        stacked = torch.stack([dict(layer.named_buffers())[name] for layer in layers])
        assert torch.allclose(buffer, stacked, rtol=1e-10, atol=1e-12), name


def no_bias_norm(k: int) -> nn.Module:
    return nn.LayerNorm(k, bias=False)


def chain(k: int, o: int) -> nn.Module:
    return nn.Sequential(nn.Linear(k, 4), nn.LayerNorm(4), nn.Tanh(), nn.PReLU(4), nn.Linear(4, o))


def mlp(**kwargs: Any) -> Make:
    return lambda k, o: MLP([k, 4, 3, o], **kwargs)


PLAIN: dict[str, Make] = {
    "linear": lambda k, o: nn.Linear(k, o),
    "linear, no bias": lambda k, o: nn.Linear(k, o, bias=False),
    "pyg linear": lambda k, o: pyg.Linear(k, o),
    "pyg linear, no bias": lambda k, o: pyg.Linear(k, o, bias=False),
    "layer norm": lambda k, o: nn.LayerNorm(k),
    "layer norm, no bias": lambda k, o: no_bias_norm(k),
    "layer norm, not affine": lambda k, o: nn.LayerNorm(k, elementwise_affine=False),
    "layer norm, eps": lambda k, o: nn.LayerNorm(k, eps=0.3),
    "pyg layer norm": lambda k, o: pyg.LayerNorm(k, mode="node"),
    "pyg layer norm, not affine": lambda k, o: pyg.LayerNorm(k, mode="node", affine=False),
    "batch norm": lambda k, o: nn.BatchNorm1d(k),
    "batch norm, not affine": lambda k, o: nn.BatchNorm1d(k, affine=False, eps=0.1),
    "batch norm, momentum": lambda k, o: nn.BatchNorm1d(k, momentum=0.7),
    "batch norm, momentum 0": lambda k, o: nn.BatchNorm1d(k, momentum=0.0),
    "batch norm, plain average": lambda k, o: nn.BatchNorm1d(k, momentum=None),
    "batch norm, untracked": lambda k, o: nn.BatchNorm1d(k, track_running_stats=False),
    "pyg batch norm": lambda k, o: pyg.BatchNorm(k),
    "prelu": lambda k, o: nn.PReLU(),
    "prelu, one each": lambda k, o: nn.PReLU(k),
    "chain": chain,
    "chain in place": lambda k, o: nn.Sequential(nn.Linear(k, o), nn.ReLU(inplace=True)),
    "pyg mlp": mlp(norm=None),
    "pyg mlp, batch norm": mlp(norm="batch_norm", act="elu"),
    "pyg mlp, act first, plain last": mlp(norm="layer_norm", act_first=True, plain_last=False,
                                          norm_kwargs={"mode": "node"}),
    "nothing": lambda k, o: nn.Identity(),
    **{
        kind.__name__: (lambda k, o, kind=kind: kind())
        for kind in (
            nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
            nn.Tanh, nn.Sigmoid, nn.LogSigmoid, nn.Softplus, nn.Softsign, nn.Hardswish,
            nn.Hardtanh, nn.Hardsigmoid,
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
@settings(max_examples=4)
@given(
    n=st.integers(2, 5),
    m=st.integers(1, 4),
    k=st.integers(1, 5),
    o=st.integers(1, 4),
    shared=st.booleans(),
    strided=st.booleans(),
    seed=st.integers(0, 99),
)
def test_layers(name, n, m, k, o, shared, strided, seed):
    torch.manual_seed(seed)
    if "norm" in name:
        n, k = n + 3, k + 2  # the statistics of two numbers are all signs and rounding
    shape = (n, k) if shared else (n, m, k)
    x = torch.randn(shape[::-1], dtype=torch.float64).permute(*reversed(range(len(shape))))
    assert_equal_narrow(lambda: PLAIN[name](k, o), m, x if strided else x.contiguous())


@pytest.mark.parametrize("padding_idx", [None, 1, -1])
@given(n=st.integers(1, 6), m=st.integers(1, 4), o=st.integers(1, 4))
def test_embeddings(padding_idx, n, m, o):
    index = torch.randint(3, (n,))
    index[0] = 1
    assert_equal_narrow(lambda: nn.Embedding(3, o, padding_idx=padding_idx), m, index)


def test_an_embedding_of_several_indices_per_node():
    tables = [randomized(nn.Embedding(5, 3)) for _ in range(2)]
    index = torch.randint(5, (4, 6))
    expected = torch.stack([table(index) for table in tables], dim=2)
    assert torch.equal(group(tables)(index), expected)


GRAPH: dict[str, Make] = {
    "gcn": lambda k, o: pyg.GCNConv(k, o),
    "gcn, no bias": lambda k, o: pyg.GCNConv(k, o, bias=False),
    "gcn, improved": lambda k, o: pyg.GCNConv(k, o, improved=True),
    "gcn, no self loops": lambda k, o: pyg.GCNConv(k, o, add_self_loops=False),
    "gcn, not normalised": lambda k, o: pyg.GCNConv(k, o, normalize=False),
    "gcn, max": lambda k, o: pyg.GCNConv(k, o, aggr="max"),
    "gcn, mean": lambda k, o: pyg.GCNConv(k, o, aggr="mean"),
    "gcn, against the edges": lambda k, o: pyg.GCNConv(k, o, flow="target_to_source"),
    "our gcn": lambda k, o: gist.nn.GCNConv(k, o),
    "our gcn, max": lambda k, o: gist.nn.GCNConv(k, o, aggr="max"),
    "sage": lambda k, o: pyg.SAGEConv(k, o),
    "sage, no root": lambda k, o: pyg.SAGEConv(k, o, root_weight=False),
    "sage, no bias": lambda k, o: pyg.SAGEConv(k, o, bias=False),
    "sage, normalised": lambda k, o: pyg.SAGEConv(k, o, normalize=True),
    "sage, projected": lambda k, o: pyg.SAGEConv(k, o, project=True),
    "sage, projected max": lambda k, o: pyg.SAGEConv(k, o, project=True, aggr="max"),
    "sage, max": lambda k, o: pyg.SAGEConv(k, o, aggr="max"),
    "sage, sum": lambda k, o: pyg.SAGEConv(k, o, aggr="sum"),
    "sage, std": lambda k, o: pyg.SAGEConv(k, o, aggr="std"),
    "sage, against the edges": lambda k, o: pyg.SAGEConv(k, o, flow="target_to_source"),
    "our sage": lambda k, o: gist.nn.SAGEConv(k, o),
    "our sage, max": lambda k, o: gist.nn.SAGEConv(k, o, aggr="max"),
    "our sage, one weight": lambda k, o: gist.nn.SAGEConcatConv(k, o),
    "our sage, one weight, no bias": lambda k, o: gist.nn.SAGEConcatConv(k, o, bias=False),
    "gat": lambda k, o: pyg.GATConv(k, o, heads=2),
    "gat, averaged": lambda k, o: pyg.GATConv(k, o, heads=3, concat=False),
    "gat, one head": lambda k, o: pyg.GATConv(k, o),
    "gat, no bias": lambda k, o: pyg.GATConv(k, o, heads=2, bias=False),
    "gat, residual": lambda k, o: pyg.GATConv(k, o, heads=2, residual=True),
    "gat, averaged residual": lambda k, o: pyg.GATConv(k, o, heads=2, concat=False, residual=True),
    "gat, no self loops": lambda k, o: pyg.GATConv(k, o, heads=2, add_self_loops=False),
    "gat, two linears": lambda k, o: pyg.GATConv((k, k), o, heads=2),
    "gatv2": lambda k, o: pyg.GATv2Conv(k, o, heads=2),
    "gatv2, one linear": lambda k, o: pyg.GATv2Conv(k, o, heads=2, share_weights=True),
    "gatv2, averaged residual": lambda k, o: pyg.GATv2Conv(
        k, o, heads=2, concat=False, residual=True
    ),
    "gin": lambda k, o: pyg.GINConv(chain(k, o), eps=0.3),
    "gin, learnt eps": lambda k, o: pyg.GINConv(nn.Linear(k, o), eps=0.3, train_eps=True),
    "gin, max": lambda k, o: pyg.GINConv(nn.Linear(k, o), aggr="max"),
    "gin, mean": lambda k, o: pyg.GINConv(mlp(norm="batch_norm")(k, o), aggr="mean"),
    "gin, nothing": lambda k, o: pyg.GINConv(nn.Identity()),
}


WEIGHTED = [name for name in GRAPH if "gcn" in name]


@st.composite
def edges(draw: st.DrawFn, nodes: int) -> Tensor:
    """Any edges: none at all, self loops, duplicates, nodes without any."""
    pairs = st.tuples(st.integers(0, nodes - 1), st.integers(0, nodes - 1))
    found = draw(st.lists(pairs, max_size=3 * nodes))
    return torch.tensor(found, dtype=torch.long).reshape(-1, 2).t().contiguous()


@pytest.mark.parametrize("name", GRAPH)
@settings(max_examples=4)
@given(
    data=st.data(),
    m=st.integers(1, 3),
    k=st.integers(1, 4),
    o=st.integers(1, 4),
    inputs=st.sampled_from(["own", "strided", "shared"]),
    matrices=st.booleans(),
    seed=st.integers(0, 99),
)
def test_graph_layers(name, data, m, k, o, inputs, matrices, seed):
    torch.manual_seed(seed)
    n = 6
    index = data.draw(edges(n))
    weighted = name in WEIGHTED and data.draw(st.booleans(), label="weighted")
    weight = torch.rand(index.size(1), dtype=torch.float64) + 0.1 if weighted else None
    x = torch.randn(n, m, k, dtype=torch.float64)
    if inputs != "own":
        x = torch.randn(k, n) if inputs == "shared" else torch.randn(k, m, n)
        x = x.double().permute(*reversed(range(x.dim())))
    by_edges = (index,) if weight is None else (index, weight)
    args = (Adjacency(index, n, weight),) if matrices else by_edges
    assert_equal_narrow(lambda: GRAPH[name](k, o), m, x, *args, narrow_args=by_edges)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("name", GRAPH)
def test_constant_features(name, sparse):
    """Products with input features are kept: a layer may use them, but never change them."""
    torch.manual_seed(0)
    index = torch.randint(12, (2, 40))
    graph = Adjacency(index, 12)
    x = torch.randn(12, 30, dtype=torch.float64) * (torch.rand(12, 30) < (0.01 if sparse else 1))
    graph.remember(x)
    kept = {form: graph.propagate(form, x).clone() for form in ("gcn", "mean", "sum")}
    for _ in range(2):
        assert_equal_narrow(
            lambda: GRAPH[name](30, 3), 2, x, graph, narrow_args=(index,), constant=True
        )
    for form, before in kept.items():
        assert torch.equal(graph.propagate(form, x), before)


def test_a_layer_may_be_used_twice():
    torch.manual_seed(0)

    class Twice(nn.Module):
        def __init__(self, conv: nn.Module) -> None:
            super().__init__()
            self.conv = conv

        def forward(self, x: Tensor, index: Tensor) -> Tensor:
            return self.conv(self.conv(x, index).tanh(), index)

    index = torch.randint(6, (2, 15))
    for name in ("gcn", "sage", "our sage, one weight", "gat, one head", "gatv2, averaged residual",
                 "gin"):  # fmt: skip
        layers = [randomized(Twice(GRAPH[name](3, 3))) for _ in range(2)]
        grouped = Grouping(2).children(copy.deepcopy(layers[0]))
        fill(grouped, layers)
        for x in (torch.randn(6, 2, 3).double(), torch.randn(6, 3).double()):
            got = grouped(x, index)
            own = x if x.dim() == 3 else x.unsqueeze(1).expand(-1, 2, -1)
            expected = torch.stack([a(own[:, i], index) for i, a in enumerate(layers)], dim=1)
            assert torch.allclose(got, expected, rtol=1e-10), name
            got.sum().backward()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("p", [0.2, 0.5, 0.9])
def test_dropout_masks_are_independent_and_keep_the_mean(p, shared):
    torch.manual_seed(0)
    n, m, k = 500, 4, 40
    dropout = Grouping(m).layer(nn.Dropout(p)).train()
    x = torch.ones(n, k) if shared else torch.ones(n, m, k)
    x.requires_grad_()
    out = dropout(x)
    assert out.shape == (n, m, k)
    kept = out != 0
    assert torch.allclose(out[kept], torch.tensor(1 / (1 - p)), rtol=1e-3)
    bound = 5 * (p * (1 - p) / (n * k)) ** 0.5
    shares = kept.float().mean(dim=(0, 2))
    assert ((shares - (1 - p)).abs() < bound).all(), "every subnet keeps its share"
    for i in range(m):
        for j in range(i):
            both = (kept[:, i] & kept[:, j]).float().mean()
            assert abs(both - (1 - p) ** 2) < bound, "masks of two subnets are independent"
    nodes = kept.float().mean(dim=(1, 2))
    assert ((nodes - (1 - p)).abs() < 5 * (p * (1 - p) / (m * k)) ** 0.5).all()
    out.sum().backward()
    expected = kept / (1 - p)
    assert torch.allclose(x.grad, expected.sum(1) if shared else expected.float(), rtol=1e-3)
    assert not torch.equal(dropout(x) != 0, kept), "every call draws anew"


@pytest.mark.parametrize("shared", [False, True])
def test_dropout_at_the_ends_and_in_evaluation_mode(shared):
    x = torch.randn(5, 4) if shared else torch.randn(5, 3, 4)
    whole = apart(x, 3)
    for p, training, expected in [
        (0.0, True, whole), (1.0, True, torch.zeros_like(whole)), (0.7, False, whole),
    ]:  # fmt: skip
        dropout = Grouping(3).layer(nn.Dropout(p)).train(training)
        assert torch.equal(apart(dropout(x), 3), expected)


def test_dropout_follows_the_random_state():
    dropout = Grouping(2).layer(nn.Dropout(0.5))
    x = torch.ones(20, 10)
    masks = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        masks.append(dropout(x))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_dropout_on_attention_weights_is_each_subnets_own():
    torch.manual_seed(0)
    index = torch.randint(30, (2, 200))
    layer = randomized(pyg.GATConv(3, 4, heads=2, dropout=0.5))
    grouped = group([layer, layer])
    out = grouped(torch.randn(30, 3).double(), index)
    assert not torch.allclose(out[:, 0], out[:, 1])
    out = grouped.eval()(torch.randn(30, 3).double(), index)
    assert torch.allclose(out[:, 0], out[:, 1], rtol=1e-10)


def test_batch_norm_in_evaluation_mode_uses_each_subnets_statistics():
    torch.manual_seed(0)
    layers = [randomized(nn.BatchNorm1d(3)).eval() for _ in range(2)]
    grouped = group(layers).eval()
    before = {name: tensor.clone() for name, tensor in grouped.named_buffers()}
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    expected = torch.stack([layer(x[:, i]) for i, layer in enumerate(layers)], dim=1)
    assert torch.allclose(grouped(x), expected, rtol=1e-12)
    assert all(torch.equal(tensor, before[name]) for name, tensor in grouped.named_buffers())


@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norm_counts_batch_by_batch(momentum):
    layers = [randomized(nn.BatchNorm1d(3, momentum=momentum)).train() for _ in range(2)]
    for layer in layers:
        layer.reset_running_stats()
    grouped = group(layers)
    for _ in range(3):
        x = torch.randn(7, 2, 3, dtype=torch.float64)
        grouped(x)
        for i, layer in enumerate(layers):
            layer(x[:, i])
    assert grouped.num_batches_tracked.tolist() == [3, 3]
    means = torch.stack([layer.running_mean for layer in layers])
    assert torch.allclose(grouped.running_mean, means, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name", sorted({*PLAIN, *GRAPH} - {"sage, std"})
)  # PyG has no bfloat16 std
def test_other_dtypes_run_forward_and_backward(name, dtype):
    torch.manual_seed(0)
    layer = ({**PLAIN, **GRAPH})[name](4, 4).to(dtype)
    grouped = group([layer, layer])
    index = (torch.randint(6, (2, 15)),) if name in GRAPH else ()
    for x in (torch.randn(6, 4, dtype=dtype), torch.randn(6, 2, 4, dtype=dtype)):
        out = grouped(x.requires_grad_(), *index)
        assert out.dtype == dtype
        out.float().square().sum().backward()
