"""Rules for DGL's layers, in every configuration: masked, narrowed and grouped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dgl
import pytest
import torch
import torch.nn.functional as F
from dgl.nn import GATConv, GATv2Conv, GINConv, GraphConv, SAGEConv
from torch import Tensor, nn

from gist import partition_spec
from gist.errors import PartitionError
from gist.partition.grouped.grouping import NotGroupableError
from gist.partition.index_map import IndexMap
from gist.partition.samplers import DisjointUniform, Overlapping
from gist.partition.spec import Axis
from gist.partition.subnet import build_subnet, scale_input_of
from gist.verify import _perturb, subnet_difference, verify_grouping, verify_identity

NODES = 14


def graph(*, loops: bool = True) -> tuple[Any, Tensor, Tensor]:
    """A directed graph with duplicates, in which each node has a self loop, or some no edge."""
    generator = torch.Generator().manual_seed(3)
    ends = torch.randint(NODES - 2, (2, 40), generator=generator)
    found = dgl.graph((ends[0], ends[1]), num_nodes=NODES)
    if loops:
        found = dgl.add_self_loop(found)
    x = torch.randn(NODES, 5, generator=generator, dtype=torch.float64)
    return found, x, torch.rand(found.num_edges(), generator=generator, dtype=torch.float64)


class Net(nn.Module):
    """embed -> conv -> [norm] -> conv2 -> head, with the layer under test as ``conv``."""

    def __init__(
        self, conv: nn.Module, width: int, after: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.embed = GraphConv(5, 8, allow_zero_in_degree=True)
        self.conv = conv
        self.norm = nn.BatchNorm1d(width)
        self.conv2 = SAGEConv(width, 6, "mean")
        self.head = nn.Linear(6, 4)
        self.after = after or (lambda h: h)

    def forward(self, g: Any, x: Tensor, edge_weight: Tensor | None = None) -> Tensor:
        weight = {} if edge_weight is None else {"edge_weight": edge_weight}
        x = self.embed(g, x, **weight).tanh()
        x = self.after(self.conv(g, x, **weight))
        return self.head(self.conv2(g, self.norm(x).tanh(), **weight).tanh())


WIRING = ["embed", "conv", "norm", "conv2", "head"]


def assert_forms_agree(
    net: nn.Module, *, wiring: Any = WIRING, weighted: bool = False, loops: bool = True
) -> None:
    """A subnet is the masked model, grouped subnets are as alone, and merging is the identity."""
    torch.manual_seed(0)
    net = net.double()
    _perturb(net)
    g, x, weight = graph(loops=loops)
    keywords = {"edge_weight": weight} if weighted else {}
    spec = partition_spec(net, wiring)
    for m, sampler in [(2, DisjointUniform()), (3, Overlapping(min_units=2))]:
        assignment = sampler(spec.sizes, m, seed=m, round=0)
        verify_identity(net, spec, assignment)
        for i in range(m - 1):
            assert subnet_difference(net, spec, assignment, i, (g, x), keywords) < 1e-12

    def loss(model: nn.Module) -> Tensor:
        out = model(g, x, **keywords)
        return out.square().mean(0).mean(-1)

    assert verify_grouping(net, lambda _: ((g, x), keywords), loss=loss, wiring=wiring) < 1e-12


def chain(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, width))


CONVS: dict[str, Callable[[], nn.Module]] = {
    **{f"GraphConv, {n}": lambda n=n: GraphConv(8, 6, norm=n) for n in ("both", "right", "left")},
    "GraphConv, none, no bias": lambda: GraphConv(8, 6, norm="none", bias=False),
    "GraphConv, wider": lambda: GraphConv(8, 9, activation=F.elu),
    "GraphConv, no weight": lambda: GraphConv(8, 8, weight=False),
    "GraphConv, no weight, no bias": lambda: GraphConv(8, 8, weight=False, bias=False),
    "GraphConv, prelu": lambda: GraphConv(8, 6, activation=nn.PReLU(6)),
    "SAGE, mean": lambda: SAGEConv(8, 6, "mean"),
    "SAGE, mean, wider, no bias": lambda: SAGEConv(8, 9, "mean", bias=False),
    "SAGE, mean, norm": lambda: SAGEConv(8, 6, "mean", norm=nn.LayerNorm(6), activation=F.relu),
    "SAGE, mean, pair": lambda: SAGEConv((8, 8), 6, "mean", norm=lambda h: F.normalize(h, dim=-1)),
    "SAGE, gcn": lambda: SAGEConv(8, 6, "gcn"),
    "SAGE, gcn, wider, no bias": lambda: SAGEConv(8, 9, "gcn", bias=False),
    "SAGE, pool": lambda: SAGEConv(8, 6, "pool", activation=nn.PReLU()),
    "GIN, Linear": lambda: GINConv(nn.Linear(8, 6)),
    "GIN, Sequential": lambda: GINConv(chain(6), learn_eps=True, init_eps=0.3),
    "GIN, max": lambda: GINConv(nn.Linear(8, 6), "max", activation=F.relu),
    "GIN, mean": lambda: GINConv(nn.Linear(8, 6), "mean", activation=nn.PReLU(6)),
    "GIN, nothing within": lambda: GINConv(None, init_eps=0.3),
    "GIN, a function": lambda: GINConv(torch.tanh, learn_eps=True),
}


def width_of(conv: nn.Module) -> int:
    g, _, _ = graph()
    return conv(g, torch.zeros(NODES, 8)).size(-1)


@pytest.mark.parametrize("make", CONVS.values(), ids=CONVS)
def test_convolutions(make):
    conv = make()
    assert_forms_agree(Net(conv, width_of(conv)))


@pytest.mark.parametrize(
    "name", ["GraphConv, both", "SAGE, mean", "SAGE, gcn", "SAGE, pool", "GIN, max"]
)
def test_convolutions_with_weights_of_edges(name):
    assert_forms_agree(Net(CONVS[name](), 6), weighted=True)


ATTENTION: dict[str, dict[str, Any]] = {
    "plain": {},
    "residual": {"residual": True},
    "no bias, activation": {"bias": False, "activation": F.elu, "negative_slope": 0.5},
    "residual without bias, prelu": {"residual": True, "bias": False, "activation": nn.PReLU()},
}
HEADS = {"flat": (12, lambda h: h.flatten(-2)), "mean": (3, lambda h: h.mean(-2))}


@pytest.mark.parametrize("more", ATTENTION.values(), ids=ATTENTION)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("kind", [GATConv, GATv2Conv])
def test_attention(kind, heads, more):
    width, after = HEADS[heads]
    assert_forms_agree(Net(kind(8, 3, num_heads=4, **more), width, after))


@pytest.mark.parametrize("kind", [GATConv, GATv2Conv])
def test_whole_heads_as_units(kind):
    wiring = ["embed", ("conv", "heads"), "norm", "conv2", "head"]
    width, after = HEADS["flat"]
    assert_forms_agree(Net(kind(8, 3, num_heads=4, residual=True), width, after), wiring=wiring)


def test_attention_with_weights_of_edges_and_shared_weights():
    width, after = HEADS["flat"]
    assert_forms_agree(Net(GATConv(8, 3, num_heads=4), width, after), weighted=True)
    shared = GATv2Conv(8, 3, num_heads=4, share_weights=True)
    assert_forms_agree(Net(shared, width, after))
    assert shared.fc_src is shared.fc_dst


class Residual(nn.Module):
    """Layers that add their input to their output, without a weight of their own."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.first = kind(5, 3, num_heads=4)
        self.second = kind(12, 3, num_heads=4, residual=True)
        self.head = nn.Linear(12, 4)

    def forward(self, g: Any, x: Tensor) -> Tensor:
        x = self.first(g, x).flatten(-2).tanh()
        return self.head(self.second(g, x).flatten(-2).tanh())


