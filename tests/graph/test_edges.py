"""Weights and features of edges, from the graph through training to the scores."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch_geometric.nn as pyg
from torch import Tensor, nn
from torch_geometric.data import Data

import gist
from gist import GISTTrainer, GraphData
from gist.errors import DataError
from gist.graph.adjacency import Adjacency
from gist.graph.inference import infer
from gist.graph.loaders import PyGLoader

NODES, EDGES, WIDTH, D = 60, 400, 6, 3


def graph(*, weighted: bool = False, featured: bool = False, **settings) -> GraphData:
    generator = torch.Generator().manual_seed(0)
    edges = torch.randint(NODES, (2, EDGES), generator=generator)
    x = torch.randn(NODES, WIDTH, generator=generator, dtype=torch.float64)
    more = {}
    if weighted:
        more["edge_weight"] = 0.5 + torch.rand(EDGES, generator=generator)
    if featured:
        more["edge_attr"] = torch.randn(EDGES, D, generator=generator, dtype=torch.float64)
    nodes = torch.arange(NODES)
    splits = {"train": nodes[:30], "val": nodes[30:45], "test": nodes[45:]}
    settings = {"directed": True, **splits, **more, **settings}
    return GraphData.from_edges(edges, x, nodes % 4, **settings)


def attention(**settings) -> nn.Module:
    torch.manual_seed(0)
    settings = {"heads": 2, "v2": True, "edge_dim": D, "dropout": 0.0, **settings}
    return gist.nn.GAT(WIDTH, 16, 4, 3, **settings).double()


def triples(data: GraphData) -> set[tuple[float, ...]]:
    attr = data.edge_attr
    return {
        (*edge, *row) for edge, row in zip(data.edge_index.T.tolist(), attr.tolist(), strict=True)
    }


def test_features_stay_with_their_edges_in_any_order():
    data = graph(featured=True)
    order = torch.randperm(EDGES, generator=torch.Generator().manual_seed(1))
    shuffled = GraphData.from_edges(
        data.edge_index[:, order],
        data.x,
        data.y,
        train=data.train_mask,
        val=data.val_mask,
        test=data.test_mask,
        edge_attr=data.edge_attr[order],
        directed=True,
    )
    assert triples(shuffled) == triples(data)
    assert torch.equal(shuffled.edge_index, data.edge_index)
    rows = Adjacency.from_csr(*data.adjacency.rows)
    assert {
        (*e, *r) for e, r in zip(rows.edge_index.T.tolist(), rows.edge_attr.tolist(), strict=True)
    } == triples(data)


def test_the_reverse_of_an_edge_gets_its_features():
    both = graph(featured=True, directed=False, symmetrize=True)
    given = triples(graph(featured=True))
    reverses = {(v, u, *row) for u, v, *row in given}
    assert given <= triples(both) <= given | reverses
    assert both.adjacency.is_symmetric


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("self_loops", [True, False])
@pytest.mark.parametrize("concat", [True, False])
def test_attention_over_features_of_edges_layer_by_layer_is_pygs(v2, self_loops, concat):
    data = graph(featured=True)
    settings = {"heads": 2, "edge_dim": D, "add_self_loops": self_loops, "v2": v2}
    torch.manual_seed(0)
    model = pyg.GAT(WIDTH, 16, 2, 4, concat=concat, **settings).double().eval()
    expected = model(data.x, data.edge_index, edge_attr=data.edge_attr)
    for limit in (2**30, 2**17):
        got = infer(model, data.x, data.adjacency, how="layerwise", memory_limit=limit)
        assert torch.allclose(got, expected, rtol=1e-10, atol=1e-12)
    full = infer(model, data.x, data.adjacency, how="full")
    assert torch.equal(full, expected)


def test_a_model_sees_features_of_edges():
    data, model = graph(featured=True), attention()
    scores = GISTTrainer(model, data, rounds=1).predict()
    silent = replace_attr(data, torch.zeros_like(data.edge_attr))
    assert not torch.allclose(GISTTrainer(attention(), silent, rounds=1).predict(), scores)


def replace_attr(data: GraphData, attr: Tensor) -> GraphData:
    adjacency = Adjacency(data.edge_index, data.num_nodes, data.edge_weight, attr)
    return replace(data, adjacency=adjacency)


@pytest.mark.parametrize("units", ["channels", "heads"])
def test_edge_features_train_stacked_as_they_do_one_after_the_other(units):
    data = graph(featured=True)
    settings = {"num_subnets": 2, "rounds": 3, "local_steps": 2, "lr": 0.01}
    results = []
    for executor in ("serial", "stacked"):
        model = attention(units=units)
        GISTTrainer(model, data, executor=executor, keep_best=False, **settings).fit()
        results.append(model.state_dict())
    serial, stacked = results
    assert all(torch.allclose(serial[n], stacked[n], rtol=1e-9, atol=1e-12) for n in serial)
    start = attention(units=units).state_dict()
    assert not torch.equal(serial["convs.1.lin_edge.weight"], start["convs.1.lin_edge.weight"])


@pytest.mark.parametrize("make", [attention, lambda: weighted_sage(), lambda: weighted_sage(True)])
def test_clusters_keep_what_edges_carry(make):
    """One cluster that holds all nodes is the whole graph."""
    model = make()
    data = graph(featured=isinstance(model, pyg.GAT), weighted=not isinstance(model, pyg.GAT))
    losses = []
    for clusters in (None, 1):
        settings = {"num_subnets": 2, "rounds": 2, "local_steps": 1, "clusters": clusters}
        result = GISTTrainer(make(), data, **settings).fit()
        losses.append([record.train_loss for record in result.history])
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def weighted_sage(concat: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return gist.nn.GraphSAGE(WIDTH, 16, 4, 3, concat=concat, dropout=0.0).double()


@pytest.mark.parametrize("concat", [False, True])
@pytest.mark.parametrize("clusters", [None, 4])
def test_weighted_sage_trains_stacked_as_serially(concat, clusters):
    data = graph(weighted=True)
    settings = {"num_subnets": 2, "rounds": 3, "local_steps": 2, "clusters": clusters}
    settings["shared_batches"] = True
    states = []
    for executor in ("serial", "stacked"):
        model = weighted_sage(concat)
        trainer = GISTTrainer(model, data, executor=executor, keep_best=False, **settings)
        trainer.fit()
        states.append(model.state_dict())
        layerwise = infer(model, data.x, data.adjacency, how="layerwise")
        assert torch.allclose(trainer.predict(), layerwise, rtol=1e-9, atol=1e-12)
    assert all(torch.allclose(states[0][n], states[1][n], rtol=1e-9, atol=1e-12) for n in states[0])


def test_weights_of_one_are_no_weights():
    data = graph()
    model = weighted_sage().eval()
    ones = Adjacency(data.edge_index, NODES, torch.ones(EDGES, dtype=torch.float64))
    for how in ("full", "layerwise"):
        plain = infer(model, data.x, data.adjacency, how=how)
        assert torch.allclose(infer(model, data.x, ones, how=how), plain, rtol=1e-12, atol=1e-12)


def test_a_layer_that_takes_no_weights_is_given_none():
    data = graph(weighted=True)
    torch.manual_seed(0)
    model = pyg.GraphSAGE(WIDTH, 8, 2, 4).double().eval()
    expected = model(data.x, data.edge_index)
    for how in ("full", "layerwise"):
        got = infer(model, data.x, data.adjacency, how=how)
        assert torch.allclose(got, expected, rtol=1e-10, atol=1e-12)


def test_batches_of_a_pyg_loader_carry_features_of_edges():
    data = graph(featured=True)
    recipe = PyGLoader(make_loader=lambda whole: [whole])
    settings = {"num_subnets": 2, "rounds": 1, "local_steps": 1}
    losses = [
        GISTTrainer(attention(), data, batches=batches, **settings).fit().history[0].train_loss
        for batches in (None, recipe)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_from_pyg_tells_a_weight_from_features():
    data = graph()
    masks = {f"{split}_mask": data.mask(split) for split in ("train", "val", "test")}
    item = Data(x=data.x, edge_index=data.edge_index, y=data.y, **masks)
    column = torch.rand(EDGES, 1)
    item.edge_attr = column
    weighted = GraphData.from_pyg(item, directed=True)
    assert torch.equal(weighted.edge_weight, column[:, 0].double())
    assert weighted.edge_attr is None
    item.edge_weight = column[:, 0]
    both = GraphData.from_pyg(item, directed=True)
    assert both.edge_attr.shape == (EDGES, 1)
    item.edge_attr = torch.rand(EDGES, D)
    assert GraphData.from_pyg(item, directed=True).edge_attr.shape == (EDGES, D)


@pytest.mark.parametrize(
    ("model", "data", "words"),
    [
        (lambda: pyg.GraphSAGE(WIDTH, 8, 2, 4), {"weighted": True}, "does not use edge weights"),
        (
            lambda: gist.nn.GraphSAGE(WIDTH, 8, 4, aggr="max"),
            {"weighted": True},
            "does not use edge weights",
        ),
        (lambda: weighted_sage(), {"featured": True}, "does not use features.*edge_dim=3"),
        (lambda: attention(), {}, "has weights for features of edges.*without edge_dim"),
        (lambda: attention(edge_dim=2), {"featured": True}, "cannot run on this data"),
    ],
)
def test_what_a_model_cannot_use_is_refused(model, data, words):
    with pytest.raises((DataError, gist.PartitionError), match=words):
        GISTTrainer(model().double(), graph(**data), num_subnets=2, rounds=1)


def test_negative_weights_of_a_mean_are_refused():
    data = graph(weighted=True)
    weight = data.edge_weight.clone()
    weight[0] = -1.0
    adjacency = Adjacency(data.edge_index, NODES, weight)
    with pytest.raises(DataError, match="at least 0"):
        GISTTrainer(weighted_sage(), replace(data, adjacency=adjacency), rounds=1)


@pytest.mark.parametrize(
    ("attr", "words"),
    [
        (torch.zeros(EDGES - 1, 2), r"one floating-point row per edge.*\(399, 2\)"),
        (torch.zeros(EDGES, 2, 2), "one floating-point row per edge"),
        (torch.zeros(EDGES, 0), "one floating-point row per edge"),
        (torch.full((EDGES, 1), float("nan")), "edge_attr holds NaN or infinite values"),
    ],
)
def test_bad_features_of_edges_are_refused(attr, words):
    with pytest.raises(DataError, match=words):
        graph(edge_attr=attr)
