"""GraphData: what it takes, what it makes of it, and what it refuses."""

from __future__ import annotations

import copy
import dataclasses

import networkx as nx
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_geometric.data import Data, HeteroData
from torch_geometric.utils import is_undirected

from gist.errors import ConfigError, DataError
from gist.graph.adjacency import Adjacency
from gist.graph.convert import missing_reverses
from gist.graph.data import GraphData

NAN = float("nan")
PATH = np.array([[0, 1, 1, 2, 2, 3], [1, 0, 2, 1, 3, 2]])  # 0 - 1 - 2 - 3


def build(edges=PATH, **changes):
    """A path of four nodes with three classes' worth of labels, changed as asked."""
    given_ = {
        "x": np.arange(8.0).reshape(4, 2),
        "y": np.array([0, 1, 2, 0]),
        "train": [0, 1],
        "val": [2],
        "test": [3],
    }
    return GraphData.from_edges(edges, **(given_ | changes))


def refused(match, error=DataError, **changes):
    with pytest.raises(error, match=match):
        build(**changes)


def direct(**changes):
    """The same graph through the constructor itself."""
    data = build()
    values = {field.name: getattr(data, field.name) for field in dataclasses.fields(data)}
    return GraphData(**(values | changes))


def elsewhere(adjacency, device="meta"):
    """The edges on a device without values, which the constructor could not check."""
    moved = copy.copy(adjacency)
    moved.edge_index = moved.edge_index.to(device)
    if moved.edge_weight is not None:
        moved.edge_weight = moved.edge_weight.to(device)
    return moved


# --- what it holds ---------------------------------------------------------------------------


def test_properties_and_repr():
    data = build(name="path")
    assert (data.num_nodes, data.num_edges, data.num_features, data.num_classes) == (4, 6, 2, 3)
    assert (data.task, data.metric, data.directed, data.edge_weight) == (
        "multiclass",
        "accuracy",
        False,
        None,
    )
    assert data.edge_index.tolist() == PATH.tolist()
    assert data.mask("train").tolist() == [True, True, False, False]
    assert repr(data) == (
        "GraphData('path', 4 nodes, 6 edges, 2 features, multiclass with 3 outputs, accuracy, "
        "split 2 / 1 / 1, torch.float32 on cpu)"
    )
    with pytest.raises(ConfigError, match="unknown split; got: 'valid'; expected: train or val"):
        data.mask("valid")


def test_features_become_contiguous_floats_and_products_are_remembered():
    data = build(x=torch.arange(8).reshape(2, 4).T)
    assert data.x.dtype == torch.float32
    assert data.x.is_contiguous()
    assert data.adjacency.is_constant(data.x)
    assert data.adjacency.propagate("gcn", data.x) is data.adjacency.propagate("gcn", data.x)


def test_tensors_keep_double_precision_and_arrays_take_the_default():
    assert build(x=torch.ones(4, 2, dtype=torch.float64)).x.dtype == torch.float64
    assert build(x=np.ones((4, 2))).x.dtype == torch.float32
    assert build(x=torch.ones(4, 2, dtype=torch.bfloat16)).x.dtype == torch.float32


def test_views_that_torch_cannot_share_are_copied():
    locked = np.ones((4, 2))
    locked.flags.writeable = False
    assert build(x=locked).num_features == 2
    assert build(y=np.array([0, 2, 1, 0])[::-1]).y.tolist() == [0, 1, 2, 0]


def test_gradients_do_not_reach_the_features():
    assert not build(x=torch.ones(4, 2, requires_grad=True)).x.requires_grad


def test_to_the_same_device_is_itself():
    data = build()
    assert data.to("cpu") is data
    assert data.to(torch.device("cpu")) is data


def test_to_another_device_moves_every_tensor(monkeypatch):
    monkeypatch.setattr(Adjacency, "to", elsewhere)
    moved = build(edge_weight=np.ones(6)).to("meta")
    for field in dataclasses.fields(moved):
        value = getattr(moved, field.name)
        if isinstance(value, torch.Tensor | Adjacency):
            assert value.device.type == "meta", field.name
    assert moved.edge_weight.device.type == "meta"
    assert moved.adjacency.is_constant(moved.x)


