"""Kernels of infinite and finite width, and their spectra (THEORY, tests 1 and 2)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gist.theory import (
    Network,
    Problem,
    Scheme,
    Spectrum,
    activation_kernel,
    angles,
    finite_ntk,
    ntk,
)

PROBLEM = Problem.sphere()


def network(width: int, seed: int = 0) -> Network:
    return Network.draw(width, PROBLEM.dim, scale=1.0, seed=seed)


def test_01_finite_kernels_approach_the_infinite_one():
    infinite, scaled = PROBLEM.kernel(), []
    for width in (1000, 4000, 16_000, 64_000):
        differences = [PROBLEM.finite_kernel(network(width, s)) - infinite for s in range(12)]
        norms = [float(torch.linalg.matrix_norm(each, 2)) for each in differences]
        scaled.append(math.sqrt(width) * sum(norms) / len(norms))
    middle = sum(scaled) / len(scaled)
    assert all(0.75 * middle < each < 1.25 * middle for each in scaled), scaled


def test_02_masked_kernels_are_the_kernel_in_the_mean():
    keep, width = 0.3, 2000
    net = network(width)
    masks = Scheme.multi_sample_dropout(keep, 400).masks(width, seed=0, round=0)
    kernels = torch.stack([PROBLEM.finite_kernel(net, mask) for mask in masks])
    mean = keep * PROBLEM.finite_kernel(net)
    bias = torch.linalg.matrix_norm(kernels.mean(dim=0) - mean) / torch.linalg.matrix_norm(mean)
    assert float(bias) < 0.01
    smallest = Spectrum.of(PROBLEM.kernel(keep)).smallest
    assert min(Spectrum.of(kernel).smallest for kernel in kernels[:20]) >= smallest / 2


@pytest.mark.parametrize("keep", [1.0, 0.25])
def test_the_kernel_is_the_formula(keep):
    x = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, -3.0]], dtype=torch.float64)
    kernel = ntk(x, keep=keep)
    expected = torch.zeros(3, 3, dtype=torch.float64)
    for i, j in ((i, j) for i in range(3) for j in range(3)):
        inner = float(x[i] @ x[j])
        turn = abs(math.atan2(*x[i].tolist()) - math.atan2(*x[j].tolist()))
        angle = min(turn, 2 * math.pi - turn)
        expected[i, j] = keep * inner * (math.pi - angle) / (2 * math.pi)
    torch.testing.assert_close(kernel, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(kernel, kernel.T)


def test_on_the_sphere_the_diagonal_is_half_the_keep_probability():
    torch.testing.assert_close(PROBLEM.kernel(0.3).diagonal(), torch.full((50,), 0.15).double())


@given(st.integers(1, 20), st.integers(1, 5), st.integers(0, 1000))
def test_finite_kernels_are_sums_over_neurons(width, dim, seed):
    problem = Problem.sphere(4, dim, seed=seed)
    net = Network.draw(width, dim, scale=1.0, seed=seed)
    mask = Scheme.dropout(0.5).masks(width, seed=seed, round=0)[0]
    kernel = torch.zeros(4, 4, dtype=torch.float64)
    hidden = torch.zeros(4, 4, dtype=torch.float64)
    for row, held in zip(net.weight, mask.tolist(), strict=True):
        active = (problem.x @ row >= 0).double()
        kernel += held * torch.outer(active, active) * (problem.x @ problem.x.T) / width
        output = (problem.x @ row).relu()
        hidden += torch.outer(output, output) / width
    torch.testing.assert_close(finite_ntk(problem.x, net.weight, mask), kernel)
    torch.testing.assert_close(activation_kernel(problem.x, net.weight), hidden)


def test_the_finite_kernel_is_that_of_the_gradients():
    """<∂f_i/∂W, ∂f_j/∂W>, by autograd."""
    net = network(30)
    weight = net.weight.clone().requires_grad_()
    outputs = Network(weight=weight, signs=net.signs).outputs(PROBLEM)
    rows = [
        torch.autograd.grad(output, weight, retain_graph=True)[0].flatten() for output in outputs
    ]
    jacobian = torch.stack(rows)
    torch.testing.assert_close(PROBLEM.finite_kernel(net), jacobian @ jacobian.T)


@pytest.mark.parametrize("angle", [0.0, 1e-12, 1e-9, 1e-5, 0.1, math.pi - 1e-9, math.pi])
def test_small_angles_keep_their_digits(angle):
    x = torch.tensor([[1.0, 0.0], [math.cos(angle), math.sin(angle)]], dtype=torch.float64)
    between = float(angles(3 * x)[0, 1])
    assert between == pytest.approx(angle, rel=1e-9, abs=1e-15)


def test_rows_of_zeros_have_a_kernel_of_zero():
    x = torch.tensor([[0.0, 0.0], [1.0, 2.0]], dtype=torch.float64)
    kernel = ntk(x)
    assert kernel[0].tolist() == [0.0, 0.0]
    assert bool(torch.isfinite(kernel).all())


def test_two_parallel_rows_make_the_kernel_numerically_singular():
    x = torch.cat([PROBLEM.x, 2 * PROBLEM.x[:1]])
    assert Spectrum.of(ntk(x)).is_singular
    assert Spectrum.of(ntk(x)).smallest == 0.0
    assert not Spectrum.of(ntk(PROBLEM.x)).is_singular


def test_a_spectrum_is_that_of_its_kernel():
    spectrum = Spectrum.of(PROBLEM.kernel())
    rebuilt = spectrum.vectors @ torch.diag(spectrum.values) @ spectrum.vectors.T
    torch.testing.assert_close(rebuilt, PROBLEM.kernel())
    bare = Spectrum.of(PROBLEM.kernel(), vectors=False)
    assert bare.vectors is None
    assert (bare.smallest, bare.largest) == pytest.approx((spectrum.smallest, spectrum.largest))


def test_nothing_but_zeros_is_singular():
    assert Spectrum.of(torch.zeros(3, 3, dtype=torch.float64)).is_singular
