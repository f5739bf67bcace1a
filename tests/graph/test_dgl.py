"""DGL's graphs as input, and models of its layers: called, checked, trained as PyG's are."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import dgl
import pytest
import scipy.sparse as sp
import torch
import torch_geometric.nn as pyg
from dgl.nn import GATConv, GATv2Conv, GINConv, GraphConv, SAGEConv
from torch import Tensor, nn
from torch_geometric.data import Data

from gist import LADIES, Cluster, ConfigError, DataError, GISTTrainer, GraphData, PyGLoader
from gist.errors import MissingDependencyError, PartitionError
from gist.execution.memory import memory_in_use
from gist.graph.dgl_graph import import_dgl
from gist.graph.inference import forward_bytes, infer, infer_on_clusters, model_inputs
from gist.graph.layerwise import layerwise_obstacle
from gist.graph.sparse import SparseMatrix

NODES, FEATURES, CLASSES = 40, 6, 3


def ends(*, loops: bool = True) -> tuple[Tensor, Tensor]:
    """Both directions of some edges, each once, and a self loop at every node."""
    generator = torch.Generator().manual_seed(4)
    pairs = torch.randint(NODES, (2, 90), generator=generator)
    pairs = pairs[:, pairs[0] < pairs[1]].unique(dim=1)
    own = torch.arange(NODES if loops else 0)
    both = torch.cat([pairs, pairs.flip(0), torch.stack([own, own])], dim=1)
    source, target = both[:, torch.randperm(both.size(1), generator=generator)]
    return source, target


def graph(*, loops: bool = True, dtype: torch.dtype = torch.float64) -> Any:
    """A ``DGLGraph`` with everything that training needs."""
    generator = torch.Generator().manual_seed(5)
    g = dgl.graph(ends(loops=loops), num_nodes=NODES)
    g.ndata["label"] = torch.arange(NODES) % CLASSES
    g.ndata["feat"] = torch.randn(NODES, FEATURES, generator=generator, dtype=dtype)
    g.ndata["feat"][:, :CLASSES] += 3 * torch.eye(CLASSES, dtype=dtype)[g.ndata["label"]]
    third = torch.arange(NODES) // CLASSES % 3
    for i, split in enumerate(("train", "val", "test")):
        g.ndata[f"{split}_mask"] = third == i
    return g


class Net(nn.Module):
    """Two layers of DGL and a head."""

    def __init__(self, make: Callable[[int, int], nn.Module], width: int = 16) -> None:
        super().__init__()
        self.conv1, self.conv2 = make(FEATURES, width), make(width, width)
        self.head = nn.Linear(width, CLASSES)
        self.has_heads = isinstance(self.conv1, GATConv | GATv2Conv)

    def forward(self, g: Any, x: Tensor) -> Tensor:
        for conv in (self.conv1, self.conv2):
            x = conv(g, x)
            x = (x.flatten(-2) if self.has_heads else x).tanh()
        return self.head(x)


class PyGNet(Net):
    """The same of PyG."""

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:  # type: ignore[override]
        for conv in (self.conv1, self.conv2):
            x = conv(x, edge_index).tanh()
        return self.head(x)


CHAIN = ["conv1", "conv2", "head"]
SETTINGS: dict[str, Any] = {
    "wiring": CHAIN, "rounds": 3, "local_steps": 2, "seed": 3, "progress": False,
}  # fmt: skip


def net(make: Callable[[int, int], nn.Module], kind: type[Net] = Net) -> nn.Module:
    torch.manual_seed(0)
    return kind(make).double()


def sage(i: int, o: int) -> nn.Module:
    return SAGEConv(i, o, "mean")


def gcn(i: int, o: int) -> nn.Module:
    return GraphConv(i, o)


def gat(i: int, o: int) -> nn.Module:
    return GATConv(i, o // 4, num_heads=4)


# The graph


def test_the_same_graph_from_dgl_and_from_edges():
    g = graph()
    g.edata["weight"] = torch.rand(g.num_edges(), 1).double() + 1
    g.edata["kind"] = torch.rand(g.num_edges(), 2)
    names = {"x": g.ndata["feat"], "y": g.ndata["label"]}
    splits = {split: g.ndata[f"{split}_mask"] for split in ("train", "val", "test")}
    index, weight, kind = torch.stack(g.edges()), g.edata["weight"], g.edata["kind"]

    def expected(**more: Any) -> str:
        return GraphData.from_edges(index, **names, **splits, directed=True, **more).fingerprint()

    def got(**more: Any) -> str:
        return GraphData.from_dgl(g, directed=True, **more).fingerprint()

    assert got() == expected(edge_weight=weight[:, 0])
    assert got(weight=None) == got(edge_weight=None) == expected()
    assert got(weight=None, edge_attr="kind") == expected(edge_attr=kind)
    with pytest.raises(DataError, match=r"no edata 'wieght' \(weight\); got: entries"):
        got(weight="wieght")
    assert len({got(), got(weight=None), got(edge_attr="kind")}) == 3
    g.ndata["other"] = g.ndata["feat"] * 2
    names["x"] = g.ndata["other"]
    assert got(x="other", weight=None) == got(x=names["x"], weight=None) == expected()
    half = GraphData.from_dgl(g, train=[0, 1], val=[2], test=range(3, 9), directed=True)
    assert half.train_mask.nonzero()[:, 0].tolist() == [0, 1]
    assert GraphData.from_dgl(g, weight=None).adjacency.has_self_loops


def test_whatever_holds_a_graph():
    g = graph()
    splits = {f"{split}_mask": g.ndata[f"{split}_mask"] for split in ("train", "val", "test")}
    data = Data(g.ndata["feat"], torch.stack(g.edges()), y=g.ndata["label"], **splits)
    both = [GraphData.of(given) for given in (g, data)]
    assert both[0].fingerprint() == both[1].fingerprint()
    assert GraphData.of(both[0]) is both[0]
    g.__class__ = type("Mine", (dgl.DGLGraph,), {"__module__": "mine"})
    assert GraphData.of(g).fingerprint() == GraphData.from_dgl(g).fingerprint()
    with pytest.raises(DataError, match=r"got: list; expected: a GraphData, .*dataset\[0\]"):
        GraphData.of([g])


def heterograph() -> Any:
    return dgl.heterograph({("a", "to", "b"): ([0], [1]), ("b", "to", "a"): ([0], [1])})


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (heterograph, "one type of nodes.*node types a, b"),
        (lambda: dgl.to_block(graph()), "a block of a sampled layer.*batches="),
        (lambda: [graph()], r"reads one DGLGraph.*list.*dataset\[0\]"),
        (lambda: dgl.graph(ends()), "no ndata 'feat', 'label'.*x=, y=, train="),
    ],
    ids=["types", "block", "list", "bare"],
)
def test_what_is_no_graph_to_train_on(given, why):
    with pytest.raises(DataError, match=f"(?s){why}"):
        GraphData.from_dgl(given())


def test_entries_that_do_not_fit():
    with pytest.raises(DataError, match="no edata 'kind'"):
        GraphData.from_dgl(graph(), edge_attr="kind")
    with pytest.raises(DataError, match="x and the graph disagree on the number of nodes"):
        GraphData.from_dgl(graph(), x=torch.randn(NODES + 1, 2))


def test_a_graph_is_built_once_and_lists_the_edges_as_they_are_received():
    data = GraphData.of(graph())
    whole = data.adjacency
    part = whole.subgraph(torch.arange(20))
    for each in (whole, part):
        assert each.dgl is each.dgl
        assert torch.equal(each.dgl.edges()[0], each.rows.indices.long())
        assert torch.equal(each.dgl.in_degrees(), each.rows.counts().long())
    assert "dgl" in vars(whole)
    assert "dgl" not in vars(whole.to("meta"))


def test_what_a_model_writes_on_the_graph_does_not_stay():
    data = GraphData.of(graph())
    model = net(sage)
    (g, x), _ = model_inputs(model, data.x, data.adjacency)
    g.ndata["h"] = x
    assert not model_inputs(model, data.x, data.adjacency)[0][0].ndata


class OfMyOwn(nn.Module):
    takes_dgl_graph = True


def test_a_layer_that_is_not_of_dgl_may_ask_for_its_graph():
    data = GraphData.of(graph())
    for layer in (OfMyOwn(), nn.Sequential(OfMyOwn())):
        assert isinstance(model_inputs(layer, data.x, data.adjacency)[0][0], dgl.DGLGraph)
    assert model_inputs(nn.Identity(), data.x, data.adjacency)[0][0] is data.x


class Weighted(Net):
    def forward(self, g: Any, x: Tensor, edge_weight: Tensor | None = None) -> Tensor:
        for conv in (self.conv1, self.conv2):
            x = conv(g, x, edge_weight=edge_weight).tanh()
        return self.head(x)


def test_weights_of_edges_reach_the_layers_in_their_order():
    g = graph()
    g.edata["weight"] = torch.rand(g.num_edges()).double() + 1
    data = GraphData.from_dgl(g, directed=True)
    model = Weighted(gcn).double()
    args, keywords = model_inputs(model, data.x, data.adjacency)
    expected = model(g, data.x, edge_weight=g.edata["weight"])
    assert torch.allclose(model(*args, **keywords), expected, rtol=1e-12)
    with pytest.raises(DataError, match=r"not use edge weights.*add edge_weight=None to forw"):
        GISTTrainer(net(gcn), data, num_subnets=2, **SETTINGS)


def test_a_model_that_reads_the_graph_is_told_what_to_use():
    class Reads(Net):
        def forward(self, g: Any, x: Tensor) -> Tensor:
            return super().forward(g, g.ndata["feat"])

    with pytest.raises(PartitionError, match=r"got: KeyError: 'feat'; .*use the argument x"):
        GISTTrainer(net(gcn, Reads), graph(), num_subnets=2, **SETTINGS)


# The same layer, and the same run, in both libraries

Same = tuple[
    Callable[[int, int], nn.Module], Callable[[int, int], nn.Module], dict[str, tuple[str, bool]]
]
"""Layers of PyG and DGL; for each tensor of the first that of the second, and if transposed."""


HEADS = {"heads": 4, "add_self_loops": False}
LAYERS: dict[str, Same] = {
    "gcn": (pyg.GCNConv, gcn, {"lin.weight": ("weight", True), "bias": ("bias", False)}),
    "sage": (
        pyg.SAGEConv, sage,
        {"lin_l.weight": ("fc_neigh.weight", False), "lin_l.bias": ("fc_self.bias", False),
         "lin_r.weight": ("fc_self.weight", False)},
    ),
    "gat": (
        lambda i, o: pyg.GATConv(i, o // 4, **HEADS), gat,
        {"lin.weight": ("fc.weight", False), "att_src": ("attn_l", False),
         "att_dst": ("attn_r", False), "bias": ("bias", False)},
    ),
    "gat v2": (
        lambda i, o: pyg.GATv2Conv(i, o // 4, bias=False, **HEADS),
        lambda i, o: GATv2Conv(i, o // 4, num_heads=4, bias=False),
        {"lin_l.weight": ("fc_src.weight", False), "lin_r.weight": ("fc_dst.weight", False),
         "att": ("attn", False)},
    ),
    "gin": (
        lambda i, o: pyg.GINConv(nn.Linear(i, o)), lambda i, o: GINConv(nn.Linear(i, o)),
        {"nn.weight": ("apply_func.weight", False), "nn.bias": ("apply_func.bias", False)},
    ),
}  # fmt: skip


def tensors(name: str, theirs: nn.Module, ours: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Each parameter of a model of PyG, and the same one of a model of DGL."""
    first, second = (dict(model.named_parameters()) for model in (theirs, ours))
    for path in ("conv1.", "conv2."):
        for one, (other, transposed) in LAYERS[name][2].items():
            twin = second.pop(path + other).detach()
            yield first.pop(path + one).detach(), twin.t() if transposed else twin
    for one in ("head.weight", "head.bias"):
        yield first.pop(one).detach(), second.pop(one).detach()
    assert not first
    assert not second


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """A model of PyG and the same of DGL; no tensor is zero."""
    theirs, ours = net(LAYERS[name][0], PyGNet), net(LAYERS[name][1])
    for one, other in tensors(name, theirs, ours):
        one += 0.1 * torch.randn_like(one)
        other.copy_(one)
    return theirs, ours