def test_fingerprint_is_stable_and_sees_every_part():
    data = build()
    assert data.fingerprint() == build(name="other").fingerprint()
    assert data.fingerprint() == build(edges=PATH[:, ::-1]).fingerprint()
    assert data.fingerprint().startswith("01a76d8957a406f7")
    assert len(data.fingerprint()) == 64
    others = [
        build(x=np.ones((4, 2))),
        build(y=np.array([0, 1, 2, 1])),
        build(train=[0], test=[3, 1]),
        build(edge_weight=np.ones(6)),
        build(edges=PATH[:, :4]),
        build(directed=True),
        build(num_classes=4),
    ]
    assert len({data.fingerprint(), *(other.fingerprint() for other in others)}) == 8


# --- labels and tasks ------------------------------------------------------------------------


def test_two_classes_stay_multiclass_unless_asked():
    two = np.array([0, 1, 1, 0])
    assert (build(y=two).task, build(y=two).num_classes) == ("multiclass", 2)
    data = build(y=two, task="binary")
    assert (data.num_classes, data.metric, data.y.dtype) == (1, "accuracy", torch.float32)
    with pytest.raises(DataError, match="ROC-AUC is undefined on the val split"):
        build(y=two, task="binary", metric="roc_auc")


@pytest.mark.parametrize("kind", [np.int64, np.float64, bool])
def test_rows_of_labels_are_multilabel(kind):
    y = np.array([[0, 1], [1, 1], [0, 0], [1, 0]], dtype=kind)
    data = build(y=y)
    assert (data.task, data.num_classes, data.metric) == ("multilabel", 2, "micro_f1")
    assert data.y.dtype == torch.float32


def test_one_column_of_labels_is_squeezed():
    assert build(y=np.array([[0], [1], [2], [0]])).y.shape == (4,)
    assert build(y=np.array([[0], [1], [1], [0]]), task="multilabel").y.shape == (4, 1)


def test_whole_floats_are_class_numbers():
    assert build(y=np.array([0.0, 1.0, 2.0, 0.0])).y.dtype == torch.int64


@pytest.mark.parametrize("missing", [-1.0, NAN])
def test_nodes_outside_the_splits_need_no_label(missing):
    assert build(y=np.array([missing, 1, 2, 0]), train=[1]).num_classes == 3
    assert build(y=np.array([missing, 1, 0, 0]), train=[1], task="binary").num_classes == 1
    rows = np.array([[missing, 0], [1, 0], [0, 1], [1, 1]])
    assert build(y=rows, train=[1]).num_classes == 2


def test_more_classes_than_labels_seen():
    assert build(num_classes=7).num_classes == 7


@pytest.mark.parametrize(
    ("match", "changes"),
    [
        (r"no label; got: NaN .*1 node, first node 0", {"task": "binary", "y": [NAN, 1, 0, 0]}),
        (r"no label; got: -1 .*2 nodes, first node 1", {"y": [0, -1, -1, 1]}),
        (r"no label; got: -1 .*1 node, first node 2", {"y": [0.0, 1.0, NAN, 1.0]}),
        (r"out of range.*got: -2 .*first node 3; expected: 0 to 2", {"y": [0, 1, 2, -2]}),
        (r"out of range.*got: 2 .*first node 2; expected: 0 to 1", {"num_classes": 2}),
        (r"out of range.*got: 2 .*expected: 0 or 1", {"task": "binary"}),
        (r"out of range.*got: 0\.5 .*first node 1", {"y": [[0, 1], [0.5, 1], [0, 0], [1, 1]]}),
        (r"whole numbers; got: 0\.5.*regression", {"y": [0.0, 0.5, 1.0, 1.0]}),
        (r"whole numbers; got: inf", {"y": [0.0, float("inf"), 1.0, 1.0]}),
        (r"fewer nodes than classes; got: largest label 900.*unique", {"y": [0, 1, 2, 900]}),
        (r"num_classes does not fit.*got: 1; expected: at least 2", {"y": [0, 0, 0, 0]}),
        (r"num_classes does not fit.*got: 2; expected: 1", {"task": "binary", "num_classes": 2}),
        (r"labels do not fit.*num_classes", {"y": [[0, 1]] * 4, "num_classes": 3}),
        (r"fit the task multiclass; got: .*\(4, 2\)", {"y": [[0, 1]] * 4, "task": "multiclass"}),
        (r"fit the task multilabel", {"task": "multilabel"}),
        (r"y and x disagree on the number of nodes; got: 3; expected: 4", {"y": [0, 1, 2]}),
        (r"labels cannot be read.*got: list.*return_inverse", {"y": ["a", "b", "c", "d"]}),
        (r"labels cannot be read.*return_inverse", {"y": np.array(["a", "b", "c", "d"])}),
    ],
)
def test_labels_that_are_refused(match, changes):
    refused(match, **changes)


