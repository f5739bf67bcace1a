"""MLP: layers in their order, subnets, stacked subnets, wrong settings."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gist import DisjointUniform, partition_spec
from gist.errors import ConfigError, DataError
from gist.nn import MLP, BagLinear
from gist.partition.grouped.model import group_model
from gist.partition.spec import model_tensors
from gist.partition.subnet import build_subnet
from gist.verify import verify_grouping, verify_wiring
from tests.subnets import largest_difference, normal, perturbed

FORMS = {
    "batch": {},
    "layer": {"norm": "layer", "act": "gelu"},
    "none": {"norm": None},
    "widths": {"hidden_channels": (8, 6, 9)},
    "bag": {"input": "bag"},
}


def make(**settings):
    return MLP(12, **{"hidden_channels": 9, "out_channels": 4, **settings})


@pytest.mark.parametrize("settings", FORMS.values(), ids=FORMS)
def test_subnets_and_stacked_subnets(settings):
    assert largest_difference(make(**settings), normal(7, 12)) < 1e-12
    x = normal(7, 3, 4).float()  # flattened, the first layer's 12 features
    assert verify_wiring(make(dropout=0.4, **settings), (x,)) < 1e-5
    assert verify_grouping(make(**settings), lambda model: ((x,), {})) < 1e-5


def test_the_layers_come_in_their_order():
    model = perturbed(MLP(5, 7, 3, num_layers=3))
    first, second, last = model.linears
    h = normal(6, 5)
    for linear, norm in [(first, model.norms[0]), (second, model.norms[1])]:
        h = F.linear(h, linear.weight, linear.bias)
        h = (h - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
        h = (h * norm.weight + norm.bias).clamp(min=0)
    expected = F.linear(h, last.weight, last.bias)
    assert torch.allclose(model(normal(6, 5)), expected, rtol=0, atol=1e-12)


def test_dropout_follows_every_hidden_layer():
    model = MLP(5, 7, 3, num_layers=3, dropout=1.0).train()
    assert torch.equal(model(torch.randn(6, 5)), model.linears[-1].bias.expand(6, 3))


def test_images_are_flattened():
    model = make().eval()
    x = torch.randn(5, 3, 2, 2)
    assert torch.equal(model(x), model(x.reshape(5, 12)))


def test_bags_are_sparse_or_dense():
    model = perturbed(make(input="bag"))
    assert isinstance(model.linears[0], BagLinear)
    x = normal(7, 12) * (normal(7, 12, seed=2) > 0.5)
    assert torch.allclose(model(x.to_sparse_csr()), model(x), rtol=0, atol=1e-12)
    with pytest.raises(DataError, match="input='bag'"):
        make()(x.float().to_sparse_csr())


def test_hidden_layers_are_the_groups():
    assert partition_spec(make(num_layers=3)).sizes == {"hidden.0": 9, "hidden.1": 9}
    assert partition_spec(make(hidden_channels=[8, 6])).sizes == {"hidden.0": 8, "hidden.1": 6}
    assert partition_spec(make(num_layers=1)).sizes == {}


def test_an_activation_may_be_a_module():
    assert largest_difference(make(act=nn.PReLU(), num_layers=3), normal(7, 12)) < 1e-12


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"num_layers": 0}, "num_layers=0"),
        ({"hidden_channels": (8, 6), "num_layers": 2}, r"hidden_channels=\(8, 6\), num_layers=2"),
        ({"hidden_channels": (8, 0)}, r"\(8, 0\)"),
        ({"hidden_channels": 0}, "hidden_channels=0"),
        ({"norm": "grop"}, "unknown norm; got: 'grop'"),
        ({"act": "relo"}, "unknown activation; got: 'relo'"),
        ({"input": "sparse"}, "unknown input; got: 'sparse'; expected: dense or bag"),
    ],
)
def test_wrong_settings_are_refused(settings, why):
    with pytest.raises(ConfigError, match=why):
        make(**settings)


@pytest.mark.parametrize("input", ["dense", "bag"])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_some_outputs_are_those_of_all(input, num_layers):
    model = MLP(6, 8, 20, num_layers, input=input).double().eval()
    x, columns = torch.randn(5, 6, dtype=torch.float64), torch.tensor([3, 19, 0])
    torch.testing.assert_close(model(x, outputs=columns), model(x)[:, columns], rtol=1e-12, atol=0)


def test_side_by_side_some_outputs_cost_no_more_than_these():
    model = MLP(6, 8, 500).double()
    spec = partition_spec(model)
    deal = DisjointUniform()(spec.sizes, 2, seed=0, round=0)
    alone = [build_subnet(model, spec, deal, i, width_correction=False).eval() for i in (0, 1)]
    grouped = group_model(alone[0], spec, {}, 2).eval()
    with torch.no_grad():
        for name, tensor in model_tensors(grouped).items():
            for i, narrow in enumerate(alone):
                tensor[i].copy_(model_tensors(narrow)[name])
    x, columns = torch.randn(5, 6, dtype=torch.float64), torch.tensor([3, 499])
    with FlopCounterMode(display=False) as counter:
        some = grouped(x, outputs=columns)
    assert counter.get_total_flops() == 2 * 2 * 5 * 4 * (6 + len(columns))
    torch.testing.assert_close(some, grouped(x)[..., columns])