def difference(name: str, theirs: nn.Module, ours: nn.Module) -> float:
    """The largest relative one between parameters."""
    both = tensors(name, theirs, ours)
    return max(float((one - other).abs().max() / one.abs().max()) for one, other in both)


@pytest.mark.parametrize("name", LAYERS)
def test_the_same_weights_give_the_same_scores_and_the_same_run(name):
    """Rounds with four subnets and rounds with two, one after the other and side by side."""
    data = GraphData.of(graph())
    settings = {**SETTINGS, "num_subnets": [(0.5, 4), (0.5, 2)], "rounds": 4}
    theirs, ours = pair(name)
    first, second = (infer(model, data.x, data.adjacency) for model in (theirs, ours))
    assert torch.allclose(first, second, rtol=1e-11, atol=1e-12)
    GISTTrainer(theirs, data, executor="serial", **settings).fit()
    for executor in ("serial", "stacked"):
        _, model = pair(name)
        run = GISTTrainer(model, data, executor=executor, **settings)
        assert run.executor.name == executor
        run.fit()
        assert difference(name, theirs, model) < 1e-9


def test_pooled_neighbours_side_by_side():
    """Whose sums are over units of their own, so that width is corrected within the layer."""
    models = []
    for executor in ("serial", "stacked"):
        model = net(lambda i, o: SAGEConv(i, o, "pool"))
        GISTTrainer(model, graph(), num_subnets=2, executor=executor, **SETTINGS).fit()
        models.append(model.state_dict())
    for name, tensor in models[0].items():
        assert torch.allclose(tensor, models[1][name], rtol=1e-9, atol=1e-11), name


