"""Clients' graphs as batches: induced subgraphs, kept within bounds; and clusters dealt out."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch_geometric.utils import subgraph

from gist import Adjacency, GISTTrainer, GraphData, load_dataset
from gist.errors import ConfigError, DataError
from gist.graph import client_batches, parts
from gist.graph.batch import GraphBatch, training_graph
from gist.graph.client_batches import ClientGraphs, ClientGraphSource, spread_clusters
from gist.graph.parts import cut_graph
from gist.nn import GCN

FORMS = ("gcn", "mean", "sum")


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path_factory):
    """No test sees cuts of another one, or of this machine's user."""
    monkeypatch.setenv("GIST_CACHE", str(tmp_path_factory.mktemp("cache") / "none"))
    monkeypatch.setattr(parts, "_RECENT", {})


@st.composite
def owned(draw: st.DrawFn) -> tuple[GraphData, torch.Tensor]:
    """Small data on any multigraph, and clients that have training nodes."""
    nodes = draw(st.integers(5, 14))
    pairs = draw(st.lists(st.tuples(*[st.integers(0, nodes - 1)] * 2), max_size=40))
    edges = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T.contiguous()
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    weight = attr = None
    if draw(st.booleans()):
        weight = torch.randint(1, 99, edges.shape[1:], generator=generator).double() / 64
    if draw(st.booleans()):
        attr = torch.randn(edges.size(1), 2, generator=generator, dtype=torch.float64)
    if draw(st.booleans()):
        edges = torch.cat([edges, edges.flip(0)], dim=1)
        weight = None if weight is None else weight.repeat(2)
        attr = None if attr is None else attr.repeat(2, 1)
    order = torch.randperm(nodes, generator=generator)
    train = draw(st.integers(1, nodes - 2))
    data = GraphData.from_edges(
        edges,
        torch.randn(nodes, 3, generator=generator, dtype=torch.float64),
        torch.randint(2, (nodes,), generator=generator),
        train=order[:train],
        val=order[train : train + 1],
        test=order[train + 1 :],
        edge_weight=weight,
        edge_attr=attr,
        num_classes=2,
        directed=True,
    )
    count = draw(st.integers(1, train))
    clients = torch.randint(count, (nodes,), generator=generator)
    clients[order[:count]] = torch.arange(count)
    return data, clients


def csbm(**options) -> GraphData:
    return load_dataset("csbm", num_nodes=300, num_features=8, num_classes=3, **options)


def source(data: GraphData, clients: torch.Tensor) -> ClientGraphSource:
    return ClientGraphs(clients=clients).bind(data)


def one(data: ClientGraphSource, client: int) -> GraphBatch:
    (batch,) = data.batches(seed=3, round=5, subnet=client, steps=1)
    return batch


# --- a client's batch is its subgraph ---


@given(problem=owned())
def test_a_batch_is_the_subgraph_of_the_client(problem):
    data, clients = problem
    every = source(data, clients)
    kept = 0
    for client in range(every.num_clients):
        nodes = (clients == client).nonzero()[:, 0]
        assert torch.equal(every.nodes(client), nodes)
        batch = one(every, client)
        assert torch.equal(batch.x, data.x[nodes])
        targets = torch.arange(len(nodes)) if batch.targets is None else batch.targets
        assert torch.equal(nodes[targets], nodes[data.train_mask[nodes]])
        assert torch.equal(batch.y, data.y[nodes[targets]])
        assert int(every.client_samples[client]) == len(targets) > 0

        carried = (data.edge_weight, data.edge_attr)
        places = torch.arange(data.num_edges)
        index, chosen = subgraph(
            nodes, data.edge_index, places, relabel_nodes=True, num_nodes=data.num_nodes
        )
        weight, attr = (None if t is None else t[chosen] for t in carried)
        oracle = Adjacency(index, len(nodes), weight, attr)
        for got, expected in zip(batch.graph.rows, oracle.rows, strict=True):
            assert (got is None) == (expected is None)
            assert got is None or torch.equal(got, expected)
        for form in FORMS:
            got, expected = (g.matrix(form, torch.float64) for g in (batch.graph, oracle))
            for side in ("rows", "columns"):
                dense = (
                    torch.from_numpy(getattr(m, side).to_scipy().toarray()) for m in (got, expected)
                )
                assert torch.allclose(*dense, rtol=0, atol=1e-12), (form, side)
        kept += batch.graph.num_edges
    assert every.edges_within == pytest.approx(kept / max(data.num_edges, 1))
    assert every.steps_per_epoch == every.num_clients
    assert int(every.client_samples.sum()) == int(data.train_mask.sum())


def test_one_client_has_the_whole_graph():
    data = csbm()
    batch = one(source(data, torch.zeros(300, dtype=torch.int64)), 0)
    assert all(
        torch.equal(a, b)
        for a, b in zip(batch.graph.rows, data.adjacency.rows, strict=True)
        if a is not None
    )
    assert torch.equal(batch.targets, data.train_mask.nonzero()[:, 0])


def test_every_step_and_task_sees_the_same_batch():
    every = source(csbm(), torch.arange(300) % 4)
    batches = list(every.batches(seed=0, round=0, subnet=2, steps=3))
    assert len(batches) == 3
    assert all(batch is batches[0] for batch in batches)
    assert one(every, 2) is batches[0]
    assert one(every, 6) is batches[0]  # of more subnets than clients


# --- what is kept ---