@pytest.mark.parametrize(
    ("match", "changes"),
    [
        (
            "metric does not fit the task multiclass; got: 'roc_auc'.*accuracy",
            {"metric": "roc_auc"},
        ),
        ("metric does not fit.*micro-F1 of a multiclass task is", {"metric": "micro_f1"}),
        (
            "metric does not fit the task multilabel; got: 'accuracy'",
            {"y": [[0, 1]] * 4, "metric": "accuracy"},
        ),
        ("unknown task; got: 'regression'; expected: multiclass or", {"task": "regression"}),
        ("symmetrised graph is not directed", {"directed": True, "symmetrize": True}),
    ],
)
def test_settings_that_are_refused(match, changes):
    refused(match, ConfigError, **changes)


# --- features --------------------------------------------------------------------------------


def test_bad_features_are_counted_and_located():
    x = np.ones((4, 2))
    x[1:3, 0] = NAN
    x[2, 1] = np.inf
    refused("features hold NaN or infinite values; got: 2 nodes, first node 1", x=x)


def test_large_finite_features_pass_although_their_sum_overflows():
    assert build(x=torch.full((4, 2), 3e38)).num_nodes == 4


@pytest.mark.parametrize(
    ("match", "x"),
    [
        (r"x must hold one row.*shape \(4,\).*x\[:, None\]", np.ones(4)),
        (r"x must hold one row.*shape \(4, 0\)", np.ones((4, 0))),
        (r"x must hold one row.*complex", np.ones((4, 2), dtype=complex)),
        (r"features cannot be read.*csr.*toarray", sp.eye_array(4, format="csr")),
        (r"features cannot be read.*to_dense", torch.eye(4).to_sparse()),
        (r"features cannot be read.*got: list", [[1.0], [1.0, 2.0]]),
        (r"edges out of range", np.ones((3, 2))),
        (r"y and x disagree", np.ones((5, 2))),
    ],
)
def test_features_that_are_refused(match, x):
    refused(match, x=x, train=[0], val=[1], test=[2])


def test_zero_nodes_are_refused():
    refused(
        r"at least one node.*shape \(0, 2\)",
        edges=np.zeros((2, 0), dtype=int),
        x=np.ones((0, 2)),
        y=np.zeros(0, dtype=int),
        train=[],
        val=[],
        test=[],
    )


# --- splits ----------------------------------------------------------------------------------


def test_splits_as_masks_or_indices():
    masks = build(train=np.array([1, 1, 0, 0], dtype=bool), val=torch.tensor([2]), test=(3,))
    assert masks.fingerprint() == build().fingerprint()