# Trained as any other model


def test_a_run_on_a_graph_of_dgl_itself():
    """In single precision, with subnets of one channel per head: another kernel of DGL's."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        settings = {**SETTINGS, "rounds": 10, "local_steps": 5, "lr": 0.05}
        g = graph(dtype=torch.float32)
        run = GISTTrainer(net(gat).float(), g, num_subnets=4, **settings)
        result = run.fit()
    assert result.history[-1].train_loss < result.history[0].train_loss
    assert run.predict().shape == (NODES, CLASSES)
    assert run.wiring_error < 1e-5


class Examples(nn.Module):
    """As DGL's examples are written: dims counted from the start."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = GATConv(FEATURES, 4, 2), GATConv(8, CLASSES, 2)

    def forward(self, g: Any, x: Tensor) -> Tensor:
        return self.second(g, self.first(g, x).flatten(1).tanh()).mean(1)


def test_dims_that_are_counted_from_the_start_run_one_after_the_other(capsys):
    """The grouped form puts out [n, m, H, C]: flatten(1) would make one of all subnets."""
    settings = {**SETTINGS, "wiring": ["first", "second"], "num_subnets": 2}
    del settings["progress"]
    run = GISTTrainer(Examples().double(), graph(), **settings)
    assert run.executor.name == "serial"
    assert "serial execution (Examples cannot run on features [n, m, k]" in capsys.readouterr().err
    with pytest.warns(UserWarning, match=r"cannot be stacked.*from the end, as flatten\(-2\)"):
        GISTTrainer(Examples().double(), graph(), executor="stacked", **settings)
    run.fit()


