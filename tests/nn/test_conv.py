"""Products with an adjacency against PyG's message passing, and their gradients."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
import torch_geometric.nn as pyg
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import gist.nn
from gist import Adjacency
from gist.errors import DataError
from gist.graph.layer_sampling import SampledLayer
from gist.graph.sparse import SparseMatrix

Case = tuple[int, Tensor, Tensor | None, int]


@st.composite
def graphs(draw: st.DrawFn, weighted: bool | None = None) -> Case:
    """Any multigraph: self loops, duplicates, isolated nodes, no edges at all."""
    nodes = draw(st.integers(1, 9))
    pairs = draw(st.lists(st.tuples(*[st.integers(0, nodes - 1)] * 2), max_size=25))
    edges = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T.contiguous()
    loops = edges[0] == edges[1]
    if int(torch.bincount(edges[0][loops], minlength=1).max()) > 1:
        edges = torch.cat([edges[:, ~loops], edges[:, loops].unique(dim=1)], dim=1)
    weight = None
    if draw(st.booleans()) if weighted is None else weighted:
        generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
        weight = torch.rand(edges.size(1), generator=generator, dtype=torch.float64) + 0.1
    return nodes, edges, weight, draw(st.integers(0, 99))


def features(nodes: int, width: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(nodes, width, generator=generator, dtype=torch.float64).to(dtype)


def exact_gcn(nodes: int, edges: Tensor, weight: Tensor | None) -> Tensor:
    """``D^-1/2 (A + I) D^-1/2`` by its definition, one entry at a time."""
    dense = torch.zeros(nodes, nodes, dtype=torch.float64)
    looped = set()
    for k, (source, target) in enumerate(edges.T.tolist()):
        dense[target, source] += 1.0 if weight is None else weight[k]
        looped |= {source} if source == target else set()
    for node in set(range(nodes)) - looped:
        dense[node, node] += 1.0
    degree = dense.sum(1)
    scale = torch.where(degree > 0, degree.clamp(min=1e-300).rsqrt(), torch.zeros_like(degree))
    return scale[:, None] * dense * scale


def exact_mean(nodes: int, edges: Tensor, weight: Tensor | None = None) -> Tensor:
    dense = torch.zeros(nodes, nodes, dtype=torch.float64)
    for k, (source, target) in enumerate(edges.T.tolist()):
        dense[target, source] += 1.0 if weight is None else weight[k]
    total = dense.sum(1, keepdim=True)
    return dense / torch.where(total == 0, 1.0, total)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@given(case=graphs())
def test_products_are_what_the_formulas_say(dtype, bound, case):
    nodes, edges, weight, seed = case
    adjacency = Adjacency(edges, nodes, weight)
    x = features(nodes, 3, seed, dtype)
    for form, exact in [
        ("gcn", exact_gcn(nodes, edges, weight)),
        ("mean", exact_mean(nodes, edges, weight)),
    ]:
        got = adjacency.propagate(form, x)
        assert got.dtype == dtype
        assert torch.allclose(got.double(), exact @ x.double(), rtol=0, atol=bound), form


@given(case=graphs())
def test_gcn_equals_pygs(case):
    nodes, edges, weight, seed = case
    for widths in [(3, 5), (5, 3), (4, 4)]:
        conv = gist.nn.GCNConv(*widths).double()
        theirs = pyg.GCNConv(*widths).double()
        theirs.load_state_dict(conv.state_dict())
        x = features(nodes, widths[0], seed)
        ones = torch.ones(edges.size(1), dtype=torch.float64) if weight is None else weight
        expected = theirs(x, edges, ones)
        for adjacency in (Adjacency(edges, nodes, weight), remembered(edges, nodes, x, weight)):
            assert torch.allclose(conv(x, adjacency), expected, rtol=0, atol=1e-12)


def remembered(edges: Tensor, nodes: int, x: Tensor, weight: Tensor | None = None) -> Adjacency:
    adjacency = Adjacency(edges, nodes, weight)
    adjacency.remember(x)
    return adjacency


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"root_weight": False},
        {"normalize": True},
        {"bias": False},
        {"project": True},
        {"aggr": "max"},
    ],
    ids=str,
)
@given(case=graphs())
def test_sage_equals_pygs(settings, case):
    nodes, edges, _, seed = case
    for widths in [(3, 5), (5, 3)]:
        conv = gist.nn.SAGEConv(*widths, **settings).double()
        theirs = pyg.SAGEConv(*widths, **settings).double()
        theirs.load_state_dict(conv.state_dict())
        x = features(nodes, widths[0], seed)
        expected = theirs(x, edges)
        for graph in (edges, Adjacency(edges, nodes), remembered(edges, nodes, x)):
            assert torch.allclose(conv(x, graph), expected, rtol=0, atol=1e-12)


@given(case=graphs())
def test_sage_takes_the_weighted_mean(case):
    nodes, edges, weight, seed = case
    mean = exact_mean(nodes, edges, weight)
    for widths in [(3, 5), (5, 3)]:
        x = features(nodes, widths[0], seed)
        two = gist.nn.SAGEConv(*widths).double()
        one = gist.nn.SAGEConcatConv(*widths).double()
        for conv, expected in [
            (two, two.lin_l(mean @ x) + two.lin_r(x)),
            (one, one.lin(torch.cat([x, mean @ x], dim=1))),
        ]:
            for graph in (Adjacency(edges, nodes, weight), remembered(edges, nodes, x, weight)):
                assert torch.allclose(conv(x, graph), expected, rtol=0, atol=1e-12)
            got = conv(x, edges, edge_weight=weight)
            assert torch.allclose(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "settings",
    [{"improved": True}, {"add_self_loops": False}, {"normalize": False}, {"aggr": "max"}],
    ids=str,
)
def test_unusual_gcns_equal_pygs(settings):
    edges = torch.randint(6, (2, 20), generator=torch.Generator().manual_seed(0))
    x = features(6, 4, 0)
    conv, theirs = (
        gist.nn.GCNConv(4, 3, **settings).double(),
        pyg.GCNConv(4, 3, **settings).double(),
    )
    theirs.load_state_dict(conv.state_dict())
    weight = torch.rand(20, dtype=torch.float64)
    assert torch.equal(conv(x, Adjacency(edges, 6, weight)), theirs(x, edges, weight))


@given(case=graphs(), form=st.sampled_from(["gcn", "mean"]))
def test_gradients_are_those_of_the_dense_product(case, form):
    """Directed graphs too: the backward pass needs the transpose."""
    nodes, edges, weight, seed = case
    adjacency = Adjacency(edges, nodes, weight)
    exact = exact_gcn(nodes, edges, weight) if form == "gcn" else exact_mean(nodes, edges, weight)
    for dtype, bound in [(torch.float32, 1e-4), (torch.float64, 1e-6)]:
        x = features(nodes, 2, seed, dtype).requires_grad_()
        upstream = features(nodes, 2, seed + 1, dtype)
        (grad,) = torch.autograd.grad(adjacency.propagate(form, x), x, upstream)
        assert torch.allclose(grad.double(), exact.T @ upstream.double(), rtol=0, atol=bound)


@pytest.mark.parametrize("make", [gist.nn.GCNConv, gist.nn.SAGEConv, gist.nn.SAGEConcatConv])
@pytest.mark.parametrize("constant", [True, False])
def test_gradcheck(make, constant):
    edges = torch.randint(5, (2, 11), generator=torch.Generator().manual_seed(1))
    x = features(5, 3, 0)
    adjacency = Adjacency(edges, 5)
    if constant:
        adjacency.remember(x)
    else:
        x.requires_grad_()
    conv = make(3, 2).double()
    names, parameters = zip(*conv.named_parameters(), strict=True)

    def run(*values: Tensor) -> Tensor:
        return torch.func.functional_call(
            conv, dict(zip(names, values[1:], strict=True)), (values[0], adjacency)
        )

    assert torch.autograd.gradcheck(lambda *p: run(x, *p), parameters)
    if not constant:
        assert torch.autograd.gradcheck(run, (x, *parameters))


@given(case=graphs(weighted=False))
def test_symmetric_graphs_are_recognised(case):
    nodes, edges, _, seed = case
    edges = edges.unique(dim=1)  # weights of duplicates would have to add up to the same bits
    weight = features(edges.size(1), 1, seed)[:, 0]
    both = Adjacency(torch.cat([edges, edges.flip(0)], 1), nodes, torch.cat([weight, weight]))
    assert both.is_symmetric
    assert both.gcn.columns is both.gcn.rows


@pytest.mark.parametrize(
    ("edges", "weight"),
    [
        (torch.tensor([[0], [1]]), None),
        (torch.tensor([[0, 1], [1, 0]]), torch.tensor([1.0, 2.0])),
        (torch.tensor([[0, 0, 1], [1, 1, 0]]), None),
        (torch.tensor([[0, 1, 2], [1, 2, 0]]), None),
    ],
)
def test_directed_graphs_are_recognised(edges, weight):
    directed = Adjacency(edges, 3, weight)
    assert not directed.is_symmetric
    assert directed.gcn.columns is not directed.gcn.rows


def bags(nodes: int = 40, words: int = 60) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(nodes, words, generator=generator) < 0.02).float()


@pytest.mark.parametrize(
    ("edges", "words", "kind"),
    [(60, 60, SparseMatrix), (300, 400, type(None)), (600, 60, torch.Tensor)],
    ids=["sparse", "factors", "dense"],
)
@pytest.mark.parametrize("make", [gist.nn.GCNConv, gist.nn.SAGEConv, gist.nn.SAGEConcatConv])
def test_sparse_features_equal_dense_ones(make, edges, words, kind):
    x = bags(words=words)
    edges = torch.randint(40, (2, edges), generator=torch.Generator().manual_seed(1))
    conv = make(words, 5)
    plain = conv(x, Adjacency(edges, 40))
    kept = remembered(edges, 40, x)
    assert isinstance(kept._kept(conv.form, x), kind), "whichever has the least work"
    got = conv(x, kept)
    assert torch.allclose(got, plain, rtol=1e-5, atol=1e-6)
    upstream = torch.randn(40, 5)
    for one, two in zip(
        torch.autograd.grad(got, list(conv.parameters()), upstream),
        torch.autograd.grad(plain, list(conv.parameters()), upstream),
        strict=True,
    ):
        assert torch.allclose(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_factors_in_other_precisions(kind):
    x = bags(words=400)
    edges = torch.randint(40, (2, 300), generator=torch.Generator().manual_seed(1))
    weight = torch.randn(5, 400, generator=torch.Generator().manual_seed(2))
    expected = Adjacency(edges, 40).project("gcn", x, weight)
    if kind == torch.float64:
        x, weight = x.double(), weight.double()
    kept = remembered(edges, 40, x)
    with torch.autocast("cpu", kind, enabled=kind == torch.bfloat16):
        got = kept.project("gcn", x, weight)
    assert kept._kept("gcn", x) is None, "factor by factor"
    assert got.dtype == kind
    error = (got.float() - expected).norm() / expected.norm()
    assert error < (1e-5 if kind == torch.float64 else 2e-2)


def test_where_factors_serve_a_product_that_is_asked_for_is_still_made_once():
    x = bags(words=400)
    edges = torch.randint(40, (2, 300), generator=torch.Generator().manual_seed(1))
    kept = remembered(edges, 40, x)
    assert kept._kept("sum", x) is None, "factor by factor"
    assert kept.propagate("sum", x) is kept.propagate("sum", x)
    assert torch.allclose(kept.propagate("sum", x), Adjacency(edges, 40).propagate("sum", x))


def test_samples_of_a_layer_are_no_factors_even_where_they_are_square():
    x = bags(words=400)
    edges = torch.randint(40, (2, 300), generator=torch.Generator().manual_seed(1))
    whole = Adjacency(edges, 40).matrix("gcn").rows
    sample = SampledLayer(whole, "gcn", targets_first=False)
    sample.remember(x)
    weight = torch.randn(5, 400, generator=torch.Generator().manual_seed(2))
    expected = Adjacency(edges, 40).project("gcn", x, weight)
    assert torch.allclose(sample.project("gcn", x, weight), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("x", [bags(), torch.randn(40, 60)], ids=["sparse", "dense"])
@pytest.mark.parametrize("form", ["identity", "gcn", "mean"])
def test_an_in_place_change_is_noticed(x, form):
    x = x.clone()
    edges = torch.randint(40, (2, 60), generator=torch.Generator().manual_seed(1))
    weight = torch.randn(3, 60)
    kept, plain = remembered(edges, 40, x), Adjacency(edges, 40)
    first = kept.project(form, x, weight)
    assert kept._kept(form, x) is kept._kept(form, x), "computed once"
    x[3] = 7.0
    second = kept.project(form, x, weight)
    assert not torch.equal(first, second)
    assert torch.allclose(second, plain.project(form, x, weight), rtol=1e-5, atol=1e-5)
    assert torch.allclose(kept.propagate(form, x), plain.propagate(form, x))


def test_constants_are_known_by_identity_and_forgotten_with_the_tensor():
    x = torch.randn(4, 3)
    kept = remembered(torch.tensor([[0], [1]]), 4, x)
    assert kept.is_constant(x)
    assert not kept.is_constant(x.clone())
    assert not kept.is_constant(x.detach())
    kept.propagate("mean", x)
    del x
    gc.collect()
    assert len(kept._constants) == 0


def test_features_that_want_gradients_are_not_constant():
    x = torch.randn(4, 3, requires_grad=True)
    kept = remembered(torch.tensor([[0], [1]]), 4, x)
    assert not kept.is_constant(x)
    kept.propagate("mean", x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_index_types(kind):
    edges = torch.tensor([[0, 1, 2, 2], [1, 2, 0, 1]])
    x = features(3, 2, 0)
    expected = exact_mean(3, edges) @ x
    got = Adjacency(edges.to(kind), 3)
    assert got.edge_index.dtype == torch.int64
    assert torch.allclose(got.propagate("mean", x), expected, atol=1e-6)
    rows = SparseMatrix.from_scipy(got.to_scipy()).rows
    wide = type(rows)(rows.indptr.to(kind), rows.indices.to(kind), rows.values, rows.num_cols)
    for dtype in (torch.float32, torch.float64):
        assert torch.allclose(wide.product(x.to(dtype)), rows.product(x.to(dtype)))


def test_a_product_with_a_rectangular_matrix():
    import scipy.sparse as sp

    dense = np.array([[0.0, 2.0, 0.0], [1.0, 0.0, 3.0]])
    matrix = SparseMatrix.from_scipy(sp.csr_matrix(dense))
    assert matrix.shape == (2, 3)
    x = features(3, 4, 0).requires_grad_()
    assert torch.autograd.gradcheck(matrix.matmul, (x,))
    assert torch.allclose(matrix @ x, torch.from_numpy(dense) @ x)


def test_duplicate_edges_count_twice():
    edges = torch.tensor([[0, 0, 2], [1, 1, 1]])
    x = torch.tensor([[3.0], [0.0], [9.0]])
    assert Adjacency(edges, 3).propagate("mean", x)[1].item() == pytest.approx(5.0)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ((torch.zeros(2, 3), 4), "as integers"),
        ((torch.zeros(3, 3, dtype=torch.long), 4), "as integers"),
        ((torch.tensor([[0], [4]]), 4), "endpoints between 0 and 4"),
        ((torch.tensor([[-1], [0]]), 4), "out of range"),
        ((torch.tensor([[0], [1]]), 4, torch.ones(2)), "one floating-point number per edge"),
        ((torch.tensor([[0], [1]]), 4, torch.ones(1, dtype=torch.long)), "one floating-point"),
        ((torch.tensor([[0], [1]]), 4, torch.tensor([float("nan")])), "NaN"),
    ],
)
def test_bad_graphs_are_refused(arguments, why):
    with pytest.raises(DataError, match=why):
        Adjacency(*arguments)


@pytest.mark.parametrize("make", [gist.nn.GCNConv, gist.nn.SAGEConv])
def test_the_direction_of_the_flow_is_kept(make):
    torch.manual_seed(0)
    conv = make(4, 3, flow="target_to_source")
    x, edges = torch.randn(5, 4), torch.tensor([[0, 1, 2, 2], [1, 2, 3, 4]])
    assert torch.allclose(conv(x, Adjacency(edges, 5)), conv(x, edges), atol=1e-6)


def test_weights_beside_an_adjacency_are_refused():
    conv = gist.nn.GCNConv(4, 3)
    edges = torch.tensor([[0, 1], [1, 0]])
    with pytest.raises(DataError, match="given twice"):
        conv(torch.randn(2, 4), Adjacency(edges, 2), torch.ones(2))