@pytest.mark.parametrize(
    ("match", "changes"),
    [
        ("the train split is empty; got: 0 nodes", {"train": []}),
        ("the val split is empty", {"val": np.zeros(4, dtype=bool)}),
        ("the test split is empty", {"test": torch.zeros(4, dtype=torch.bool)}),
        ("the val split shares nodes.*leak; got: 1 node, first node 1", {"val": [1, 2]}),
        ("the test split shares nodes.*2 nodes, first node 0", {"test": [0, 2, 3]}),
        (
            "the test split names nodes that do not exist; got: indices between 3 and 4",
            {"test": [3, 4]},
        ),
        ("the test split names nodes that do not exist", {"test": [-1]}),
        ("the train split names a node more than once.*0/1 mask", {"train": [1, 1, 0, 0]}),
        (r"the train split must say.*shape \(3,\).*\(4,\)", {"train": [True, False, True]}),
        (r"the train split must say.*float64", {"train": [0.0, 1.0]}),
    ],
)
def test_splits_that_are_refused(match, changes):
    refused(match, **changes)


# --- edges -----------------------------------------------------------------------------------


def test_duplicates_and_self_loops_are_kept():
    edges = np.array([[0, 0, 1, 1, 2], [1, 1, 0, 0, 2]])
    assert build(edges=edges).edge_index.tolist() == edges.tolist()


def test_a_graph_without_edges():
    assert build(edges=np.zeros((2, 0), dtype=np.int64)).num_edges == 0


def test_edges_out_of_range_are_refused():
    refused("edges out of range.*0 to 3", edges=np.array([[0, 4], [4, 0]]))


def test_a_directed_graph_is_refused_counted_and_remedied():
    arrows = np.array([[0, 1, 2, 2], [1, 0, 3, 0]])
    refused("without a reverse; got: 2 of 4 edges.*symmetrize=True.*directed=True", edges=arrows)
    assert build(edges=arrows, directed=True).edge_index.tolist() == [[0, 1, 2, 2], [1, 0, 0, 3]]
    assert "directed" in repr(build(edges=arrows, directed=True))
    data = build(edges=arrows, symmetrize=True)
    assert data.edge_index.tolist() == [[0, 0, 1, 2, 2, 3], [1, 2, 0, 0, 3, 2]]
    assert not data.directed


def test_directions_of_unequal_weight_are_refused():
    edges, weight = np.array([[0, 1], [1, 0]]), np.array([2.0, 3.0])
    refused("of the same weight; got: 2 of 2", edges=edges, edge_weight=weight)
    refused("different weights.*average", edges=edges, edge_weight=weight, symmetrize=True)


def test_weights_take_the_precision_of_the_features():
    assert build(edge_weight=np.ones(6, dtype=int)).edge_weight.dtype == torch.float32
    x = torch.ones(4, 2, dtype=torch.float64)
    assert build(x=x, edge_weight=np.ones(6)).edge_weight.dtype == torch.float64


def test_bad_weights_are_refused():
    refused("edge_weight holds NaN", edge_weight=np.full(6, NAN))
    refused(r"one floating-point number per edge.*\(5,\)", edge_weight=np.ones(5))


edge_lists = st.integers(1, 9).flatmap(
    lambda n: st.tuples(
        st.just(n),
        st.lists(
            st.tuples(
                st.integers(0, n - 1), st.integers(0, n - 1), st.sampled_from([-1.0, 1.0, 2.0])
            ),
            max_size=30,
        ),
    )
)


@settings(deadline=None)
@given(edge_lists, st.booleans())
def test_symmetrising_keeps_the_edges_adds_the_fewest_and_is_then_done(graph, weighted):
    num_nodes, edges = graph
    index = torch.tensor([(u, v) for u, v, _ in edges], dtype=torch.long).reshape(-1, 2).T
    weight = torch.tensor([w for *_, w in edges], dtype=torch.float32) if weighted else None
    reversed_ = missing_reverses(index, weight, num_nodes)
    added, values = index[:, reversed_].flip(0), weight[reversed_] if weighted else None
    both = torch.cat([index, added], dim=1)
    weights = torch.cat([weight, values]) if weighted else None
    assert len(missing_reverses(both, weights, num_nodes)) == 0
    assert Adjacency(both, num_nodes, weights).is_symmetric
    # each added edge is the reverse of one given, at most once for each
    kept = list(zip(*index.tolist(), (weight if weighted else index[0] * 0).tolist(), strict=True))
    for u, v, w in zip(
        *added.tolist(), (values if weighted else added[0] * 0).tolist(), strict=True
    ):
        kept.remove((v, u, w))