def test_what_is_kept_is_bounded_and_what_was_used_last_stays(monkeypatch):
    data, clients = csbm(), torch.arange(300) % 30
    free = source(data, clients)
    for client in range(30):
        one(free, client)
    assert len(free._kept) == 30
    assert free.kept_bytes == sum(free._needed)

    limit = sum(free._needed) // 6
    monkeypatch.setattr(client_batches, "_KEPT_BYTES", limit)
    few = source(data, clients)
    first = one(few, 0)
    for client in range(1, 30):
        one(few, client)
        assert one(few, 0) is first  # used again and again
        assert few._held == sum(few._needed[c] for c in few._kept) <= limit == few.kept_bytes
    assert 3 <= len(few._kept) <= 8
    again = one(few, 1)
    assert torch.equal(again.x, one(free, 1).x)
    assert torch.equal(again.graph.edge_index, one(free, 1).graph.edge_index)

    monkeypatch.setattr(client_batches, "_KEPT_BYTES", 1)
    none = source(data, clients)
    for client in range(3):
        assert one(none, client) is one(none, client)
        assert list(none._kept) == [client]
    assert none.kept_bytes == max(none._needed)


def test_the_largest_batch_is_the_one_that_needs_most():
    clients = torch.zeros(300, dtype=torch.int64)
    clients[:40] = 1
    clients[40:60] = 2
    every = source(csbm(), clients)
    assert len(every.largest_batch().x) == 240


# --- refusals ---


@pytest.mark.parametrize(
    ("clients", "match"),
    [
        (torch.zeros(300), "one number for each node"),
        (torch.zeros(300, 1, dtype=torch.int64), "one number for each node"),
        (torch.full((300,), -1), "one number for each node"),
        (torch.zeros(299, dtype=torch.int64), "disagree on the number of nodes"),
        (torch.arange(300) % 2 * 2, "1 of 3, first client 1"),
    ],
    ids=["floats", "matrix", "negative", "short", "gap"],
)
def test_what_says_no_client_is_refused(clients, match):
    with pytest.raises(DataError, match=match):
        source(csbm(), clients)


def test_a_client_without_a_training_node_is_refused():
    data = csbm()
    clients = torch.zeros(300, dtype=torch.int64)
    clients[~data.train_mask] = 1
    with pytest.raises(DataError, match=r"without a training node; got: 1 of 2, first client 1"):
        source(data, clients)


# --- in a run ---


def test_inductive_training_takes_clients_of_training_nodes():
    data = csbm()
    clients = torch.arange(300) % 3
    with pytest.raises(DataError, match=r"clients\[data.train_mask\]"):
        source(training_graph(data), clients)
    every = source(training_graph(data), clients[data.train_mask])
    assert int(every.client_samples.sum()) == int(data.train_mask.sum())
    assert one(every, 0).targets is None


def test_each_subnet_of_a_run_trains_on_its_client():
    data, clients = csbm(), torch.arange(300) % 2
    trainer = GISTTrainer(
        GCN(8, 8, 3),
        data,
        num_subnets=2,
        rounds=2,
        local_steps=2,
        batches=ClientGraphs(clients=clients),
        executor="serial",
        progress=False,
    )
    result = trainer.fit()
    assert len(result.history) == 2
    described = json.loads(json.dumps(trainer.describe()["batches"]))
    assert described["num_clients"] == 2
    other = source(data, 1 - clients).describe()
    assert {**other, "clients": None} == {**described, "clients": None} != described


# --- clusters, dealt to clients ---


@pytest.mark.parametrize("method", ["metis", "random"])
@pytest.mark.parametrize("each", [1, 8])
def test_clusters_are_dealt_whole_and_those_with_training_nodes_evenly(method, each):
    data = csbm(train_share=0.1)
    arguments = {"clusters_per_client": each, "method": method}
    clients = spread_clusters(data, 5, seed=1, **arguments)
    assert clients.dtype == torch.int64
    assert torch.equal(clients, spread_clusters(data, 5, seed=1, **arguments))
    assert not torch.equal(clients, spread_clusters(data, 5, seed=2, **arguments))
    cut = cut_graph(data.adjacency, 5 * each, method=method)
    pairs = torch.unique(torch.stack([cut, clients]), dim=1)
    assert pairs.size(1) == len(torch.unique(cut))  # a cluster has one client
    labelled = torch.isin(pairs[0], cut[data.train_mask])
    assert bool(labelled.all()) == (each == 1)
    for chosen in (labelled, labelled | True):
        dealt = torch.bincount(pairs[1][chosen], minlength=5)
        assert int(dealt.max() - dealt.min()) <= 1
    assert int(source(data, clients).client_samples.min()) > 0


def test_clusters_keep_more_edges_than_nodes_at_random():
    data = load_dataset("digits")
    kept = [
        source(data, spread_clusters(data, 5, clusters_per_client=each, method=method)).edges_within
        for method, each in (("metis", 1), ("metis", 8), ("random", 1))
    ]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] > 0.8
    assert kept[-1] == pytest.approx(1 / 5, abs=0.03)


def test_fewer_labelled_clusters_than_clients_are_refused():
    data = load_dataset("digits")  # 50 training nodes
    with pytest.raises(DataError, match="fewer clusters with training nodes than clients"):
        spread_clusters(data, 51, clusters_per_client=2, method="random")
    with pytest.raises(ConfigError, match="cut into that many parts"):
        spread_clusters(data, 1000, clusters_per_client=2)
