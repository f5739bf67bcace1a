"""Rules for PyG's layers, in every configuration, inside a small user-defined network."""

from __future__ import annotations

import pytest
import torch
import torch_geometric.nn as pyg
from torch import Tensor, nn
from torch_geometric.nn.models import GAT, GCN, GIN, MLP, PNA, EdgeCNN, GraphSAGE

import gist.nn
from gist import partition_spec
from gist.errors import PartitionError
from gist.partition.samplers import DisjointUniform, Overlapping
from gist.verify import _perturb, subnet_difference, verify_identity

NODES, EDGE_FEATURES = 14, 3


def graph() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(NODES, 5, generator=generator, dtype=torch.float64)
    edges = torch.randint(NODES, (2, 50), generator=generator)
    return x, edges, torch.rand(50, EDGE_FEATURES, generator=generator, dtype=torch.float64)


class Net(nn.Module):
    """embed -> conv -> [norm] -> conv2 -> head, with the layer under test as ``conv``."""

    def __init__(self, conv: nn.Module, width: int, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.edge_features = getattr(conv, "lin_edge", None) is not None
        self.embed = pyg.GCNConv(5, 8)
        self.conv = conv
        self.norm = norm or nn.Identity()
        self.conv2 = pyg.SAGEConv(width, 6)
        self.head = pyg.Linear(6, 4)

    def forward(self, x: Tensor, edges: Tensor, edge_attr: Tensor | None = None) -> Tensor:
        x = self.embed(x, edges).tanh()
        more = {"edge_attr": edge_attr} if self.edge_features else {}
        x = self.conv(x, edges, **more)
        return self.head(self.conv2(self.norm(x).tanh(), edges).tanh())


def difference(net: nn.Module, units: str | None, wiring: list | None = None) -> float:
    torch.manual_seed(0)
    net = net.double()
    _perturb(net)
    conv = "conv" if units is None else ("conv", units)
    spec = partition_spec(net, wiring or ["embed", conv, "norm", "conv2", "head"])
    worst = 0.0
    for m, sampler in [(2, DisjointUniform()), (3, Overlapping(min_units=3))]:
        assignment = sampler(spec.sizes, m, seed=m, round=0)
        verify_identity(net, spec, assignment)
        for i in range(m - 1):
            worst = max(worst, subnet_difference(net, spec, assignment, i, graph()))
    return worst


def mlp(norm: str | None = None, **more) -> MLP:
    return MLP([8, 7, 6], norm=norm, **more)


CONVS = {
    "GCN": (lambda: pyg.GCNConv(8, 6), 6),
    "GCN, no bias": (lambda: pyg.GCNConv(8, 6, bias=False), 6),
    "GCN, improved": (lambda: pyg.GCNConv(8, 6, improved=True), 6),
    "GCN, no loops": (lambda: pyg.GCNConv(8, 6, add_self_loops=False), 6),
    "GCN, max": (lambda: pyg.GCNConv(8, 6, aggr="max"), 6),
    "SAGE": (lambda: pyg.SAGEConv(8, 6), 6),
    "SAGE, no root": (lambda: pyg.SAGEConv(8, 6, root_weight=False), 6),
    "SAGE, project": (lambda: pyg.SAGEConv(8, 6, project=True), 6),
    "SAGE, project, no root": (lambda: pyg.SAGEConv(8, 6, project=True, root_weight=False), 6),
    "SAGE, normalize": (lambda: pyg.SAGEConv(8, 6, normalize=True), 6),
    "SAGE, max": (lambda: pyg.SAGEConv(8, 6, aggr="max"), 6),
    "SAGE, pair": (lambda: pyg.SAGEConv((8, 8), 6), 6),
    "SAGE, no bias": (lambda: pyg.SAGEConv(8, 6, bias=False), 6),
    "SAGEConcat": (lambda: gist.nn.SAGEConcatConv(8, 6), 6),
    "SAGEConcat, no bias": (lambda: gist.nn.SAGEConcatConv(8, 6, bias=False), 6),
    "gist GCN": (lambda: gist.nn.GCNConv(8, 6), 6),
    "gist SAGE": (lambda: gist.nn.SAGEConv(8, 6), 6),
    "GIN": (lambda: pyg.GINConv(mlp()), 6),
    "GIN, train eps": (lambda: pyg.GINConv(mlp(), eps=0.3, train_eps=True), 6),
    "GIN, batch norm": (lambda: pyg.GINConv(mlp("batch_norm")), 6),
    "GIN, layer norm": (lambda: pyg.GINConv(mlp("layer_norm", act="elu")), 6),
    "GIN, last not plain": (lambda: pyg.GINConv(mlp("batch_norm", plain_last=False)), 6),
    "GIN, act first": (lambda: pyg.GINConv(mlp("batch_norm", act_first=True)), 6),
    "GIN, no act": (lambda: pyg.GINConv(mlp(act=None)), 6),
    "GIN, deep": (lambda: pyg.GINConv(MLP([8, 5, 7, 6], norm="batch_norm")), 6),
    "GIN, Sequential": (
        lambda: pyg.GINConv(
            nn.Sequential(nn.Linear(8, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 6))
        ),
        6,
    ),
    "GIN, one Linear": (lambda: pyg.GINConv(nn.Linear(8, 6)), 6),
}


@pytest.mark.parametrize(("make", "width"), CONVS.values(), ids=CONVS)
def test_convolutions(make, width):
    assert difference(Net(make(), width), None) < 1e-12


ATTENTION = {
    "plain": {},
    "residual": {"residual": True},
    "edge features": {"edge_dim": EDGE_FEATURES},
    "no bias": {"bias": False},
    "no loops": {"add_self_loops": False},
    "everything": {"residual": True, "edge_dim": EDGE_FEATURES},
}


@pytest.mark.parametrize("more", ATTENTION.values(), ids=ATTENTION)
@pytest.mark.parametrize("concat", [True, False], ids=["concat", "mean"])
@pytest.mark.parametrize("units", [None, "channels", "heads"])
@pytest.mark.parametrize("conv", [pyg.GATConv, pyg.GATv2Conv], ids=["GAT", "GATv2"])
def test_attention(conv, units, concat, more):
    layer = conv(8, 3, heads=4, concat=concat, **more)
    assert difference(Net(layer, 12 if concat else 3), units) < 1e-12


@pytest.mark.parametrize("units", ["channels", "heads"])
@pytest.mark.parametrize("concat", [True, False], ids=["concat", "mean"])
def test_attention_with_shared_weights(units, concat):
    layer = pyg.GATv2Conv(8, 3, heads=4, concat=concat, share_weights=True)
    assert layer.lin_l is layer.lin_r
    assert difference(Net(layer, 12 if concat else 3), units) < 1e-12


@pytest.mark.parametrize("conv", [pyg.GATConv, pyg.GATv2Conv], ids=["GAT", "GATv2"])
def test_attention_over_pairs(conv):
    layer = conv((8, 8), 3, heads=4, add_self_loops=False)
    net = Net(layer, 12)
    assert difference(net, "heads") < 1e-12


def test_heads_and_channels_are_laid_out_as_pyg_does():
    net = Net(pyg.GATConv(8, 3, heads=4), 12)
    for units, size, width, offsets in [("heads", 4, 3, (0,)), ("channels", 3, 1, (0, 3, 6, 9))]:
        spec = partition_spec(net, ["embed", ("conv", units), "norm", "conv2", "head"])
        assert spec.groups["conv"].size == size
        (slot,) = (s for s in spec.layouts["conv2.lin_l.weight"].slots if s.group == "conv")
        assert (slot.dim, slot.map.width, slot.map.offsets) == (1, width, offsets)
        dims = {s.dim for s in spec.layouts["conv.att_src"].slots}
        assert dims == ({1} if units == "heads" else {2})


NORMS = {
    "BatchNorm": lambda: pyg.BatchNorm(6),
    "LayerNorm, graph": lambda: pyg.LayerNorm(6, mode="graph"),
    "LayerNorm, node": lambda: pyg.LayerNorm(6, mode="node"),
    "LayerNorm, not affine": lambda: pyg.LayerNorm(6, affine=False, mode="graph"),
    "torch BatchNorm": lambda: nn.BatchNorm1d(6),
    "torch LayerNorm": lambda: nn.LayerNorm(6),
}


@pytest.mark.parametrize("make", NORMS.values(), ids=NORMS)
def test_norms(make):
    assert difference(Net(pyg.SAGEConv(8, 6), 6, make()), None) < 1e-12


@pytest.mark.parametrize("mode", ["graph", "node"])
def test_norms_over_heads(mode):
    net = Net(pyg.GATConv(8, 3, heads=4), 12, pyg.LayerNorm(12, mode=mode))
    assert difference(net, "channels") < 1e-12


def test_the_concatenating_convolution_owns_two_columns_per_unit():
    net = Net(gist.nn.SAGEConcatConv(8, 6), 6)
    spec = partition_spec(net, ["embed", "conv", "norm", "conv2", "head"])
    slot = next(s for s in spec.layouts["conv.lin.weight"].slots if s.group == "embed")
    assert (slot.dim, slot.map.offsets) == (1, (0, 8))


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: pyg.SAGEConv(8, 6, aggr="lstm"), "lstm"),
        (lambda: pyg.SAGEConv(8, 6, aggr=["mean", "max"]), "aggregation"),
        (lambda: pyg.SAGEConv(8, 6, aggr="softmax"), "softmax"),
        (
            lambda: pyg.GCNConv(
                8, 6, aggr="lstm", aggr_kwargs={"in_channels": 6, "out_channels": 6}
            ),
            "lstm",
        ),
        (lambda: pyg.SAGEConv((8, 5), 6), "bipartite"),
        (lambda: pyg.GATConv((8, 5), 6), "bipartite"),
        (lambda: pyg.ChebConv(8, 6, K=2), "no partition rule for layer type .*ChebConv"),
        (lambda: pyg.SAGEConv(7, 6), "takes 7 input features, but the wiring brings 8"),
        (lambda: pyg.GINConv(MLP([7, 6], norm=None)), "takes 7 input features"),
        (lambda: pyg.GINConv(nn.Sequential(nn.Linear(8, 6), nn.Softmax(-1))), "Softmax"),
    ],
)
def test_refusals(make, why):
    net = Net(make(), 6)
    with pytest.raises(PartitionError, match=why) as caught:
        partition_spec(net, ["embed", "conv", "norm", "conv2", "head"])
    assert "conv" in str(caught.value)


