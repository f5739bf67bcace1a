"""The graph of the parts: what is counted in it adds up to the graph."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gist import Adjacency, Cluster, load_dataset
from gist.errors import DataError
from gist.graph.quotient import quotient_graph


@st.composite
def cut_graphs(draw: st.DrawFn):
    """A directed graph with loops and duplicates, and a part for each node."""
    nodes = draw(st.integers(1, 10))
    pairs = draw(st.lists(st.tuples(*[st.integers(0, nodes - 1)] * 2), max_size=30))
    edges = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T
    weight = torch.arange(1.0, 1 + len(pairs)) if draw(st.booleans()) else None
    parts = draw(st.lists(st.integers(0, 4), min_size=nodes, max_size=nodes))
    return Adjacency(edges, nodes, weight), torch.tensor(parts)


@given(cut_graphs(), st.integers(0, 10))
def test_it_counts_what_the_edges_say(given_, first):
    graph, parts = given_
    train = torch.arange(graph.num_nodes) < first
    quotient = quotient_graph(graph, parts, train)
    assert list(quotient) == list(range(int(parts.max()) + 1))
    for part, attributes in quotient.nodes(data=True):
        assert attributes["size"] == int((parts == part).sum())
        assert attributes["train"] == int((train & (parts == part)).sum())
    weight = torch.ones(graph.num_edges) if graph.edge_weight is None else graph.edge_weight
    ends = parts[graph.edge_index].sort(dim=0).values
    for a, b, attributes in quotient.edges(data=True):
        joined = (ends == torch.tensor([[min(a, b)], [max(a, b)]])).all(dim=0)
        assert attributes == {"edges": int(joined.sum()), "weight": float(weight[joined].sum())}
        assert a != b
    inside = sum(edges for _, edges in quotient.nodes(data="edges"))
    between = sum(edges for *_, edges in quotient.edges(data="edges"))
    assert inside == int((ends[0] == ends[1]).sum())
    assert inside + between == graph.num_edges


def test_clusters_have_one():
    data = load_dataset("csbm", num_nodes=90, num_features=4, num_classes=3)
    source = Cluster(num_parts=5, cache=False).bind(data)
    quotient = source.quotient()
    sizes = [size for _, size in quotient.nodes(data="size")]
    assert sizes == np.bincount(source.parts).tolist()
    assert sizes == [len(source.nodes([cluster])) for cluster in quotient]
    assert sum(train for _, train in quotient.nodes(data="train")) == int(data.train_mask.sum())
    inside = sum(edges for _, edges in quotient.nodes(data="edges"))
    assert inside == round(source.edges_within * data.num_edges)
    direct = quotient_graph(data.adjacency, source.parts, data.train_mask)
    assert dict(direct.nodes(data=True)) == dict(quotient.nodes(data=True))
    assert dict(direct.adj) == dict(quotient.adj)


@pytest.mark.parametrize("parts", [torch.zeros(2).long(), torch.zeros(3), torch.tensor([0, -1, 0])])
def test_other_parts_are_refused(parts):
    graph = Adjacency(torch.tensor([[0], [1]]), 3)
    with pytest.raises(DataError, match=r"a number from 0 for every node.*shape \(3,\)"):
        quotient_graph(graph, parts)