@pytest.mark.parametrize("kind", [GATConv, GATv2Conv])
def test_a_residual_without_a_weight_keeps_its_units(kind):
    stream = {"stream": {"out": ["first", "second"], "in": ["second", "head"]}}
    assert_forms_agree(Residual(kind), wiring=stream)
    with pytest.raises(PartitionError, match="both must be the same units; name them as one group"):
        partition_spec(Residual(kind), ["first", "second", "head"])


class LastMean(nn.Module):
    """As DGL's examples end: the mean over the heads of the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = GATConv(5, 3, num_heads=4)
        self.second = GATConv(12, 4, num_heads=2)

    def forward(self, g: Any, x: Tensor) -> Tensor:
        return self.second(g, self.first(g, x).flatten(-2).tanh()).mean(-2)


def test_the_last_layer_may_average_its_heads():
    assert_forms_agree(LastMean(), wiring=["first", "second"])
    with pytest.raises(PartitionError, match="heads cannot be units where the output"):
        partition_spec(LastMean(), ["first", ("second", "heads")])


NO_EDGE: dict[str, Callable[[], nn.Module]] = {
    "GraphConv": lambda: GraphConv(8, 6, allow_zero_in_degree=True),
    "SAGE, mean": lambda: SAGEConv(8, 6, "mean"),
    "SAGE, pool": lambda: SAGEConv(8, 6, "pool"),
    "GIN, max": lambda: GINConv(nn.Linear(8, 6), "max"),
}


@pytest.mark.parametrize("make", NO_EDGE.values(), ids=NO_EDGE)
def test_nodes_without_an_edge_receive_nothing(make):
    assert_forms_agree(Net(make(), 6), loops=False)


@pytest.mark.parametrize("kind", [GATConv, GATv2Conv])
def test_attention_over_nodes_without_an_edge(kind):
    conv = kind(8, 3, num_heads=4, allow_zero_in_degree=True)
    assert_forms_agree(Net(conv, *HEADS["flat"]), loops=False)


def test_features_of_sources_and_targets_apart():
    """A layer is called with a pair: narrowed as ever, but not grouped."""
    conv = GATConv((8, 8), 3, num_heads=4)
    net = Net(conv, *HEADS["flat"])
    conv.register_forward_pre_hook(lambda _, args: (args[0], (args[1], args[1])))
    g, x, _ = graph()
    net = net.double()
    spec = partition_spec(net, WIRING)
    assignment = DisjointUniform()(spec.sizes, 2, seed=0, round=0)
    assert subnet_difference(net, spec, assignment, 0, (g, x)) < 1e-12
    with pytest.raises(NotGroupableError, match="GATConv has no grouped form"):
        verify_grouping(net, lambda _: ((g, x), {}), wiring=WIRING)
    corrected = build_subnet(net, spec, assignment, 0, width_correction=True)
    assert torch.isfinite(corrected(g, x)).all()


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "lstm": (lambda: SAGEConv(8, 6, "lstm"), "aggregator 'lstm' mixes"),
    "two widths": (lambda: SAGEConv((8, 5), 6, "mean"), r"bipartite input of widths \(8, 5\)"),
    "weight at each call": (lambda: GraphConv(8, 6, weight=False), "given at each call"),
    "another width": (lambda: GraphConv(7, 6), "takes 7 input features, but the wiring brings 8"),
    "no rule": (
        lambda: dgl.nn.TAGConv(8, 6),
        r"no partition rule for layer type dgl.nn.*GATv2Conv",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    make, why = REFUSED[name]
    with pytest.raises(PartitionError, match=f"(?s)conv: .*{why}"):
        partition_spec(Net(make(), 6), WIRING)
    if name == "lstm":
        units = ["embed", ("conv", "wheels"), "norm", "conv2", "head"]
        with pytest.raises(PartitionError, match="'heads' or 'channels', not 'wheels'"):
            partition_spec(Net(GATConv(8, 3, 4), 12), units)


@pytest.mark.parametrize("call", ["by position", "by keyword", "as a pair"])
def test_width_correction_scales_the_features_and_not_the_graph(call):
    g, _, _ = graph()
    h = torch.randn(NODES, 8, dtype=torch.float64)
    conv = SAGEConv(8, 6, "mean", bias=False).double()
    expected = 3 * conv(g, h)
    scale_input_of(conv, 3.0)
    if call == "by keyword":
        got = conv(feat=h, graph=g)
    else:
        got = conv(g, h if call == "by position" else (h, h))
    assert torch.allclose(got, expected, rtol=1e-12)


def test_an_axis_that_was_repeated_is_found_again():
    axis = Axis.concat([Axis(size=3, parts=(("a", IndexMap()),)), Axis(size=2, parts=())])
    assert axis.repeat(4).once(5) == axis
    for size in (1, 4, 10, 20, 21, 40):
        assert axis.repeat(4).once(size) == (axis.repeat(2) if size == 10 else None)
    assert axis.widen(4).once(5) is None
