"""Links held out of a graph, and pairs without a link."""

from __future__ import annotations

import random
from dataclasses import replace

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.utils import to_undirected

from gist import GraphData, LinkData, load_dataset
from gist.errors import ConfigError, DataError
from gist.graph.link_sampling import links_of, pairs_without_link


def graph(num_nodes: int = 60, num_pairs: int = 150, seed: int = 0) -> Data:
    """Random links, without labels."""
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.randint(num_nodes, (2, num_pairs), generator=generator)
    x = torch.randn(num_nodes, 3, generator=generator)
    return Data(x=x, edge_index=to_undirected(pairs[:, pairs[0] != pairs[1]]))


def pairs_of(pairs: Tensor) -> set[frozenset[int]]:
    """Pairs ``[2, ...]`` without their direction; a self loop is a set of one."""
    return {frozenset(pair) for pair in pairs.flatten(1).t().tolist()}


GRAPH = graph()
LINKS = links_of(GRAPH.edge_index, 60)


@given(
    num_nodes=st.integers(15, 40),
    seed=st.integers(0, 1000),
    shares=st.sampled_from([(0.05, 0.1), (0.3, 0.3), (0.1, 0.6)]),
    metric=st.sampled_from(["mrr", "hits@2"]),
)
def test_every_link_is_in_one_split_and_no_negative_is_one(num_nodes, seed, shares, metric):
    given = graph(num_nodes, 4 * num_nodes, seed)
    every = links_of(given.edge_index, num_nodes)
    data = LinkData.split(
        given, val_share=shares[0], test_share=shares[1], seed=seed, metric=metric, num_negatives=7
    )
    train, val, test = (data.links(name) for name in ("train", "val", "test"))
    sizes = [int(share * every.size(1)) for share in shares]
    assert [val.size(1), test.size(1)] == sizes
    assert train.size(1) + sum(sizes) == every.size(1)
    assert pairs_of(train) | pairs_of(val) | pairs_of(test) == pairs_of(every)

    edges = data.graph.edge_index
    assert pairs_of(edges) == pairs_of(train)
    assert edges.size(1) == 2 * train.size(1)
    assert data.graph.adjacency.is_symmetric
    for name, count in zip(("val", "test"), sizes, strict=True):
        pairs = data.negative_pairs(name)
        assert pairs.shape == ((2, count, 7) if metric == "mrr" else (2, 7))
        assert not pairs_of(pairs) & pairs_of(every)
        assert all(len(pair) == 2 for pair in pairs_of(pairs))
        if metric == "mrr":
            assert torch.equal(pairs[0], data.links(name)[0][:, None].expand(-1, 7))


@pytest.mark.parametrize("metric", ["mrr", "hits@3"])
def test_a_split_depends_on_its_arguments_alone(metric):
    def states():
        own = np.random.get_state()[1].tolist()  # noqa: NPY002
        return torch.get_rng_state().tolist(), own, random.getstate()

    first = LinkData.split(GRAPH, metric=metric)
    torch.rand(3), random.random()
    before = states()
    again = LinkData.split(GRAPH, metric=metric)
    assert states() == before
    assert first.fingerprint() == again.fingerprint()
    other = LinkData.split(GRAPH, metric=metric, seed=1)
    assert pairs_of(other.test) != pairs_of(first.test)
    names = ("val", "test", "val_negatives", "test_negatives")
    assert all(torch.equal(getattr(first, name), getattr(again, name)) for name in names)


def test_what_is_not_given_has_a_number():
    data = LinkData.split(GRAPH, val_share=0.2, test_share=0.3)
    assert data.test_negatives.shape == (data.test.size(1), 100)
    hits = LinkData.split(GRAPH, val_share=0.2, test_share=0.3, metric="hits@5")
    assert hits.val_negatives.shape == hits.val.shape
    assert torch.equal(hits.test, data.test), "the split does not depend on the metric"


