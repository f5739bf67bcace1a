"""A subnet's output equals the whole model with the other units switched off."""

from __future__ import annotations

import pytest
import torch
import torch_geometric.nn.models as zoo
from torch import Tensor

import gist.nn
from gist import Adjacency, partition_spec
from gist.errors import ConfigError
from gist.partition.samplers import DisjointUniform, Overlapping
from gist.partition.subnet import build_subnet
from gist.verify import _perturb, subnet_difference, verify_identity

NODES = 14


def graph() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    edges = torch.randint(NODES, (2, 45), generator=generator)
    x = torch.randn(NODES, 5, generator=generator, dtype=torch.float64)
    return x, torch.cat([edges, edges.flip(0)], dim=1)


def difference(model: torch.nn.Module, *inputs: object) -> float:
    torch.manual_seed(0)
    model = model.double()
    _perturb(model)
    spec = partition_spec(model)
    worst = 0.0
    for m, sampler in [(2, DisjointUniform()), (3, Overlapping(min_units=3))]:
        assignment = sampler(spec.sizes, m, seed=m, round=0)
        verify_identity(model, spec, assignment)
        for i in range(m):
            worst = max(worst, subnet_difference(model, spec, assignment, i, inputs))
    return worst


REFERENCE = {
    "GCN": (gist.nn.GCN, {}),
    "GraphSAGE": (gist.nn.GraphSAGE, {}),
    "GraphSAGE, concat": (gist.nn.GraphSAGE, {"concat": True}),
    "GAT, channels": (gist.nn.GAT, {"heads": 3}),
    "GAT, heads": (gist.nn.GAT, {"heads": 3, "units": "heads"}),
    "GAT v2, heads": (gist.nn.GAT, {"heads": 3, "units": "heads", "v2": True}),
}


@pytest.mark.parametrize("norm", ["layer", "batch", None])
@pytest.mark.parametrize(("model", "more"), REFERENCE.values(), ids=REFERENCE)
def test_reference_models(model, more, norm):
    net = model(5, 9, 4, 3, norm=norm, **more)
    x, edges = graph()
    assert difference(net, x, edges) < 1e-12
    assert difference(net, x, Adjacency(edges, NODES)) < 1e-12


ZOO = {
    "GCN": (zoo.GCN, {}),
    "GraphSAGE": (zoo.GraphSAGE, {}),
    "GIN": (zoo.GIN, {}),
    "GAT": (zoo.GAT, {"heads": 3}),
    "GAT v2": (zoo.GAT, {"heads": 3, "v2": True}),
}


@pytest.mark.parametrize("norm", ["layer_norm", "batch_norm", None])
@pytest.mark.parametrize("jk", [None, "last", "cat", "max"])
@pytest.mark.parametrize(("model", "more"), ZOO.values(), ids=ZOO)
def test_the_zoo_of_pyg(model, more, jk, norm):
    assert difference(model(5, 9, 3, 4, jk=jk, norm=norm, **more), *graph()) < 1e-12


@pytest.mark.parametrize(
    "settings",
    [
        {"act": "prelu"},
        {"act": None},
        {"act": "elu", "act_first": True, "norm": "layer_norm"},
        {"num_layers": 2},
        {"num_layers": 5},
        {"out_channels": None},
        {"out_channels": None, "jk": "cat"},
        {"norm": "layer_norm", "norm_kwargs": {"mode": "node"}},
        {"dropout": 0.5},
        {"bias": False},
    ],
    ids=str,
)
def test_settings_of_the_zoo(settings):
    arguments = {"num_layers": 3, "out_channels": 4} | settings
    assert difference(zoo.GCN(5, 9, **arguments), *graph()) < 1e-12


def test_three_layers_against_a_mask_written_by_hand():
    """An oracle that uses nothing of the engine: masks times dense matrices."""
    torch.manual_seed(0)
    model = gist.nn.GCN(5, 8, 4, 3, norm=None, dropout=0.0).double().eval()
    spec = partition_spec(model)
    x, edges = graph()
    dense = torch.zeros(NODES, NODES, dtype=torch.float64)
    for source, target in edges.T.tolist():
        dense[target, source] += 1
    dense += torch.diag((dense.diagonal() == 0).double())
    # PyG keeps one self loop where there are several
    loops = edges[:, edges[0] == edges[1]][0]
    dense[loops, loops] = 1
    scale = dense.sum(1).rsqrt()
    a_hat = scale[:, None] * dense * scale

    assignment = DisjointUniform()(spec.sizes, 3, seed=5, round=2)
    for i in range(3):
        h = x
        for layer, conv in enumerate(model.convs):
            h = a_hat @ h @ conv.lin.weight.T + conv.bias
            if layer < 2:
                mask = torch.zeros(8, dtype=torch.float64)
                mask[assignment.held[f"hidden.{layer}"][i]] = 1
                h = h.relu() * mask
        subnet = build_subnet(model, spec, assignment, i, width_correction=False)
        assert torch.allclose(subnet(x, edges), h, rtol=0, atol=1e-6)
        assert torch.allclose(subnet(x, Adjacency(edges, NODES)), h, rtol=0, atol=1e-6)
        exact = subnet(x, edges, torch.ones(edges.size(1), dtype=torch.float64))
        assert torch.allclose(exact, h, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("model", "more"), REFERENCE.values(), ids=REFERENCE)
def test_state_dicts_are_pygs(model, more):
    settings = {k: v for k, v in more.items() if k not in ("concat", "units")}
    ours = model(5, 9, 4, 3, norm=None, **more)
    if more.get("concat"):
        assert ours.convs[1].lin.weight.shape == (9, 18)
        return
    theirs = getattr(zoo, model.__name__)(5, 9, 3, 4, **settings)
    theirs.load_state_dict(ours.state_dict())
    x, edges = graph()
    assert torch.allclose(
        ours.eval()(x.float(), edges), theirs.eval()(x.float(), edges), rtol=1e-5, atol=1e-6
    )


def test_unknown_norms_are_refused():
    with pytest.raises(ConfigError, match="'layer', 'batch', None"):
        gist.nn.GCN(5, 8, 3, norm="grop")


def test_hidden_norms_have_no_affine_parameters_as_in_the_paper():
    names = [n for n, _ in gist.nn.GCN(5, 8, 3, 3).named_parameters()]
    assert not any("norm" in n for n in names)
