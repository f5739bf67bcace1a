"""Layer by layer against the plain forward pass, under limits of memory that are counted."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg
import torch_geometric.nn.models as zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import gist.nn
from gist import Adjacency
from gist.errors import ConfigError
from gist.graph import blockwise, layerwise
from gist.graph.hidden import Hidden
from gist.graph.inference import choose_inference, forward
from gist.graph.layerwise import Layerwise, layerwise_obstacle
from gist.graph.live_bytes import LiveBytes

FEATURES, CLASSES = 5, 3

SAGE = [
    {},
    {"root_weight": False},
    {"normalize": True},
    {"project": True},
    {"bias": False},
    {"aggr": "sum"},
    {"aggr": "max"},
    {"aggr": "std"},
    {"flow": "target_to_source"},
    {"project": True, "flow": "target_to_source"},
    {"aggr": "max", "flow": "target_to_source"},
]
GCN = [
    {},
    {"improved": True},
    {"add_self_loops": False},
    {"normalize": False},
    {"aggr": "mean"},
    {"normalize": False, "aggr": "mean"},
    {"flow": "target_to_source"},
    {"cached": True},
    {"bias": False},
]
GAT = [
    {"heads": 2},
    {"heads": 2, "v2": True},
    {"heads": 4, "v2": True, "share_weights": True},
    {"heads": 2, "residual": True},
    {"heads": 2, "v2": True, "residual": True},
    {"heads": 1, "add_self_loops": False},
    {"heads": 2, "aggr": "max"},
    {"heads": 2, "flow": "target_to_source"},
    {"heads": 4, "bias": False},
]
GIN = [
    {},
    {"aggr": "max"},
    {"aggr": "mean"},
    {"train_eps": True, "eps": 0.3},
    {"norm": "batch_norm"},
    {"flow": "target_to_source"},
]
ANY = [
    {"norm": norm, **settings}
    for norm in ("batch_norm", "layer_norm", None)
    for settings in ({}, {"jk": "cat"}, {"jk": "max", "act_first": True}, {"jk": "last"})
] + [
    {"norm": nn.LayerNorm(8), "act": "elu"},
    {"norm": pyg.LayerNorm(8, mode="node")},
    {"norm": nn.BatchNorm1d(8, track_running_stats=False), "act": None},
    {"act": nn.Tanh(), "act_first": True},
]


def build(family: str, choice: dict, layers: int = 3, width: int = 8) -> nn.Module:
    """A model with random parameters and statistics, in float64 and evaluation mode."""
    if family == "concat":
        model = gist.nn.GraphSAGE(FEATURES, width, CLASSES, layers, concat=True, **choice)
    elif hasattr(gist.nn, family):
        model = getattr(gist.nn, family)(FEATURES, width, CLASSES, layers, **choice)
    else:
        model = getattr(zoo, family[3:])(FEATURES, width, layers, CLASSES, **choice)
    generator = torch.Generator().manual_seed(0)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = 0.5 * torch.randn(tensor.shape, generator=generator)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d) and module.running_var is not None:
            module.running_var.abs_().add_(0.5)
    return model.double().eval()


MODELS = {
    f"{family} {settings}": (family, settings)
    for families, choices in [
        (("GraphSAGE", "pygGraphSAGE"), SAGE),
        (("GCN", "pygGCN"), GCN),
        (("GAT", "pygGAT"), GAT),
        (("pygGIN",), GIN),
        (("concat",), [{}, {"bias": False}]),
        (("GraphSAGE", "pygGCN"), ANY),
    ]
    for family in families
    for settings in choices
}


@st.composite
def graphs(draw: st.DrawFn) -> Adjacency:
    """Any multigraph, with a hub, self loops, duplicates and isolated nodes."""
    nodes = draw(st.integers(2, 30))
    pairs = draw(st.lists(st.tuples(*[st.integers(0, nodes - 1)] * 2), max_size=60))
    hub = [(node, 0) for node in range(nodes)] if draw(st.booleans()) else []
    edges = torch.tensor([*pairs, *hub], dtype=torch.int64).reshape(-1, 2).T.contiguous()
    loops = edges[0] == edges[1]  # several on one node: PyG's normalisation keeps the last
    edges = torch.cat([edges[:, ~loops], edges[:, loops].unique(dim=1)], dim=1)
    return Adjacency(edges, nodes)


def features(graph: Adjacency, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(graph.num_nodes, FEATURES, generator=generator, dtype=dtype)


def plain(model: nn.Module, x: Tensor, graph: Adjacency) -> Tensor:
    with torch.no_grad():
        return forward(model, x, graph)


# --- exact, for every model, graph and limit, and within the limit ---


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=3)
@given(graph=graphs(), share=st.floats(0, 1))
def test_it_is_the_plain_forward_pass_within_its_limit(name, graph, share):
    model, x = build(*MODELS[name]), features(graph)
    expected = plain(model, x, graph)
    layers = Layerwise(model, x, graph)
    layers.run(layers.enough)  # builds the normalised matrices
    limit = layers.smallest + int(share**4 * (layers.most + 10**6 - layers.smallest))
    with LiveBytes() as live:
        got = layers.run(limit)
    assert live.peak <= layers.most
    assert torch.allclose(got, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()) + 1e-12)
    assert live.peak <= limit


@pytest.mark.parametrize("family", ["GCN", "GraphSAGE", "concat", "GAT", "pygGIN"])
@settings(max_examples=10)
@given(
    graph=graphs(),
    layers=st.integers(1, 4),
    width=st.integers(1, 12),
    share=st.floats(0, 1),
)
def test_it_is_exact_for_any_depth_and_width(family, graph, layers, width, share):
    model, x = (
        build(family, {"heads": 1} if family == "GAT" else {}, layers, width),
        features(graph),
    )
    expected = plain(model, x, graph)
    by_layer = Layerwise(model, x, graph)
    limit = by_layer.smallest + int(share * (by_layer.enough - by_layer.smallest))
    assert torch.allclose(by_layer.run(limit), expected, rtol=1e-9, atol=1e-9)


def test_edge_weights_of_a_gcn_are_used():
    generator = torch.Generator().manual_seed(0)
    edges = torch.randint(20, (2, 60), generator=generator)
    edges = edges[:, edges[0] != edges[1]]
    weight = torch.rand(edges.size(1), generator=generator, dtype=torch.float64)
    graph = Adjacency(edges, 20, weight)
    x = features(graph)
    for family in ("GCN", "pygGCN"):
        for choice in ({}, {"normalize": False}, {"improved": True}):
            model = build(family, choice)
            got = Layerwise(model, x, graph).run(2**20)
            assert torch.allclose(got, plain(model, x, graph), rtol=1e-9)
            bare = Layerwise(model, x, Adjacency(edges, 20)).run(2**20)
            assert not torch.allclose(got, bare, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["GCN", "GraphSAGE", "GAT"])
def test_other_precisions_agree_to_their_rounding(family, dtype):
    edges = torch.randint(50, (2, 300), generator=torch.Generator().manual_seed(0))
    graph = Adjacency(edges, 50)
    model = build(family, {"heads": 2} if family == "GAT" else {}).to(dtype)
    x = features(graph, dtype)
    got, expected = Layerwise(model, x, graph).run(2**20), plain(model, x, graph)
    assert got.dtype == dtype
    scale = float(expected.abs().max())
    assert float((got - expected).abs().max()) < 50 * torch.finfo(dtype).eps * scale


# --- memory ---


def star(nodes: int, edges: int) -> Adjacency:
    generator = torch.Generator().manual_seed(0)
    return Adjacency(torch.randint(nodes, (2, edges), generator=generator), nodes)


@pytest.mark.parametrize(
    ("nodes", "width"),
    [(2000, 8), (200, 256), (40, 1024)],
    ids=["many nodes, narrow", "both", "few nodes, wide"],
)
@pytest.mark.parametrize("family", ["GCN", "GraphSAGE", "concat", "GAT"])
def test_the_peak_stays_under_the_limit_in_float32(family, nodes, width):
    graph = star(nodes, 5 * nodes)
    choice = {"heads": 4} if family == "GAT" else {}
    model, x = build(family, choice, 3, width).float(), features(graph, torch.float32)
    layers = Layerwise(model, x, graph)
    hidden = nodes * width * 4
    assert layers.enough > 2 * hidden
    tight = layers._bytes(CLASSES) + max(layer.enough for layer in layers.layers) + 8192
    expected = plain(model, x, graph)
    assert tight < layers.enough <= layers.most
    for limit in (tight, tight + hidden, tight + 2 * hidden, 2**40):
        with LiveBytes() as live:
            got = layers.run(limit)
        assert live.peak <= min(limit, layers.most)
        assert torch.allclose(got, expected, rtol=1e-3, atol=1e-4)


def test_hidden_layers_go_to_files_only_where_the_limit_has_no_room(monkeypatch):
    made: list[tuple[int, int]] = []
    in_file = Hidden.in_file

    def noting(shape: tuple[int, int], *args: object, **kwargs: object) -> Hidden:
        made.append(shape)
        return in_file(shape, *args, **kwargs)

    monkeypatch.setattr(Hidden, "in_file", noting)
    graph = star(2000, 6000)
    model, x = build("GraphSAGE", {}, 3, 64), features(graph)
    layers = Layerwise(model, x, graph)
    hidden, blocks = 2000 * 64 * 8, max(layer.enough for layer in layers.layers)
    scores = 2000 * CLASSES * 8
    for room, files in ((2 * hidden, 0), (hidden, 1), (0, 2)):
        made.clear()
        limit = scores + blocks + room + 5000
        layers.run(limit)
        assert made == [(2000, 64)] * files, room
        assert layers.file_bytes(limit) == hidden * files


@pytest.mark.parametrize("jumping", [None, "cat", "max"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 1.0])
def test_the_bytes_in_files_are_known_before_they_are_written(monkeypatch, jumping, share):
    alive, most, in_file = [0], [0], Hidden.in_file

    def noting(shape: tuple[int, int], dtype: torch.dtype, allowance: int) -> Hidden:
        hidden, size = in_file(shape, dtype, allowance), shape[0] * shape[1] * dtype.itemsize
        alive[0] += size
        most[0] = max(most[0], alive[0])
        weakref.finalize(hidden, lambda: alive.__setitem__(0, alive[0] - size))
        return hidden

    monkeypatch.setattr(Hidden, "in_file", noting)
    graph = star(2000, 6000)
    model, x = build("GraphSAGE", {"jk": jumping}, 5, 48), features(graph)
    layers = Layerwise(model, x, graph)
    limit = int(layers.smallest + share * (layers.enough - layers.smallest))
    layers.run(limit)
    assert layers.file_bytes(limit) == most[0]
    assert most[0] > 0 or share > 0


def test_a_disk_without_room_for_hidden_layers_is_seen_before_anything_is_computed(monkeypatch):
    graph = star(2000, 6000)
    model, x = build("GraphSAGE", {}, 3, 64), features(graph)
    layers = Layerwise(model, x, graph)
    usage = shutil.disk_usage(tempfile.gettempdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    layers.check(layers.enough)
    needed = layers.file_bytes(layers.smallest)
    with pytest.raises(ConfigError, match=rf"no room on disk.*got: 1,000 bytes.*{needed:,}"):
        choose_inference(model, x, graph, how="layerwise", memory_limit=layers.smallest)


def test_files_are_gone_afterwards_also_after_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    graph = star(100, 300)
    model, x = build("GraphSAGE", {"norm": None, "act": torch.relu}), features(graph)
    layers = Layerwise(model, x, graph)
    layers.run(layers.smallest)
    assert list(tmp_path.iterdir()) == []

    def fails(rows: Tensor) -> Tensor:
        assert str(tmp_path) in Path("/proc/self/maps").read_text()
        raise RuntimeError("no luck")

    layers.layers[1].finish.steps = (fails,)
    with pytest.raises(RuntimeError, match="no luck"):
        layers.run(layers.smallest)
    assert list(tmp_path.iterdir()) == []
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_a_limit_without_room_for_the_smallest_block_is_refused_with_the_numbers():
    graph = star(1000, 5000)
    model, x = build("GraphSAGE", {}), features(graph)
    layers = Layerwise(model, x, graph)
    scores = 1000 * CLASSES * 8
    assert scores < layers.smallest < layers.enough
    with pytest.raises(
        ConfigError,
        match=rf"memory_limit is too small.*got: {layers.smallest - 1:,} bytes.*"
        rf"at least {layers.smallest:,} \({scores:,} of them for the scores\), "
        rf"better {layers.enough:,}.*remedy: raise memory_limit",
    ):
        layers.run(layers.smallest - 1)


# --- weights ---


class _ReadsOf(TorchDispatchMode):
    """Counts entries of a tensor's storage that go into products of matrices."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.storage, self.entries = weight.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            for value in args:
                if isinstance(value, Tensor):
                    same = value.untyped_storage().data_ptr() == self.storage
                    self.entries += value.numel() if same else 0
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("out", [64, 1024], ids=["multiplies first", "aggregates first"])
def test_a_weight_larger_than_the_activations_is_read_once(out, monkeypatch):
    monkeypatch.setattr(blockwise, "WEIGHT_BYTES", 2**12)  # every weight is a large one
    monkeypatch.setattr(blockwise, "ROWS", 1)
    graph = star(50, 200)
    model = gist.nn.GraphSAGE(256, out, CLASSES, 2).eval()
    x = torch.randn(50, 256, generator=torch.Generator().manual_seed(0))
    weight = model.convs[0].lin_l.weight
    layers = Layerwise(model, x, graph)
    with _ReadsOf(weight) as reads:
        got = layers.run(layers.enough)
    assert torch.allclose(got, plain(model, x, graph), atol=1e-4)
    assert reads.entries == weight.numel()