def test_unknown_units_of_attention_are_refused():
    with pytest.raises(PartitionError, match="'heads' or 'channels', not 'filters'"):
        partition_spec(
            Net(pyg.GATConv(8, 3, heads=2), 6),
            ["embed", ("conv", "filters"), "norm", "conv2", "head"],
        )


@pytest.mark.parametrize(
    "make", [lambda: pyg.GCNConv(-1, 6), lambda: pyg.SAGEConv(-1, 6), lambda: pyg.Linear(-1, 6)]
)
def test_lazy_layers_are_refused_by_name(make):
    model = nn.ModuleList([make(), pyg.GCNConv(6, 3)])
    with pytest.raises(PartitionError, match=r"0\.\S*weight: is lazy.*instead of -1"):
        partition_spec(model, ["0", "1"])


@pytest.mark.parametrize("model", [GCN, GraphSAGE, GIN, GAT])
def test_lazy_models_are_refused(model):
    with pytest.raises(PartitionError, match="is lazy"):
        partition_spec(model(-1, 8, 2, 3))


@pytest.mark.parametrize("model", [GCN, GraphSAGE, GIN, GAT])
def test_jumping_knowledge_by_lstm_is_refused(model):
    with pytest.raises(PartitionError, match=r"'lstm'.*'cat' or 'max'"):
        partition_spec(model(5, 8, 2, 3, jk="lstm"))


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: EdgeCNN(5, 8, 2, 3), "EdgeConv"),
        (
            lambda: PNA(5, 8, 2, 3, aggregators=["mean"], scalers=["identity"], deg=torch.ones(3)),
            "PNAConv",
        ),
        (lambda: GCN(5, 8, 2, 3, norm="graph_norm"), "GraphNorm"),
        (lambda: GraphSAGE(5, 8, 2, 3, norm="pair_norm"), "PairNorm"),
    ],
)
def test_layers_of_the_zoo_without_a_rule_are_named(make, why):
    with pytest.raises(PartitionError, match=f"no partition rule for layer type .*{why}"):
        partition_spec(make())


def test_functional_activations_of_the_zoo_are_fine():
    assert partition_spec(GCN(5, 8, 2, 3, act=torch.relu)).sizes == {"hidden.0": 8}


def test_groups_of_the_zoo():
    assert partition_spec(GCN(5, 8, 3, 3)).sizes == {"hidden.0": 8, "hidden.1": 8}
    assert partition_spec(GCN(5, 8, 3, 3, jk="cat")).sizes == {f"hidden.{i}": 8 for i in range(3)}
    assert partition_spec(GCN(5, 8, 3, 3, jk="max")).sizes == {"hidden": 8}
    assert partition_spec(GCN(5, 8, 1, 3)).sizes == {}
    assert partition_spec(GAT(5, 8, 2, 3, heads=2)).sizes == {"hidden.0": 4}
    gin = partition_spec(GIN(5, 8, 2, 3)).sizes
    assert gin == {"hidden.0": 8, "convs.0.nn.lins.0": 8}, "no wider than the output: whole"