# --- the constructor -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("match", "changes"),
    [
        ("x must be a tensor; got: ndarray.*from_edges", {"x": np.ones((4, 2))}),
        ("adjacency must hold the edges; got: ndarray", {"adjacency": PATH}),
        ("adjacency and x disagree.*got: 4; expected: 3", {"x": torch.ones(3, 2)}),
        (
            r"train_mask must be a boolean mask; got: torch\.int64",
            {"train_mask": torch.ones(4).long()},
        ),
        (r"val_mask and x disagree.*got: 3", {"val_mask": torch.ones(3, dtype=torch.bool)}),
        (r"labels do not fit.*float32.*int64 \[N\]", {"y": torch.zeros(4)}),
        (r"labels do not fit.*int64.*float \[N\]", {"task": "binary", "num_classes": 1}),
        (
            "y is not on the device of x; got: meta; expected: cpu",
            {"y": torch.ones(4, device="meta")},
        ),
        ("adjacency is not on the device", {"adjacency": elsewhere(build().adjacency)}),
    ],
)
def test_the_constructor_refuses(match, changes):
    with pytest.raises(DataError, match=match):
        direct(**changes)


def test_the_constructor_takes_what_it_gives():
    assert direct().fingerprint() == build().fingerprint()


# --- PyG -------------------------------------------------------------------------------------


def pyg(**changes):
    data = build()
    values = {"x": data.x, "edge_index": data.edge_index, "y": data.y}
    masks = {f"{split}_mask": data.mask(split) for split in ("train", "val", "test")}
    return Data(**(values | masks | changes))


def test_from_pyg():
    assert GraphData.from_pyg(pyg()).fingerprint() == build().fingerprint()
    column = GraphData.from_pyg(pyg(y=build().y[:, None]))
    assert column.fingerprint() == build().fingerprint()


@pytest.mark.parametrize("name", ["edge_weight", "edge_attr"])
def test_from_pyg_takes_weights(name):
    weight = torch.tensor([1.0, 1, 2, 2, 3, 3])
    assert GraphData.from_pyg(pyg(**{name: weight})).edge_weight.tolist() == weight.tolist()
    data = pyg(edge_attr=weight[:, None])
    assert GraphData.from_pyg(data).edge_weight.tolist() == weight.tolist()
    assert GraphData.from_pyg(data, edge_weight=None).edge_weight is None


def test_from_pyg_overrides():
    data = GraphData.from_pyg(pyg(train_mask=None, y=pyg().y % 2), train=[0], task="binary")
    assert (data.task, int(data.train_mask.sum())) == ("binary", 1)


def test_from_pyg_asks_for_a_column_of_several_splits():
    masks = torch.stack([build().train_mask, torch.tensor([True, False, False, False])], dim=1)
    with pytest.raises(DataError, match=r"train_mask holds 2 splits.*split=0 to split=1"):
        GraphData.from_pyg(pyg(train_mask=masks))
    assert int(GraphData.from_pyg(pyg(train_mask=masks), split=1).train_mask.sum()) == 1
    with pytest.raises(ConfigError, match="split is not a column of train_mask; got: 2"):
        GraphData.from_pyg(pyg(train_mask=masks), split=2)
    assert GraphData.from_pyg(pyg(train_mask=masks[:, :1])).num_nodes == 4


def test_from_pyg_refuses():
    with pytest.raises(DataError, match=r"has no train_mask;.*from_pyg as train="):
        GraphData.from_pyg(pyg(train_mask=None))
    with pytest.raises(DataError, match="has no edge_index, x, y"):
        GraphData.from_pyg(Data(), train=[0], val=[1], test=[2])
    with pytest.raises(DataError, match=r"one homogeneous graph; got: HeteroData.*to_homogeneous"):
        GraphData.from_pyg(HeteroData())


