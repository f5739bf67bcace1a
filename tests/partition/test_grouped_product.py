"""The grouped product against an einsum: values, gradients, layouts in memory, precisions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gist.partition.grouped.product import add_bias, grouped_product

SIZES = st.tuples(st.integers(0, 6), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5))
LAYOUTS = ["contiguous", "transposed", "strided", "expanded", "shared", "shared strided"]


def features(layout: str, n: int, m: int, k: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Features [n, m, k], or shared [n, k], that lie in memory as ``layout`` says."""
    made = {
        "contiguous": lambda: torch.randn(n, m, k, dtype=dtype),
        "transposed": lambda: torch.randn(k, m, n, dtype=dtype).permute(2, 1, 0),
        "strided": lambda: torch.randn(n, m, 2 * k + 1, dtype=dtype)[:, :, 1::2],
        "expanded": lambda: torch.randn(n, 1, k, dtype=dtype).expand(n, m, k),
        "shared": lambda: torch.randn(n, k, dtype=dtype),
        "shared strided": lambda: torch.randn(k, n, dtype=dtype).t(),
    }
    return made[layout]()


def einsum(x: Tensor, weight: Tensor) -> Tensor:
    if x.dim() == 2:
        x = x.unsqueeze(1).expand(-1, len(weight), -1)
    return torch.einsum("nmk,mok->nmo", x, weight)


@pytest.mark.parametrize("layout", LAYOUTS)
@given(sizes=SIZES, seed=st.integers(0, 99))
def test_values_and_gradients_are_those_of_an_einsum(layout, sizes, seed):
    n, m, k, o = sizes
    torch.manual_seed(seed)
    x = features(layout, n, m, k).requires_grad_()
    weight = torch.randn(m, o, k, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(n, m, o, dtype=torch.float64)
    got, expected = grouped_product(x, weight), einsum(x, weight)
    assert got.shape == (n, m, o)
    assert got.is_contiguous()
    assert torch.allclose(got, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(got, (x, weight), cotangent),
        torch.autograd.grad(expected, (x, weight), cotangent),
        strict=True,
    ):
        assert a.shape == b.shape
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", sorted({*LAYOUTS} - {"expanded"}))  # gradcheck refuses stride 0
def test_gradcheck(layout):
    torch.manual_seed(0)
    x = features(layout, 3, 2, 4).requires_grad_()
    weight = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return add_bias(grouped_product(x, weight), bias)

    assert torch.autograd.gradcheck(product, (x, weight, bias))


@pytest.mark.parametrize("wants", [(True, False), (False, True), (False, False)])
def test_only_what_wants_a_gradient_gets_one(wants):
    x = torch.randn(5, 2, 3, requires_grad=wants[0])
    weight = torch.randn(2, 4, 3, requires_grad=wants[1])
    out = grouped_product(x, weight)
    assert out.requires_grad == any(wants)
    if any(wants):
        out.sum().backward()
    assert (x.grad is not None, weight.grad is not None) == wants


def test_a_gradient_that_is_not_contiguous():
    x = torch.randn(5, 3, 2, dtype=torch.float64)
    weight = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(4, 3, 5, dtype=torch.float64).permute(2, 1, 0)
    (got,) = torch.autograd.grad(grouped_product(x, weight), weight, cotangent)
    (expected,) = torch.autograd.grad(einsum(x, weight), weight, cotangent)
    assert torch.allclose(got, expected, rtol=1e-12)


def test_subnets_do_not_see_each_other():
    x = torch.randn(4, 3, 2)
    weight = torch.randn(3, 5, 2)
    before = grouped_product(x, weight)
    x[:, 1], weight[1] = float("nan"), float("inf")
    after = grouped_product(x, weight)
    assert torch.equal(before[:, [0, 2]], after[:, [0, 2]])
    assert after[:, 1].isnan().all()


@pytest.mark.parametrize("layout", ["contiguous", "shared"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_does_to_it_what_it_does_to_a_linear_layer(layout, dtype):
    torch.manual_seed(0)
    x = features(layout, 6, 3, 8, dtype).requires_grad_()
    weight = torch.randn(3, 4, 8, dtype=dtype, requires_grad=True)
    bias = torch.randn(3, 4, dtype=dtype, requires_grad=True)
    own = x.unsqueeze(1).expand(-1, 3, -1) if layout == "shared" else x
    with torch.autocast("cpu", torch.bfloat16):
        got = add_bias(grouped_product(x, weight), bias)
        alone = [F.linear(own[:, i], weight[i], bias[i]) for i in range(3)]
    assert got.dtype == alone[0].dtype
    assert torch.allclose(got, torch.stack(alone, dim=1), rtol=2e-2, atol=2e-2)
    for tensor in torch.autograd.grad(got.sum(), (x, weight, bias)):
        assert tensor.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_dtype_is_kept(dtype):
    out = grouped_product(torch.randn(4, 2, 3).to(dtype), torch.randn(2, 5, 3).to(dtype))
    assert out.dtype == dtype


def test_a_bias_is_added_in_place_and_none_is_no_bias():
    out, bias = torch.zeros(3, 2, 4), torch.randn(2, 4)
    assert add_bias(out, None) is out
    assert add_bias(out, bias) is out
    assert torch.equal(out, bias.expand(3, 2, 4))
