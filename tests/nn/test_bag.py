"""BagLinear: the product with a sparse matrix, in all of its forms."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gist import partition_spec
from gist.errors import DataError
from gist.nn import BagLinear
from gist.partition.grouped.grouping import Grouping
from gist.partition.rules.registry import rule_of
from gist.verify import verify_grouping, verify_wiring
from tests.subnets import largest_difference, normal


def sparse(rows: int, columns: int, density: float = 0.3, seed: int = 0) -> Tensor:
    """A dense matrix with few entries, float64; some rows of it are empty."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, columns, generator=generator) < density
    mask[::3] = False
    return normal(rows, columns, seed=seed) * mask


@given(st.integers(1, 7), st.integers(1, 9), st.integers(1, 5), st.booleans())
def test_a_sparse_matrix_gives_what_the_dense_one_does(rows, columns, width, bias):
    x = sparse(rows, columns)
    layer = BagLinear(columns, width, bias=bias).double()
    expected = x @ layer.weight + (layer.bias if bias else 0)
    grads = torch.autograd.grad(expected.square().sum(), list(layer.parameters()))
    for given_as in (x, x.to_sparse_csr()):
        out = layer(given_as)
        assert torch.allclose(out, expected, rtol=0, atol=1e-12)
        got = torch.autograd.grad(out.square().sum(), list(layer.parameters()))
        for a, b in zip(got, grads, strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-12)


def test_it_starts_as_linear_does():
    torch.manual_seed(0)
    bag, linear = BagLinear(400, 300), nn.Linear(400, 300)
    for ours, theirs in [(bag.weight, linear.weight), (bag.bias, linear.bias)]:
        assert float(ours.detach().abs().max()) <= 0.05
        assert abs(float(ours.detach().std() / theirs.detach().std()) - 1) < 0.1


@pytest.mark.parametrize("given_as", [Tensor.clone, Tensor.to_sparse_csr])
def test_another_number_of_features_is_refused(given_as):
    with pytest.raises(DataError, match="got: 5; expected: 6"):
        BagLinear(6, 3)(given_as(torch.ones(2, 5)))


@pytest.mark.parametrize("given_as", [Tensor.clone, Tensor.to_sparse_csr])
def test_columns_follow_the_units(given_as):
    x = given_as(sparse(9, 12))
    model = nn.Sequential(BagLinear(12, 8), nn.ReLU(), BagLinear(8, 6, bias=False), nn.Linear(6, 3))
    assert largest_difference(model, x) < 1e-12
    spec = partition_spec(model)
    dims = {n: [(s.dim, s.group) for s in layout.slots] for n, layout in spec.layouts.items()}
    assert dims["0.weight"] == [(1, "0")]
    assert dims["0.bias"] == [(0, "0")]
    assert dims["2.weight"] == [(0, "0"), (1, "2")]


@pytest.mark.parametrize("bias", [True, False])
def test_m_layers_side_by_side(bias):
    m, rows, columns, width = 3, 7, 10, 4
    layer = BagLinear(columns, width, bias=bias).double()
    alone = [BagLinear(columns, width, bias=bias).double() for _ in range(m)]
    grouped = rule_of(layer).grouped(layer, Grouping(m))
    with torch.no_grad():
        for name, parameter in grouped.named_parameters():
            parameter.copy_(torch.stack([dict(a.named_parameters())[name] for a in alone]))
    x = sparse(rows, columns)
    shared = torch.stack([a(x) for a in alone], dim=1)
    for given_as in (x, x.to_sparse_csr()):
        out = grouped(given_as)
        assert torch.allclose(out, shared, rtol=0, atol=1e-12)
        grouped.zero_grad()
        out.sum().backward()
        for i, each in enumerate(alone):
            each.zero_grad()
            each(x).sum().backward()
            assert torch.allclose(grouped.weight.grad[i], each.weight.grad, rtol=0, atol=1e-12)
    apart = normal(rows, m, columns)
    expected = torch.stack([a(apart[:, i]) for i, a in enumerate(alone)], dim=1)
    assert torch.allclose(grouped(apart), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("given_as", [Tensor.clone, Tensor.to_sparse_csr])
def test_a_model_with_it_is_verified_in_both_forms(given_as):
    x = given_as(sparse(9, 12).float())
    model = nn.Sequential(BagLinear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    assert verify_wiring(model, (x,)) < 1e-5
    assert verify_grouping(model, lambda model: ((x,), {})) < 1e-5