# --- scipy -----------------------------------------------------------------------------------

REST = {"train": [0, 1], "val": [2], "test": [3]}
FEATURES = np.arange(8.0).reshape(4, 2)


def test_from_scipy_reads_entry_i_j_as_the_edge_from_i_to_j():
    matrix = sp.coo_array((np.ones(1), ([0], [2])), shape=(4, 4))
    data = GraphData.from_scipy(matrix, FEATURES, [0, 1, 2, 0], directed=True, **REST)
    assert data.edge_index.tolist() == [[0], [2]]
    assert data.edge_weight is None
    weighted = GraphData.from_scipy(matrix * 2, FEATURES, [0, 1, 2, 0], directed=True, **REST)
    assert weighted.edge_weight.tolist() == [2.0]


@pytest.mark.parametrize("form", [sp.csr_matrix, sp.csc_array, sp.coo_array, sp.lil_array])
def test_from_scipy_takes_any_sparse_form(form):
    matrix = form(nx.to_scipy_sparse_array(nx.path_graph(4)).astype(bool))
    data = GraphData.from_scipy(matrix, FEATURES, [0, 1, 2, 0], **REST)
    assert sorted(data.edge_index.T.tolist()) == sorted(PATH.T.tolist())
    assert data.edge_weight is None


def test_from_scipy_refuses():
    with pytest.raises(DataError, match=r"square sparse matrix; got: ndarray.*csr_array"):
        GraphData.from_scipy(np.eye(4), FEATURES, [0, 1, 2, 0], **REST)
    with pytest.raises(DataError, match=r"square sparse matrix; got: .*\(3, 4\)"):
        GraphData.from_scipy(sp.csr_array((3, 4)), FEATURES, [0, 1, 2, 0], **REST)
    with pytest.raises(DataError, match=r"x and the matrix disagree.*got: 4; expected: 3"):
        GraphData.from_scipy(sp.csr_array((3, 3)), FEATURES, [0, 1, 2, 0], **REST)


# --- networkx --------------------------------------------------------------------------------


def test_from_networkx_with_odd_labels_and_attributes():
    graph = nx.Graph()
    for i, node in enumerate(["c", (1, 2), 7, frozenset()]):
        graph.add_node(node, h=[i, 1.0], label=i % 3, first=i < 2, second=i == 2)
    graph.add_edges_from([("c", 7), (7, frozenset())])
    graph.add_edge("c", "c")
    data = GraphData.from_networkx(
        graph, x="h", y="label", train="first", val="second", test=[3], name="odd"
    )
    assert data.x[:, 0].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert data.edge_index.tolist() == [[0, 0, 2, 2, 3], [0, 2, 0, 3, 2]]
    assert data.edge_weight is None
    assert data.name == "odd"


@settings(deadline=None, max_examples=30)
@given(st.integers(4, 12), st.integers(0, 1000), st.booleans(), st.booleans())
def test_from_networkx_agrees_with_networkx(n, seed, directed, multi):
    simple = nx.gnp_random_graph(n, 0.3, seed=seed, directed=directed)
    kind = {(0, 0): nx.Graph, (1, 0): nx.DiGraph, (0, 1): nx.MultiGraph, (1, 1): nx.MultiDiGraph}
    graph = kind[directed, multi](simple)
    for i, (u, v) in enumerate(simple.edges):
        graph.add_edge(u, v, weight=1.0 + i) if multi else graph[u][v].update(weight=1.0 + i)
    if multi:
        graph.remove_edges_from([(u, v, 0) for u, v in simple.edges])
    data = GraphData.from_networkx(
        graph,
        x=np.ones((n, 1)),
        y=np.arange(n) % 2,
        train=[0],
        val=[1],
        test=[2],
        directed=directed,
    )
    expected = nx.to_numpy_array(graph)  # row i to column j
    assert np.array_equal(data.adjacency.to_scipy().toarray().T, expected)
    if not directed and data.num_edges:
        assert is_undirected(data.edge_index, data.edge_weight)


