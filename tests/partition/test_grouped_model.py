"""From a subnet to a grouped model: names, ties, modes, what has no grouped form, users' rules."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch_geometric.nn as pyg
from torch import Tensor, nn

import gist.nn
from gist.graph.adjacency import Adjacency
from gist.partition.grouped.grouping import Grouping, NotGroupableError
from gist.partition.grouped.model import group_model
from gist.partition.rules.registry import _RULES, Rule, register_rule
from gist.partition.samplers import DisjointUniform
from gist.partition.spec import PartitionSpec, model_tensors
from gist.partition.subnet import build_subnet, width_scales
from gist.partition.transfer import Selection
from gist.partition.wiring import Wiring, partition_spec


def subnets(
    model: nn.Module, m: int, wiring: Wiring | None = None, correction: bool | None = False
) -> tuple[PartitionSpec, list[nn.Module], nn.Module]:
    """The m equal subnets of a random deal, and one grouped model that holds the same."""
    spec = partition_spec(model, wiring)
    deal = DisjointUniform()(spec.sizes, m, seed=0, round=0)
    alone = [build_subnet(model, spec, deal, i, width_correction=correction) for i in range(m)]
    plain = build_subnet(model, spec, deal, 0, width_correction=False)
    scales = width_scales(spec, Selection(spec, deal, 0), correction)
    grouped = group_model(plain, spec, scales, m)
    with torch.no_grad():
        for name, tensor in model_tensors(grouped).items():
            tensor.copy_(torch.stack([model_tensors(one)[name] for one in alone]))
    return spec, alone, grouped


def assert_side_by_side(alone: list[nn.Module], grouped: nn.Module, *args: Any) -> None:
    expected = torch.stack([one(*args) for one in alone], dim=1)
    assert torch.allclose(grouped(*args), expected, rtol=1e-10, atol=1e-12)


X, EDGES = torch.randn(10, 6, dtype=torch.float64), torch.randint(10, (2, 30))


def test_a_grouped_model_has_the_names_of_one_subnet_with_a_dim_in_front():
    model = gist.nn.GAT(6, 8, 3, 3, heads=2, norm="batch")
    spec, (first, *_), grouped = subnets(model, 2)
    assert type(grouped) is type(model)
    wanted = {n: (2, *t.shape) for n, t in model_tensors(first).items()}
    assert {n: tuple(t.shape) for n, t in model_tensors(grouped).items()} == wanted
    assert [n for n, _ in grouped.named_parameters()] == [n for n, _ in first.named_parameters()]
    assert list(wanted) == list(spec.layouts)


def test_the_subnet_and_the_model_are_left_as_they_are():
    model = gist.nn.GCN(6, 8, 3, 3).double()
    spec = partition_spec(model)
    deal = DisjointUniform()(spec.sizes, 2, seed=0, round=0)
    narrow = build_subnet(model, spec, deal, 0)
    text, values = str(narrow), {n: t.clone() for n, t in model_tensors(narrow).items()}
    grouped = group_model(narrow, spec, {}, 2)
    assert str(narrow) == text
    assert all(torch.equal(t, values[n]) for n, t in model_tensors(narrow).items())
    storages = {t.untyped_storage().data_ptr() for t in model_tensors(narrow).values()}
    shared = [
        t for t in model_tensors(grouped).values() if t.untyped_storage().data_ptr() in storages
    ]
    assert not shared


def test_modes_dtypes_and_what_wants_gradients_are_those_of_the_subnet():
    model = gist.nn.GCN(6, 8, 3, 3, norm="batch").to(torch.bfloat16)
    model.norms[0].eval()
    model.convs[1].lin.weight.requires_grad_(False)
    _, (narrow, _), grouped = subnets(model, 2)
    assert {n: m.training for n, m in narrow.named_modules() if "norms" in n} == {
        n: m.training for n, m in grouped.named_modules() if "norms" in n
    }
    for name, parameter in grouped.named_parameters():
        assert parameter.requires_grad == (name != "convs.1.lin.weight")
        assert parameter.dtype == torch.bfloat16
        assert parameter.is_leaf
    assert grouped.norms[0].num_batches_tracked.dtype == torch.int64


class Tied(nn.Module):
    """A layer under two names, in two ways, and a tensor that two layers share."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.one = self.again = nn.Linear(8, 8)
        self.box = nn.ModuleList([self.one, nn.Linear(8, 8)])
        self.box[1].weight = self.one.weight
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(self.first(x).relu()).relu()
        return self.last(self.box[1](self.box[0](self.again(x).relu()).relu()).relu())


TIED: Wiring = {"h": {"out": ["first", "one", "box.1"], "in": ["one", "box.1", "last"]}}


def test_ties_survive():
    model = Tied().double()
    _, alone, grouped = subnets(model, 2, TIED)
    assert grouped.one is grouped.again is grouped.box[0]
    assert grouped.box[1].weight is grouped.one.weight
    assert_side_by_side(alone, grouped, X)
    grouped(X).sum().backward()
    alone[1](X).sum().backward()
    assert torch.allclose(grouped.one.weight.grad[1], alone[1].one.weight.grad, rtol=1e-10)