def test_weights_may_be_mapped_from_a_file(tmp_path):
    graph = star(60, 200)
    model, x = build("GraphSAGE", {}, 3, 32), features(graph)
    expected = plain(model, x, graph)
    for number, parameter in enumerate(model.parameters()):
        mapped = torch.from_file(
            str(tmp_path / str(number)), shared=True, size=parameter.numel(), dtype=parameter.dtype
        ).view(parameter.shape)
        parameter.data = mapped.copy_(parameter.data)
    with LiveBytes() as live:
        got = Layerwise(model, x, graph).run(2**20)
    assert torch.allclose(got, expected, rtol=1e-9)
    assert live.peak < 2**20


# --- what has no layer-wise form ---


class Own(gist.nn.GCN):
    def forward(self, x, edge_index):
        return 2 * super().forward(x, edge_index)


class OwnConv(gist.nn.GCN):
    def init_conv(self, in_channels, out_channels, **kwargs):
        return pyg.GraphConv(in_channels, out_channels, **kwargs)


class Activation(nn.Module):
    def forward(self, x):
        return x.clamp(min=0)


def hooked() -> nn.Module:
    model = gist.nn.GCN(FEATURES, 4, CLASSES)
    model.norms[0].register_forward_hook(lambda module, args, out: 2 * out)
    return model