def test_self_loops_and_parallel_edges_are_no_further_links():
    loops = torch.tensor([[4, 9], [4, 9]])
    messy = torch.cat([GRAPH.edge_index, loops, GRAPH.edge_index[:, ::2]], dim=1)
    messy = torch.cat([messy, messy.flip(0)], dim=1)
    clean = LinkData.split(GRAPH, metric="hits@1")
    data = LinkData.split(Data(x=GRAPH.x, edge_index=messy), metric="hits@1")
    assert all(torch.equal(data.links(n), clean.links(n)) for n in ("train", "val", "test"))
    assert torch.equal(data.test_negatives, clean.test_negatives)
    assert data.graph.adjacency.has_self_loops


def test_what_edges_carry_stays_with_them():
    low, high = GRAPH.edge_index.sort(dim=0).values
    weight = (60 * low + high).float()
    attr = torch.stack([weight, -weight], dim=1)
    given = Data(x=GRAPH.x, edge_index=GRAPH.edge_index, edge_weight=weight, edge_attr=attr)
    kept = LinkData.split(given).graph
    low, high = kept.edge_index.sort(dim=0).values
    assert torch.equal(kept.edge_weight, (60 * low + high).float())
    assert torch.equal(kept.edge_attr, torch.stack([kept.edge_weight, -kept.edge_weight], dim=1))


def test_labels_make_no_difference():
    data = load_dataset("csbm", num_nodes=60, num_features=4, num_classes=3)
    bare = Data(x=data.x, edge_index=data.edge_index)
    names = [LinkData.split(each, metric="hits@9").fingerprint() for each in (data, bare)]
    assert names[0] == names[1]


def test_a_dgl_graph_will_do():
    dgl = pytest.importorskip("dgl")
    graph = dgl.graph(tuple(GRAPH.edge_index), num_nodes=60)
    graph.ndata["feat"] = GRAPH.x
    graph.__class__ = type("Mine", (dgl.DGLGraph,), {"__module__": "mine"})
    assert LinkData.split(graph).fingerprint() == LinkData.split(GRAPH).fingerprint()


def test_directed_graphs_can_be_made_undirected():
    one_way = Data(x=GRAPH.x, edge_index=LINKS)
    data = LinkData.split(one_way, symmetrize=True)
    assert data.fingerprint() == LinkData.split(GRAPH).fingerprint()
    nodes = {"train": range(40), "val": range(40, 50), "test": range(50, 60)}
    known = GraphData.from_edges(LINKS, GRAPH.x, torch.arange(60) % 2, **nodes, directed=True)
    with pytest.raises(DataError, match=r"no direction.*symmetrize=True"):
        LinkData.split(known)
    assert LinkData.split(known, symmetrize=True).fingerprint() == data.fingerprint()


def test_given_splits_are_taken_as_they_are():
    drawn = LinkData.split(GRAPH, metric="hits@2", num_negatives=20)
    lists = {
        name: getattr(drawn, name).tolist()
        for name in ("val", "test", "val_negatives", "test_negatives")
    }
    edges = drawn.graph.edge_index.numpy().astype(np.int32)
    data = LinkData.from_edges(edges, GRAPH.x, metric="hits@2", **lists)
    assert data.fingerprint() == drawn.fingerprint()
    del lists["test_negatives"]
    data = LinkData.from_edges(edges, GRAPH.x, metric="hits@2", num_negatives=20, **lists)
    assert data.fingerprint() == drawn.fingerprint(), "they are drawn as in a split"


def refused(**changes: object) -> object:
    """From a sound split with something else in it."""
    data = LinkData.split(GRAPH, metric="hits@2", num_negatives=20)
    names = ("val", "test", "val_negatives", "test_negatives", "metric")
    given = {name: getattr(data, name) for name in names} | {"edge_index": data.graph.edge_index}
    edges = {"x": GRAPH.x, **given, **changes}
    return LinkData.from_edges(edges.pop("edge_index"), edges.pop("x"), **edges)