@pytest.mark.parametrize("executor", ["serial", "stacked"])
def test_on_clusters_and_on_the_training_nodes_alone(executor):
    settings = {**SETTINGS, "clusters": 5, "clusters_per_batch": 2, "num_subnets": 2}
    run = GISTTrainer(net(gat), graph(), executor=executor, evaluation="clusters", **settings)
    assert run.fit().history[-1].val_metric is not None
    source = run.objective.source
    assert infer_on_clusters(run.model, source).shape == (NODES, CLASSES)
    GISTTrainer(net(sage), graph(loops=False), inductive=True, executor=executor, **settings).fit()


# Refused, or said


def test_nodes_without_an_edge_are_refused_before_training():
    """DGL raises in the middle of a step."""
    lonely = dgl.add_nodes(graph(), 1)
    lonely.ndata["train_mask"][-1] = False
    for name, make in (("GraphConv", gcn), ("GATConv", gat)):
        with pytest.raises(DataError, match=rf"conv1, a {name}.*1, first node {NODES}.*add_self_l"):
            GISTTrainer(net(make), lonely, num_subnets=2, **SETTINGS)
    GISTTrainer(net(sage), lonely, num_subnets=2, **SETTINGS)
    willing = net(lambda i, o: GraphConv(i, o, allow_zero_in_degree=True))
    GISTTrainer(willing, lonely, num_subnets=2, **SETTINGS).fit()


@pytest.mark.parametrize("batches", [{"clusters": 4}, {"inductive": True}], ids=["parts", "seen"])
def test_batches_need_self_loops(batches):
    looped, bare = graph(), graph(loops=False)
    GISTTrainer(net(gcn), looped, num_subnets=2, **batches, **SETTINGS).fit()
    with pytest.raises(DataError, match=r"a batch may leave without an edge.*a self loop at each"):
        GISTTrainer(net(gcn), bare, num_subnets=2, **batches, **SETTINGS)
    GISTTrainer(net(sage), bare, num_subnets=2, **batches, **SETTINGS)