def instance() -> nn.Module:
    model = gist.nn.GCN(FEATURES, 4, CLASSES)
    model.forward = lambda x, graph: x
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nn.Linear(2, 2), "Linear is none of PyG's BasicGNN models"),
        (lambda: Own(FEATURES, 4, CLASSES), "Own has a forward pass of its own"),
        (instance, "GCN has a forward pass of its own"),
        (hooked, "norms.0 has forward hooks"),
        (lambda: OwnConv(FEATURES, 4, CLASSES), "convs.0, a GraphConv, has no form"),
        (lambda: gist.nn.GCN(FEATURES, 4, CLASSES, aggr="max"), "convs.0, a GCNConv, has no form"),
        (lambda: zoo.GraphSAGE(5, 4, 2, 3, aggr="lstm"), "convs.0, a SAGEConv, has no form"),
        (lambda: gist.nn.GCN(5, 4, 3, norm="graph_norm"), "norms.0, a GraphNorm, is not known"),
        (lambda: gist.nn.GCN(5, 4, 3, act=Activation()), "act, a Activation, is not known"),
        (lambda: gist.nn.GCN(5, 4, 3, jk="lstm"), "jumping knowledge 'lstm'"),
        (lambda: zoo.GIN(5, 4, 2, 3, norm="layer_norm"), "convs.0, a GINConv, has no form"),
    ],
)
def test_models_without_a_layer_wise_form_are_refused_by_name(make: Callable, words):
    model = make()
    assert words in str(layerwise_obstacle(model))
    graph = star(10, 20)
    with pytest.raises(ConfigError, match=r"cannot be evaluated layer by layer.*'full'"):
        Layerwise(model, features(graph), graph)


def test_a_composition_of_ones_own_is_declared():
    class Logged(zoo.GCN):
        def forward(self, x, edge_index, **kwargs):
            return super().forward(x, edge_index, **kwargs)

    assert layerwise_obstacle(Logged(5, 4, 2, 3)) is not None
    layerwise.register_composition(Logged)
    assert layerwise_obstacle(Logged(5, 4, 2, 3)) is None


def test_activations_that_are_functions_are_taken_for_elementwise():
    model = build("GCN", {"act": F.silu})
    graph = star(30, 90)
    got = Layerwise(model, features(graph), graph).run(2**20)
    assert torch.allclose(got, plain(model, features(graph), graph), rtol=1e-9)
