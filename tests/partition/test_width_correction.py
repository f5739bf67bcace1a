"""Width correction: where it acts by default, and that it keeps sums equal in expectation."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch_geometric.nn as pyg
from torch import Tensor, nn
from torch_geometric.nn.models import GAT, GCN, GIN, GraphSAGE

import gist.nn
from gist import partition_spec
from gist.partition.assignment import Assignment
from gist.partition.subnet import build_subnet, corrected_paths


def linear_net(width: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, width), nn.Linear(width, 2)).double()


def mean_output(model: nn.Module, wiring: list[str], size: int, m: int, *args: Tensor) -> Tensor:
    """Mean of subnet 0's corrected output over every way to deal one group evenly."""
    spec = partition_spec(model, wiring)
    (group,) = spec.sizes
    outputs = []
    for held in itertools.combinations(range(size), size // m):
        rest = torch.tensor([u for u in range(size) if u not in held])
        deal = (torch.tensor(held), *rest.tensor_split(m - 1))
        assignment = Assignment(round=0, sizes=spec.sizes, held={group: deal})
        subnet = build_subnet(model, spec, assignment, 0, width_correction=True)
        outputs.append(subnet(*args))
    return torch.stack(outputs).mean(0)


@pytest.mark.parametrize("m", [2, 4])
def test_linear_sums_are_equal_in_expectation(m):
    model = linear_net()
    x = torch.randn(5, 3, dtype=torch.float64)
    assert torch.allclose(mean_output(model, ["0", "1"], 4, m, x), model(x), rtol=1e-12)


class Two(nn.Module):
    """Two convolutions without anything between, called by keyword as users may."""

    def __init__(self, one: nn.Module, two: nn.Module, how: str) -> None:
        super().__init__()
        self.one, self.two, self.how = one, two, how

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        h = self.one(x, edge_index)
        if self.how == "positional":
            return self.two(h, edge_index)
        if self.how == "keywords":
            return self.two(x=h, edge_index=edge_index)
        return self.two(edge_index=edge_index, x=h)


@pytest.mark.parametrize("how", ["positional", "keywords", "keywords in another order"])
@pytest.mark.parametrize(
    "make",
    [pyg.GCNConv, pyg.SAGEConv, gist.nn.GCNConv, gist.nn.SAGEConv, gist.nn.SAGEConcatConv],
    ids=["GCN", "SAGE", "gist GCN", "gist SAGE", "SAGEConcat"],
)
def test_convolutions_are_equal_in_expectation(make, how):
    torch.manual_seed(0)
    model = Two(make(3, 4), make(4, 2), how).double()
    x, edges = torch.randn(5, 3, dtype=torch.float64), torch.randint(5, (2, 12))
    got = mean_output(model, ["one", "two"], 4, 2, x, edges)
    assert torch.allclose(got, model(x, edges), rtol=1e-10, atol=1e-12)


def test_uneven_subnets_are_scaled_by_their_own_width():
    model = linear_net(5)
    spec = partition_spec(model, ["0", "1"])
    held = {"0": (torch.tensor([0, 1, 4]), torch.tensor([2, 3]))}
    assignment = Assignment(round=0, sizes={"0": 5}, held=held)
    x = torch.randn(4, 3, dtype=torch.float64)
    for i, units in enumerate(held["0"]):
        subnet = build_subnet(model, spec, assignment, i, width_correction=True)
        hidden = model[0](x)[:, units]
        weight = model[1].weight[:, units]
        expected = hidden @ weight.T * (5 / len(units)) + model[1].bias
        assert torch.allclose(subnet(x), expected, rtol=1e-12)


def test_the_default_acts_without_norms_only():
    bare = partition_spec(GCN(5, 8, 3, 2))
    assert corrected_paths(bare, None) == {"convs.1", "convs.2"}
    assert corrected_paths(bare, False) == frozenset()
    for norm in ("layer", "batch"):
        normed = partition_spec(gist.nn.GCN(5, 8, 2, 3, norm=norm))
        assert corrected_paths(normed, None) == frozenset()
        assert corrected_paths(normed, True) == {"convs.2"}, "its output is not normalised"
    no_norm = partition_spec(gist.nn.GCN(5, 8, 2, 3, norm=None))
    assert corrected_paths(no_norm, None) == {"convs.1", "convs.2"}


@pytest.mark.parametrize("jk", [None, "cat", "max"])
@pytest.mark.parametrize("model", [GCN, GraphSAGE, GIN, GAT])
def test_first_layers_are_never_corrected(model, jk):
    paths = corrected_paths(partition_spec(model(5, 8, 3, 2, jk=jk)), True)
    assert paths
    if model is not GIN:
        assert "convs.0" not in paths
    assert "convs.0.nn.lins.0" not in paths


def test_correction_is_off_where_asked_and_at_one_subnet():
    model = linear_net()
    spec = partition_spec(model, ["0", "1"])
    half = Assignment(round=0, sizes={"0": 4}, held={"0": (torch.arange(2), torch.arange(2, 4))})
    whole = Assignment(round=0, sizes={"0": 4}, held={"0": (torch.arange(4),)})
    hooks = [
        len(build_subnet(model, spec, a, 0, width_correction=w)[1]._forward_pre_hooks)
        for a, w in [(half, True), (half, None), (half, False), (whole, True)]
    ]
    assert hooks == [1, 1, 0, 0]


def test_a_projection_before_the_aggregation_is_corrected_too():
    torch.manual_seed(0)
    model = nn.ModuleList([pyg.SAGEConv(3, 4, project=True), pyg.SAGEConv(4, 2, project=True)])
    spec = partition_spec(model, ["0", "1"])
    contracted = {
        layout.name
        for layout in spec.layouts.values()
        if any(s.dim == 1 and s.group not in ("0", "1") for s in layout.slots)
    }
    assert contracted == {"0.lin_l.weight", "1.lin_l.weight"}
    assert {"0.lin_l", "1.lin_l"} <= corrected_paths(spec, True), (
        "lin_l sums over a share of the projected features"
    )