def test_a_digraph_must_be_symmetrised_or_declared():
    graph = nx.DiGraph([(0, 1), (1, 2), (2, 3)])
    arrays = {"x": FEATURES, "y": [0, 1, 2, 0], **REST}
    with pytest.raises(DataError, match="3 of 3 edges"):
        GraphData.from_networkx(graph, **arrays)
    assert GraphData.from_networkx(graph, symmetrize=True, **arrays).num_edges == 6


def test_from_networkx_refuses():
    graph = nx.path_graph(4)
    arrays = {"x": FEATURES, "y": [0, 1, 2, 0], **REST}
    with pytest.raises(DataError, match="reads a networkx graph; got: list"):
        GraphData.from_networkx([(0, 1)], **arrays)
    with pytest.raises(DataError, match=r"x and the graph disagree.*got: 4; expected: 5"):
        GraphData.from_networkx(nx.path_graph(5), **arrays)
    graph.nodes[0]["h"] = [1.0]
    with pytest.raises(DataError, match=r"attribute 'h' \(x\); got: 3 of 4, first 1"):
        GraphData.from_networkx(graph, **(arrays | {"x": "h"}))
    for node in graph:
        graph.nodes[node]["h"] = [1.0] * (node + 1)
    with pytest.raises(DataError, match=r"'h' \(x\) has unequal shapes"):
        GraphData.from_networkx(graph, **(arrays | {"x": "h"}))
    graph.edges[1, 2]["weight"] = 2.0
    with pytest.raises(DataError, match=r"without the attribute 'weight'; got: 2 of 3, first"):
        GraphData.from_networkx(graph, **arrays)
    assert GraphData.from_networkx(graph, weight=None, **arrays).edge_weight is None
    with pytest.raises(DataError, match=r"without the attribute 'wieght'; got: 3 of 3, first"):
        GraphData.from_networkx(graph, weight="wieght", **arrays)


@pytest.mark.parametrize("name", ["node {}".format, lambda i: (i, i)])
def test_splits_of_networkx_may_name_nodes(name):
    graph = nx.relabel_nodes(nx.path_graph(4), name)
    arrays = {"x": FEATURES, "y": [0, 1, 2, 0]}
    expected = GraphData.from_networkx(graph, **arrays, train=[3, 1], val=[0], test=[2])
    named = {"train": [name(3), name(1)], "val": (name(0),), "test": {name(2)}}
    got = GraphData.from_networkx(graph, **arrays, **named)
    assert got.fingerprint() == expected.fingerprint()
    with pytest.raises(DataError, match=r"test split names nodes.*got: 1 of 2, first 'node 9'"):
        GraphData.from_networkx(graph, **arrays, **(named | {"test": [name(2), "node 9"]}))


def test_whole_numbers_that_may_name_other_nodes_are_refused():
    graph = nx.relabel_nodes(nx.path_graph(4), lambda i: i + 1)
    arrays = {"x": FEATURES, "y": [0, 1, 2, 0]}
    with pytest.raises(DataError, match=r"train split may name nodes, or count them.*mask"):
        GraphData.from_networkx(graph, **arrays, train=[1, 2], val=[3], test=[4])
    masks = np.eye(4, dtype=bool)
    splits = {"train": masks[0], "val": masks[1].tolist(), "test": torch.tensor(masks[2])}
    assert GraphData.from_networkx(graph, **arrays, **splits).train_mask.tolist() == [
        True, False, False, False,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given_", "remedy"),
    [
        (nx.path_graph(4), "from_networkx"),
        ("graph.csv", "load reads a saved graph, GraphData.from_csv"),
        (HeteroData(), "to_homogeneous"),
    ],
)
def test_what_holds_no_graph_is_told_what_reads_it(given_, remedy):
    with pytest.raises(DataError, match=rf"expected: a GraphData.*OGB; remedy: .*{remedy}"):
        GraphData.of(given_)