def test_a_loader_that_leaves_out_self_loops():
    def without(data: Data) -> list[Data]:
        data.edge_index = data.edge_index[:, data.edge_index[0] < data.edge_index[1]]
        return [data]

    with pytest.raises(DataError, match="nodes of a batch without an edge"):
        GISTTrainer(net(gcn), graph(), num_subnets=2, batches=PyGLoader(without), **SETTINGS)


def test_what_dgl_cannot_do_is_refused():
    for setting in ({"precision": "bfloat16"}, {"compile": True}):
        with pytest.raises(ConfigError, match=f"autocast nor.*{next(iter(setting))}"):
            GISTTrainer(net(gcn), graph(), num_subnets=2, **setting, **SETTINGS)
    layers = LADIES(nodes_per_layer=(8, 8))
    with pytest.raises(ConfigError, match="LADIES samples the matrix"):
        GISTTrainer(net(gcn), graph(), num_subnets=2, batches=layers, **SETTINGS)
    full = Cluster(num_parts=4, normalization="full")
    with pytest.raises(ConfigError, match="normalises by these"):
        GISTTrainer(net(gcn), graph(), num_subnets=2, batches=full, **SETTINGS)
    with pytest.raises(ConfigError, match=r"cannot be evaluated layer by layer.*Net is none of"):
        GISTTrainer(net(gcn), graph(), num_subnets=2, evaluation="layerwise", **SETTINGS)
    with pytest.raises(PartitionError, match=r"got: .*expected: a model of \(graph, x\)"):
        GISTTrainer(Backwards(gcn).double(), graph(), num_subnets=2, **SETTINGS)


class Backwards(Net):
    def forward(self, x: Tensor, g: Any) -> Tensor:  # type: ignore[override]
        return self.head(self.conv2(g, self.conv1(g, x)))


def test_memory_is_not_checked_where_it_cannot_be_told(capsys):
    """A forward pass of DGL needs values: it is not rehearsed on shapes."""
    settings = {name: value for name, value in SETTINGS.items() if name != "progress"}
    wide = Net(sage, width=512).double()  # by the rough bound it does not fit
    limit = memory_in_use(torch.device("cpu")) + 2**25
    run = GISTTrainer(wide, graph(), num_subnets=2, memory_limit=limit, **settings)
    assert run.room.needed is None
    said = capsys.readouterr().err
    assert "not checked whether the run fits into memory" in said
    assert "DGL computes with values" in said


def test_a_pass_over_all_nodes_is_measured_on_small_graphs():
    data = GraphData.of(graph())
    model = net(sage)
    assert layerwise_obstacle(model) is not None
    assert forward_bytes(model, data.x, data.adjacency) > NODES * 12 * 8


def test_without_dgl_it_is_said_how_to_install_it(monkeypatch):
    matrix = SparseMatrix.from_scipy(sp.eye(3, format="csr"))
    monkeypatch.setenv("GIST_PRODUCT_KERNEL", "dgl")
    monkeypatch.setitem(sys.modules, "dgl", None)
    import_dgl.cache_clear()
    for ask in (lambda: GraphData.from_dgl(None), lambda: matrix @ torch.ones(3, 2)):
        with pytest.raises(
            MissingDependencyError, match=r"DGL cannot be imported.*gist-subnets\[dgl"
        ):
            ask()


@pytest.mark.slow
def test_dgl_is_imported_when_it_is_needed_and_quietly():
    """In a process of its own, where it cannot be at first."""
    code = """
import os, sys
sys.modules["dgl"] = None
import gist
from gist.graph.dgl_graph import import_dgl
from gist.partition.rules.registry import rule_of
try:
    gist.GraphData.from_dgl(None)
except gist.MissingDependencyError as error:
    assert "pip install 'gist-subnets[dgl]'" in str(error)
else:
    raise AssertionError("there is no DGL")
del sys.modules["dgl"]
import_dgl()
assert "DGLBACKEND" not in os.environ
from dgl.nn import GraphConv
class Mine(gist.Rule):
    def connect(self, layer): return None
try:
    gist.register_rule(GraphConv)(Mine)
except gist.PartitionError as error:
    assert "has a rule already" in str(error)
else:
    raise AssertionError("was not refused")
gist.register_rule(GraphConv, replace=True)(Mine)
assert type(rule_of(GraphConv(2, 3))) is Mine
"""
    clean = {name: value for name, value in os.environ.items() if name != "DGLBACKEND"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=clean, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "backend" not in done.stdout + done.stderr