@pytest.mark.parametrize("correction", [True, None, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda: gist.nn.GCN(6, 12, 3, 3, norm=None),
        lambda: gist.nn.GraphSAGE(6, 12, 3, 3, norm=None, project=True),
        lambda: gist.nn.GraphSAGE(6, 12, 3, 3, concat=True),
        lambda: gist.nn.GAT(6, 12, 3, 3, heads=3, norm=None),
        lambda: pyg.GIN(6, 12, 3, 3, norm=None),
        lambda: pyg.GCN(6, 12, 3, 3, jk="cat"),
    ],
    ids=["GCN", "SAGE, projected", "SAGE, one weight", "GAT", "GIN", "jumping knowledge"],
)
def test_width_correction(make, correction):
    torch.manual_seed(0)
    model = make().double().eval()
    _, alone, grouped = subnets(model, 2, correction=correction)
    assert_side_by_side(alone, grouped, X, EDGES)


def test_models_of_pyg_take_a_graph_with_matrices_once_grouped():
    model = pyg.GraphSAGE(6, 8, 2, 3).double()
    _, alone, grouped = subnets(model, 2)
    assert grouped.accepts_adjacency
    expected = torch.stack([one(X, EDGES) for one in alone], dim=1)
    assert torch.allclose(grouped(X, Adjacency(EDGES, 10)), expected, rtol=1e-10)
    assert not getattr(model, "accepts_adjacency", False), "the class is as it was"


def test_a_cached_normalisation_does_not_travel():
    model = pyg.GCN(6, 8, 2, 3, cached=True).double()
    model(torch.randn(20, 6).double(), torch.randint(20, (2, 50)))  # of another graph
    _, alone, grouped = subnets(model, 2)
    assert_side_by_side(alone, grouped, X, EDGES)


def test_layers_without_a_grouped_form_are_named():
    images = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    with pytest.raises(NotGroupableError, match=r"Conv2d has no grouped form.*`grouped`.*serial"):
        subnets(images, 2, ["0", "2"])


@pytest.mark.parametrize(
    "layer",
    [
        pyg.LayerNorm(8, mode="graph"),
        nn.Embedding(8, 8, sparse=True),
        nn.Embedding(8, 8, scale_grad_by_freq=True),
        nn.Flatten(),
        nn.Dropout2d(),
        nn.BatchNorm2d(8),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_what_would_see_subnets_as_one_has_no_grouped_form(layer):
    with pytest.raises(NotGroupableError, match="has no grouped form"):
        Grouping(2).layer(layer)


class Scale(nn.Module):
    """A layer of a user's own: one factor for all features, one for each, and how often it ran."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.all, self.each = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.rand(width))
        self.register_buffer("runs", torch.tensor(0.0))

    def forward(self, x: Tensor) -> Tensor:
        self.runs = self.runs + 1  # put in place of the old one, as many layers do
        return x * self.all * self.each


class Loose(Scale):
    """Its rule's grouped form forgets a tensor."""


class Wrong(Scale):
    """Its rule's grouped form mixes subnets."""


class GroupedScale(nn.Module):
    def __init__(self, scale: Scale, grouping: Grouping) -> None:
        super().__init__()
        for name in ("all", "each", "runs"):
            grouping.tensor_of(scale, name, self)

    def forward(self, x: Tensor) -> Tensor:
        self.runs = self.runs + 1
        return x * self.all[:, None] * self.each


class ScaleRule(Rule):
    def connect(self, layer: Any) -> Any:
        layer.follow("all")
        layer.follow("each", (0, layer.input))
        layer.follow("runs")
        return layer.input

    def grouped(self, module: Scale, grouping: Grouping) -> nn.Module | None:
        return GroupedScale(module, grouping)


class LooseRule(ScaleRule):
    def grouped(self, module: Scale, grouping: Grouping) -> nn.Module | None:
        form = nn.Identity()
        grouping.tensor_of(module, "each", form)
        return form


@pytest.fixture
def _rules():
    register_rule(Scale)(ScaleRule)
    register_rule(Loose)(LooseRule)
    yield
    del _RULES[Scale], _RULES[Loose]


def net(scale: type[Scale]) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), scale(8), nn.Tanh(), nn.Linear(8, 3)).double()


@pytest.mark.usefixtures("_rules")
def test_a_users_rule_may_give_a_grouped_form():
    _, alone, grouped = subnets(net(Scale), 4, ["0", "1", "3"])
    assert type(grouped[1]) is GroupedScale
    assert_side_by_side(alone, grouped, X)


@pytest.mark.usefixtures("_rules")
def test_a_grouped_form_that_lacks_a_tensor_is_refused():
    with pytest.raises(NotGroupableError, match=r"1\.all: None.*expected: \(2,\)"):
        subnets(net(Loose), 2, ["0", "1", "3"])


@pytest.mark.usefixtures("_rules")
def test_no_grouped_form_is_the_default_of_a_rule():
    class Bare(Scale):
        pass

    @register_rule(Bare)
    class BareRule(ScaleRule):
        grouped = Rule.grouped

    try:
        with pytest.raises(NotGroupableError, match="Bare has no grouped form"):
            subnets(net(Bare), 2, ["0", "1", "3"])
    finally:
        del _RULES[Bare]


def test_a_grouped_model_can_be_copied():
    _, _, grouped = subnets(gist.nn.GAT(6, 8, 3, 2, heads=2).double(), 2)
    again = copy.deepcopy(grouped)
    assert torch.equal(again.eval()(X, EDGES), grouped.eval()(X, EDGES))
    with torch.no_grad():
        next(again.parameters()).zero_()
    assert not torch.equal(again(X, EDGES), grouped(X, EDGES))
