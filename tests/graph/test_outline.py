"""An outline has the sizes of what it stands for."""

from __future__ import annotations

import pytest
import torch

from gist import Cluster, GraphData, GraphShape, load_dataset
from gist.costs.rehearsal import Stage
from gist.errors import ConfigError
from gist.graph.adjacency import Adjacency
from gist.graph.objective import GraphObjective
from gist.graph.outline import OutlineGraph, OutlineObjective, outline_data

CPU = torch.device("cpu")


def small(**options) -> GraphData:
    return load_dataset("csbm", num_nodes=120, num_features=6, num_classes=3, **options)


def bytes_of(graph: Adjacency) -> dict[str, int]:
    """Of everything that the graph keeps for a GCN and a GraphSAGE."""
    kept = {}
    for form in ("gcn", "mean"):
        matrix = graph.matrix(form)
        for side in ("rows", "columns"):
            csr = getattr(matrix, side)
            for part in ("indptr", "indices", "values"):
                kept[f"{form}.{side}.{part}"] = getattr(csr, part).nbytes
    return kept


def test_sizes_of_a_graph():
    data = small(average_degree=4)
    shape = GraphShape.of(data)
    assert (shape.num_nodes, shape.num_edges) == (120, data.num_edges)
    assert (shape.num_features, shape.num_classes, shape.task) == (6, 3, "multiclass")
    assert shape.training_nodes == int(data.train_mask.sum())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("csbm", {"num_nodes": 300, "average_degree": 7.3, "num_classes": 5, "train_share": 0.3}),
        ("csbm", {"num_features": 4, "num_nodes": 200, "num_classes": 2, "homophily": 0.5}),
        ("digits", {}),
        ("digits", {"neighbours": 4}),
    ],
)
def test_sizes_of_a_dataset_that_is_not_loaded(name, options):
    assert GraphShape.of_dataset(name, options) == GraphShape.of(load_dataset(name, **options))


def test_real_datasets_are_known_by_their_cards(monkeypatch):
    monkeypatch.setattr("gist.graph.outline.load_dataset", lambda *_, **__: pytest.fail("loaded"))
    shape = GraphShape.of_dataset("cora", {"normalize_features": False})
    assert (shape.num_nodes, shape.num_edges, shape.num_features) == (2708, 10556, 1433)
    assert (shape.num_classes, shape.training_nodes, shape.name) == (7, 140, "cora")


def test_what_is_unknown_is_refused():
    with pytest.raises(ConfigError, match="unknown dataset"):
        GraphShape.of_dataset("corra")
    with pytest.raises(ConfigError, match="options that csbm does not have"):
        GraphShape.of_dataset("csbm", {"num_node": 3})
    with pytest.raises(ConfigError, match="num_nodes must be a whole number from 1 on"):
        GraphShape(num_nodes=0, num_edges=1, num_features=1, num_classes=1)


@pytest.mark.parametrize("weighted", [False, True])
def test_an_outlined_graph_keeps_as_many_bytes(weighted):
    real = small().adjacency
    if weighted:
        real = Adjacency(real.edge_index, real.num_nodes, torch.ones(real.num_edges))
    assert real.is_symmetric
    assert not real.has_self_loops
    with Stage(CPU).computing():
        outlined = bytes_of(OutlineGraph.like(real, torch.float32))
    assert outlined == bytes_of(real)


@pytest.mark.parametrize("task", ["multiclass", "multilabel", "binary"])
def test_outlined_data_has_the_tensors_of_data(task):
    shape = GraphShape(num_nodes=9, num_edges=4, num_features=2, num_classes=3, task=task)
    data = outline_data(shape, CPU)
    labels = {"multiclass": (9,), "multilabel": (9, 3), "binary": (9,)}[task]
    assert data.y.shape == labels
    assert data.y.is_floating_point() == (task != "multiclass")
    assert data.x.shape == (9, 2)
    assert data.edge_index.shape == (2, 4)
    assert data.adjacency.is_constant(data.x)


def test_a_part_has_its_share_rounded_up():
    shape = GraphShape(
        num_nodes=10, num_edges=33, num_features=2, num_classes=3, train_nodes=5, weighted=True
    )
    part = shape.part(0.25)
    assert (part.num_nodes, part.num_edges, part.training_nodes) == (3, 9, 2)
    assert (part.num_features, part.weighted) == (2, True)
    assert shape.part(0.5, only_training=True).training_nodes == 5


def test_a_step_on_clusters_is_one_of_average_size():
    data = small()
    real = GraphObjective(data, CPU, Cluster(num_parts=6, parts_per_batch=2, method="random"))
    shape = GraphShape.of(data)
    outline = OutlineObjective.of_shape(shape, CPU, clusters=6, clusters_per_batch=2)
    batches = list(real.batches(seed=0, round=0, subnet=0, steps=3))
    assert outline.steps_per_epoch == real.steps_per_epoch == 3
    assert outline.batch.x.size(0) == sum(batch.x.size(0) for batch in batches) / 3
    assert len(outline.batch.y) >= sum(len(batch.y) for batch in batches) / 3
    edges = [batch.graph.num_edges for batch in batches]
    assert max(edges) <= outline.batch.graph.num_edges == data.num_edges / 3
    assert outline.rebuilds


def test_inductive_training_sees_the_training_nodes_alone():
    data = small()
    shape = GraphShape.of(data)
    outline = OutlineObjective.of_shape(shape, CPU, inductive=True)
    real = GraphObjective(data, CPU, inductive=True)
    (batch,) = real.batches(seed=0, round=0, subnet=0, steps=1)
    assert outline.batch.x.shape == batch.x.shape
    assert len(outline.batch.y) == len(batch.y)
    assert outline.batch.graph.num_edges >= batch.graph.num_edges
    assert outline.data.num_nodes == data.num_nodes


@pytest.mark.parametrize(
    "recipe", [None, Cluster(num_parts=4, method="random")], ids=["full", "clusters"]
)
def test_an_objective_that_is_there_is_outlined_by_its_largest_batch(recipe):
    real = GraphObjective(small(), CPU, recipe)
    batch = real.source.largest_batch()
    for other in real.batches(seed=0, round=0, subnet=0, steps=real.steps_per_epoch):
        assert other.graph.num_edges <= batch.graph.num_edges
    outline = OutlineObjective.like(real)()
    assert outline.batch.x.shape == batch.x.shape
    assert outline.batch.y.shape == batch.y.shape
    assert outline.batch.graph.num_edges == batch.graph.num_edges
    assert outline.steps_per_epoch == real.steps_per_epoch
    assert outline.rebuilds == (recipe is not None)
    (first, second) = outline.batches(seed=0, round=0, subnet=0, steps=2)
    assert first is second