HUB = torch.stack([torch.zeros(29, dtype=torch.int64), torch.arange(1, 30)])
WITH_NAN = torch.where(torch.arange(60)[:, None] == 7, torch.nan, GRAPH.x)
REFUSED = {
    "links that are edges": (lambda: refused(edge_index=GRAPH.edge_index), "would leak"),
    "a link in two splits": (lambda: refused(val=refused().test[:, :2]), "would leak"),
    "a link twice": (lambda: refused(val=torch.tensor([[1, 2], [2, 1]])), "different pairs"),
    "a self loop": (lambda: refused(val=torch.tensor([[1], [1]])), "different nodes"),
    "a negative that is a link": (lambda: refused(val_negatives=LINKS[:, :9].flip(0)), "hold link"),
    "no such node": (lambda: refused(val=torch.tensor([[1], [60]])), "between 1 and 60.*0 and 59"),
    "pairs as rows": (lambda: refused(val=LINKS[:, :5].t()), r"\.t\(\)"),
    "no links": (lambda: refused(val=torch.zeros(2, 0)), "val must hold numbers"),
    "fractions": (lambda: refused(test=torch.rand(2, 4)), "float32"),
    "negatives for another metric": (lambda: refused(metric="mrr"), r"val_negatives.*shape"),
    "unknown metric": (lambda: LinkData.split(GRAPH, metric="auc"), "'mrr', or 'hits@K'"),
    "K of none": (lambda: LinkData.split(GRAPH, metric="hits@0"), "unknown metric"),
    "K above the negatives": (lambda: replace(refused(), metric="hits@21"), "num_negatives=21"),
    "no negatives": (lambda: LinkData.split(GRAPH, num_negatives=0), "whole number"),
    "more than there are": (
        lambda: LinkData.split(GRAPH, metric="hits@2", num_negatives=1700),
        "fewer pairs without a link",
    ),
    "one direction": (lambda: LinkData.split(Data(x=GRAPH.x, edge_index=LINKS)), "symmetrize"),
    "too few links": (
        lambda: LinkData.split(Data(x=GRAPH.x, edge_index=to_undirected(LINKS[:, :9]))),
        "too small to split.*9 links",
    ),
    "too few nodes": (
        lambda: LinkData.split(Data(x=torch.ones(2, 1), edge_index=torch.tensor([[0, 1], [1, 0]]))),
        "too small to split.*2 nodes",
    ),
    "shares": (lambda: LinkData.split(GRAPH, val_share=0.5, test_share=0.5), "together below 1"),
    "a hub of all": (
        lambda: LinkData.split(Data(x=torch.ones(30, 1), edge_index=to_undirected(HUB))),
        "hits@K",
    ),
    "no features": (lambda: LinkData.split(Data(edge_index=LINKS)), "has no x"),
    "NaN": (
        lambda: LinkData.split(Data(x=WITH_NAN, edge_index=GRAPH.edge_index)),
        "NaN.*first node 7",
    ),
    "no graph": (lambda: LinkData.split([GRAPH]), "got: list"),
    "networkx": (lambda: LinkData.split(nx.path_graph(9)), r"got: Graph.*from_networkx\("),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_on_is_refused(name):
    attempt, message = REFUSED[name]
    with pytest.raises((DataError, ConfigError), match=message):
        attempt()


def test_pairs_are_drawn_from_all_that_have_no_link():
    path = torch.tensor([[0, 1, 2], [1, 2, 3]])
    seen = [pairs_of(pairs_without_link(path, 4, 2, "test", i)) for i in range(20)]
    assert set().union(*seen) == {frozenset({0, 2}), frozenset({0, 3}), frozenset({1, 3})}
    assert all(len(each) == 2 for each in seen)
    assert len(pairs_of(pairs_without_link(path, 4, 9, "test"))) == 3


def test_it_prints_what_it_holds():
    text = repr(LinkData.split(GRAPH, metric="hits@3"))
    assert "links 122 / 7 / 14" in text
    assert "hits@3 among 14 negatives" in text
