"""Matrices built from compressed rows, against PyG's message passing and dense oracles."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch_geometric.nn as pyg
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch_geometric.nn.conv.gcn_conv import gcn_norm
from torch_geometric.utils import subgraph, to_dense_adj

from gist import Adjacency
from gist.errors import DataError
from gist.graph.adjacency import Rows
from gist.graph.sparse import CSR

FORMS = ("gcn", "mean", "sum")


@st.composite
def graphs(draw: st.DrawFn) -> Adjacency:
    """Any multigraph, directed or not, weighted or not; unweighted ones with many self loops."""
    nodes = draw(st.integers(1, 8))
    pairs = draw(st.lists(st.tuples(*[st.integers(0, nodes - 1)] * 2), max_size=20))
    edges = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T.contiguous()
    weight = None
    if draw(st.booleans()):
        generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
        weight = torch.rand(edges.size(1), generator=generator, dtype=torch.float64) + 0.1
    if draw(st.booleans()):
        edges = torch.cat([edges, edges.flip(0)], dim=1)
        weight = None if weight is None else weight.repeat(2)
    return Adjacency(edges, nodes, weight)


def dense(matrix: CSR) -> Tensor:
    return torch.from_numpy(matrix.to_scipy().toarray())


def all_forms(graph: Adjacency) -> dict[str, Tensor]:
    return {form: dense(graph.matrix(form, torch.float64).rows) for form in FORMS}


def counts(graph: Adjacency) -> Tensor:
    return to_dense_adj(graph.edge_index, max_num_nodes=graph.num_nodes)[0].T.double()


def weights(graph: Adjacency) -> Tensor:
    values = graph.edge_weight
    ones = torch.ones(graph.num_edges, dtype=torch.float64)
    values = ones if values is None else values.double()
    out = torch.zeros(graph.num_nodes, graph.num_nodes, dtype=torch.float64)
    source, target = graph.edge_index
    return out.index_put_((target, source), values, accumulate=True)


@given(graph=graphs())
def test_rows_hold_the_edges_in_their_order(graph):
    for node, (start, stop) in enumerate(pairwise(graph.rows.indptr)):
        mine = graph.edge_index[1] == node
        assert torch.equal(graph.rows.indices[start:stop].long(), graph.edge_index[0][mine])
        if graph.edge_weight is not None:
            assert torch.equal(graph.rows.weight[start:stop], graph.edge_weight[mine])


@given(graph=graphs())
def test_rows_that_are_known_give_the_same_graph(graph):
    known = Adjacency.from_csr(*graph.rows)
    assert torch.equal(counts(known), counts(graph))
    assert torch.allclose(weights(known), weights(graph))
    assert known.num_edges == graph.num_edges
    assert known.is_symmetric == graph.is_symmetric
    for form, matrix in all_forms(graph).items():
        assert torch.equal(all_forms(known)[form], matrix), form


@given(graph=graphs())
def test_gcn_is_pygs_normalisation_with_self_loops_of_any_kind(graph):
    weight = graph.edge_weight
    loops = graph.edge_index[0] == graph.edge_index[1]
    several = int(torch.bincount(graph.edge_index[0][loops], minlength=1).max()) > 1
    if weight is not None and several:
        return  # PyG keeps one of them, and does not say which
    index, values = gcn_norm(graph.edge_index, weight, graph.num_nodes, dtype=torch.float64)
    theirs = torch.zeros(graph.num_nodes, graph.num_nodes, dtype=torch.float64)
    theirs.index_put_((index[1], index[0]), values, accumulate=True)
    assert torch.allclose(all_forms(graph)["gcn"], theirs, rtol=0, atol=1e-12)


def test_of_several_weighted_self_loops_the_last_given_counts():
    edges = torch.tensor([[0, 1, 0, 0], [0, 0, 0, 1]])
    several = Adjacency(edges, 2, torch.tensor([5.0, 2.0, 3.0, 2.0]))
    one = Adjacency(edges[:, 1:], 2, torch.tensor([2.0, 3.0, 2.0]))
    assert torch.equal(all_forms(several)["gcn"], all_forms(one)["gcn"])


@given(graph=graphs(), seed=st.integers(0, 99))
def test_sum_is_what_gin_adds_up(graph, seed):
    x = torch.randn(graph.num_nodes, 3, generator=torch.Generator().manual_seed(seed)).double()
    gin = pyg.GINConv(nn.Identity(), eps=-1.0)  # without the node's own features
    expected = gin(x, graph.edge_index)
    assert torch.allclose(graph.propagate("sum", x), expected, rtol=0, atol=1e-12)


@given(graph=graphs())
def test_what_a_symmetric_graph_knows_is_its_transpose(graph):
    for form in FORMS:
        matrix = graph.matrix(form, torch.float64)
        assert torch.allclose(dense(matrix.columns), dense(matrix.rows).T), form
        free = graph.has_symmetric_pattern if form == "sum" else graph.is_symmetric
        assert (matrix.columns.indices is matrix.rows.indices) == free, form


@given(graph=graphs())
def test_symmetry_is_that_of_the_dense_matrices(graph):
    pattern = counts(graph)
    assert graph.has_symmetric_pattern == bool((pattern == pattern.T).all())
    if graph.edge_weight is None:
        assert graph.is_symmetric == graph.has_symmetric_pattern
    elif pattern.max() <= 1:
        assert graph.is_symmetric == bool((weights(graph) == weights(graph).T).all())


def test_a_weight_of_zero_without_a_reverse_is_symmetric_in_value_alone():
    graph = Adjacency(torch.tensor([[0], [1]]), 2, torch.tensor([0.0]))
    assert graph.is_symmetric
    assert not graph.has_symmetric_pattern
    assert torch.equal(dense(graph.mean.columns), torch.zeros(2, 2))


@given(graph=graphs(), data=st.data())
def test_subgraphs_are_those_of_pyg(graph, data):
    nodes = torch.tensor(
        data.draw(st.lists(st.integers(0, graph.num_nodes - 1), unique=True, min_size=1))
    )
    part = graph.subgraph(nodes)
    # PyG renumbers nodes in rising order
    index, weight = subgraph(nodes, graph.edge_index, graph.edge_weight, num_nodes=graph.num_nodes)
    place = torch.full((graph.num_nodes,), -1)
    place[nodes] = torch.arange(len(nodes))
    theirs = Adjacency(place[index], len(nodes), weight)
    assert torch.equal(counts(part), counts(theirs))
    assert torch.allclose(weights(part), weights(theirs))
    for form, matrix in all_forms(theirs).items():
        assert torch.allclose(all_forms(part)[form], matrix, rtol=0, atol=1e-12), form
    if graph.is_symmetric:
        assert part.is_symmetric
    assert part.has_self_loops == theirs.has_self_loops


def test_parts_of_a_graph_look_for_nothing_that_holds_of_the_whole(monkeypatch):
    ring = torch.arange(6)
    index = torch.stack([torch.cat([ring, ring.roll(1)]), torch.cat([ring.roll(1), ring])])
    whole = Adjacency(index, 6)
    assert whole.is_symmetric
    assert not whole.has_self_loops

    def fails(*_):
        raise AssertionError("looked again")

    part = whole.subgraph(torch.arange(4))
    monkeypatch.setattr(Adjacency, "to_scipy", fails)
    monkeypatch.setattr(Adjacency, "_row_numbers", fails)
    monkeypatch.setattr(CSR, "to_scipy", fails)
    for form in FORMS:
        x = torch.randn(4, 2, requires_grad=True)
        part.propagate(form, x).sum().backward()
        assert x.grad is not None


def bipartite() -> tuple[Adjacency, Tensor]:
    dense_ = torch.tensor([[0.0, 1.0, 2.0, 0.0], [1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    indptr = torch.tensor([0, 3, 5, 5])
    indices = torch.tensor([1, 2, 2, 0, 3])
    return Adjacency.from_csr(indptr, indices, num_nodes=4), dense_.double()


def test_targets_are_the_first_sources_of_a_bipartite_graph():
    graph, matrix = bipartite()
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert (graph.num_targets, graph.num_nodes, graph.is_square) == (3, 4, False)
    assert torch.equal(graph.propagate("identity", x), x[:3])
    assert torch.allclose(graph.propagate("sum", x), matrix @ x)
    assert torch.allclose(
        graph.propagate("mean", x), matrix / matrix.sum(1, keepdim=True).clamp(min=1) @ x
    )
    assert torch.autograd.gradcheck(lambda x: graph.propagate("mean", x), (x,))
    weight = torch.randn(2, 3, dtype=torch.float64)
    constant = x.detach()
    plain = graph.project("identity", constant, weight)
    graph.remember(constant)
    assert torch.allclose(graph.project("identity", constant, weight), plain)
    assert plain.shape == (3, 2)
    assert "num_targets=3, num_nodes=4" in repr(graph)
    with pytest.raises(DataError, match=r"symmetric normalisation.*nodes all receive"):
        graph.propagate("gcn", x)


def test_a_bipartite_layer_is_pygs():
    graph, _ = bipartite()
    conv = pyg.SAGEConv(3, 2).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    expected = conv((x, x[:3]), graph.edge_index, size=(4, 3))
    got = graph.project("mean", x, conv.lin_l.weight, conv.lin_l.bias)
    got = got + graph.project("identity", x, conv.lin_r.weight)
    assert torch.allclose(got, expected)


def test_given_scales_take_the_place_of_degrees():
    edges = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
    rows = Adjacency(edges, 3).rows
    scale = {"gcn": torch.tensor([0.5, 0.25, 1.0]), "mean": torch.tensor([0.1, 0.2, 0.3])}
    graph = Adjacency.from_csr(*rows, node_scale=lambda form, dtype: scale[form].to(dtype))
    looped = counts(graph) + torch.eye(3)
    gcn, mean = scale["gcn"].double(), scale["mean"].double()
    assert torch.allclose(all_forms(graph)["gcn"], gcn[:, None] * looped * gcn)
    assert torch.allclose(all_forms(graph)["mean"], mean[:, None] * counts(graph))
    assert torch.equal(dense(graph.mean.columns), dense(graph.mean.rows).T)


def test_products_can_be_computed_ahead():
    graph = Adjacency(torch.tensor([[0, 1], [1, 0]]), 2)
    x = torch.randn(2, 3)
    assert graph.remembered(x) == frozenset()
    graph.remember(x, ["gcn", "identity"])
    assert graph.remembered(x) == {"gcn", "identity"}
    ahead = graph.propagate("gcn", x)
    assert graph.propagate("gcn", x) is ahead
    assert torch.allclose(ahead, graph.gcn @ x)


def test_rows_take_and_keep():
    rows = Rows(torch.tensor([0, 2, 2, 5]), torch.tensor([4, 1, 0, 0, 3]), torch.arange(5.0))
    taken = rows.take(torch.tensor([2, 1, 0]))
    assert taken.indptr.tolist() == [0, 3, 3, 5]
    assert taken.indices.tolist() == [0, 0, 3, 4, 1]
    assert taken.weight.tolist() == [2.0, 3.0, 4.0, 0.0, 1.0]
    kept = taken.keep(taken.indices > 0)
    assert kept.indptr.tolist() == [0, 1, 1, 3]
    assert kept.indices.tolist() == [3, 4, 1]
    assert kept.weight.tolist() == [4.0, 0.0, 1.0]


def test_indices_take_half_the_memory_where_they_can():
    assert Adjacency(torch.tensor([[0, 1], [1, 0]]), 2).rows.indices.dtype == torch.int32
    wide = Rows(*(t.long() for t in Adjacency(torch.tensor([[0, 1], [1, 0]]), 2).rows[:2]), None)
    graph = Adjacency.from_csr(*wide)
    for form in FORMS:
        assert torch.equal(
            dense(graph.matrix(form).rows),
            dense(Adjacency(torch.tensor([[0, 1], [1, 0]]), 2).matrix(form).rows),
        )


def test_another_device_takes_everything_along():
    graph = Adjacency(torch.tensor([[0, 1], [1, 0]]), 2, torch.ones(2))
    assert graph.gcn.rows.values.device.type == "cpu"
    assert graph.is_symmetric
    moved = graph.to("meta")
    assert moved.device.type == "meta"
    assert {moved.edge_index.device.type, moved.edge_weight.device.type} == {"meta"}
    assert {tensor.device.type for tensor in moved.rows[:3]} == {"meta"}
    assert moved.gcn.rows.values.device.type == "meta"
    assert moved.is_symmetric
    assert graph.device.type == "cpu"
    assert graph.to("cpu") is graph


def test_large_multiplicities_are_counted():
    many = torch.zeros(2, 300, dtype=torch.int64)
    many[1] = 1
    graph = Adjacency(torch.cat([many, many.flip(0)], 1), 2)
    assert graph.is_symmetric
    assert all_forms(graph)["sum"].tolist() == [[0.0, 300.0], [300.0, 0.0]]
    assert np.allclose(all_forms(graph)["mean"], [[0.0, 1.0], [1.0, 0.0]])


def test_a_scipy_matrix_is_a_copy():
    edges = torch.tensor([[2, 0, 2, 1], [0, 0, 0, 1]])
    graph = Adjacency(edges, 3, torch.tensor([1.0, 2.0, 3.0, 4.0]))
    matrix = graph.to_scipy()
    matrix.sum_duplicates()
    matrix.data[:] = 0
    assert graph.rows.indices.tolist() == [2, 0, 2, 1]
    assert graph.rows.weight.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert graph.to_scipy().toarray().tolist() == [[2.0, 0.0, 4.0], [0.0, 4.0, 0.0], [0.0] * 3]
