"""The product: right in every dtype, the same bits every time, differentiable, and countable."""

from __future__ import annotations

import gc
import time
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from gist.errors import ConfigError, DataError
from gist.graph import sparse
from gist.graph.sparse import CSR, KERNELS, SparseMatrix, product_kernel

DTYPES = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 3e-2,
    torch.float16: 4e-3,
}
FAST = [torch.float32, torch.bfloat16, torch.float16]


def random_matrix(n: int, m: int, entries: int, seed: int = 0) -> sp.csr_matrix:
    """Compressed rows, unsorted within a row and with duplicates."""
    generator = np.random.default_rng(seed)
    entries = entries if n * m else 0
    rows = np.sort(generator.integers(0, max(n, 1), entries))
    columns = generator.integers(0, max(m, 1), entries)
    indptr = np.searchsorted(rows, np.arange(n + 1))
    return sp.csr_matrix((generator.random(entries) + 0.5, columns, indptr), shape=(n, m))


def matrix_of(given: sp.csr_matrix, index=torch.int32, **known) -> SparseMatrix:
    rows = CSR(
        torch.from_numpy(given.indptr).to(index),
        torch.from_numpy(given.indices).to(index),
        torch.from_numpy(given.data),
        given.shape[1],
    )
    return SparseMatrix(rows, **known)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm().clamp(min=1e-30))


# The numbers


@given(
    n=st.integers(0, 12),
    m=st.integers(0, 12),
    entries=st.integers(0, 40),
    d=st.integers(0, 40),
    dtype=st.sampled_from(list(DTYPES)),
    index=st.sampled_from([torch.int32, torch.int64]),
)
def test_the_product_is_that_of_the_dense_matrix(n, m, entries, d, dtype, index):
    given = random_matrix(n, m, entries)
    x = torch.randn(m, d, generator=torch.Generator().manual_seed(d)).to(dtype)
    expected = torch.from_numpy(given.toarray()) @ x.double()
    out = matrix_of(given, index) @ x
    assert (out.dtype, out.shape) == (dtype, (n, d))
    assert relative_error(out, expected) < DTYPES[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_is_the_product_with_the_transpose(dtype):
    given = random_matrix(30, 20, 150)
    x = torch.randn(20, 9, dtype=dtype, requires_grad=True)
    grad = torch.randn(30, 9, dtype=dtype)
    (matrix_of(given) @ x).backward(grad)
    expected = torch.from_numpy(given.T.toarray()) @ grad.double()
    assert x.grad.dtype == dtype
    assert relative_error(x.grad, expected) < DTYPES[dtype]


def test_it_can_be_differentiated_twice():
    matrix = matrix_of(random_matrix(6, 5, 14))
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: (matrix @ x).pow(3), x)
    assert torch.autograd.gradgradcheck(lambda x: (matrix @ x).pow(3), x)


def test_without_gradients_the_transpose_is_never_built():
    matrix = matrix_of(random_matrix(6, 5, 14))
    x = torch.randn(5, 3, requires_grad=True)
    with torch.no_grad():
        assert not (matrix @ x).requires_grad
    assert not (matrix @ x.detach()).requires_grad
    assert "columns" not in vars(matrix)


def test_a_transpose_that_is_known_is_not_built():
    given = random_matrix(6, 5, 14)
    columns = matrix_of(given.T.tocsr()).rows
    for known in (
        matrix_of(given, columns=lambda: columns),
        matrix_of(given, columns=lambda: columns).to("cpu"),
    ):
        x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
        (known @ x).sum().backward()
        ones = torch.ones(6, 3, dtype=torch.float64)
        assert relative_error(x.grad, torch.from_numpy(given.T.toarray()) @ ones) < 1e-12
        assert known.columns.indices.equal(columns.indices)
    square = given[:5]
    symmetric = matrix_of((square + square.T).tocsr(), symmetric=True)
    assert symmetric.columns is symmetric.rows
    assert symmetric.shape == (5, 5)


def test_strided_features_and_results_of_scipy():
    given = random_matrix(30, 20, 150)
    wide = torch.randn(9, 40)
    x = wide.t()[::2]
    expected = torch.from_numpy(given @ x.double().numpy())
    assert relative_error(SparseMatrix.from_scipy(given.tocoo()) @ x, expected) < 1e-5


def test_features_of_another_number_of_nodes_are_refused():
    matrix = matrix_of(random_matrix(6, 5, 14))
    for rows in (4, 6):
        with pytest.raises(DataError, match=rf"got: features of shape \({rows}, 3\).*5 rows"):
            matrix @ torch.randn(rows, 3)


# The same bits


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_depend_on_neither_runs_nor_threads_nor_other_columns(dtype):
    given = random_matrix(3000, 3000, 30_000)
    matrix, x = matrix_of(given), torch.randn(3000, 131).to(dtype)
    out = matrix @ x
    assert torch.equal(matrix @ x, out)
    assert torch.equal(matrix_of(given, torch.int64) @ x, out)
    for start, stop in ((0, 1), (0, 64), (5, 12), (64, 131), (130, 131)):
        assert torch.equal(matrix @ x[:, start:stop], out[:, start:stop])
    torch.set_num_threads(2)
    try:
        assert torch.equal(matrix @ x, out)
        assert torch.equal(matrix @ x[:, 7:90], out[:, 7:90])
    finally:
        torch.set_num_threads(1)


# The kernel


def test_the_rule_of_kernels():
    for dtype in FAST:
        assert product_kernel("cpu", dtype) == "embedding_bag"
        assert product_kernel("cuda", dtype) == "sparse_csr"
    assert product_kernel("cpu", torch.float64) == "sparse_csr"


@pytest.mark.parametrize("name", KERNELS)
def test_the_kernel_can_be_named(name, monkeypatch):
    given = random_matrix(30, 20, 150)
    x = torch.randn(20, 9)
    used = []

    def kernel(*args):
        used.append(name)
        return run(*args)

    run = KERNELS[name]
    monkeypatch.setitem(KERNELS, name, kernel)
    monkeypatch.setenv("GIST_PRODUCT_KERNEL", name)
    for dtype in (torch.float32, torch.float64):
        out = matrix_of(given) @ x.to(dtype)
        assert relative_error(out, torch.from_numpy(given @ x.double().numpy())) < 1e-5
    assert used == [name, name]
    monkeypatch.setenv("GIST_PRODUCT_KERNEL", "fast")
    with pytest.raises(ConfigError, match=r"'fast'.*embedding_bag or sparse_csr or dgl or fastest"):
        matrix_of(given) @ x


def test_the_fastest_kernel_is_found_once_for_each_dtype(monkeypatch, caplog):
    def slow(*args):
        time.sleep(0.02)
        return KERNELS["embedding_bag"](*args)

    def broken(*args):
        raise RuntimeError("of no use here")

    given = random_matrix(30, 20, 150)
    monkeypatch.setattr(sparse, "PICKED", {})
    monkeypatch.setenv("GIST_PRODUCT_KERNEL", "fastest")
    kernels = {"broken": broken, "slow": slow, "good": KERNELS["embedding_bag"]}
    monkeypatch.setattr(sparse, "KERNELS", {**KERNELS, **kernels})
    for name in ("sparse_csr", "dgl", "embedding_bag"):
        monkeypatch.setitem(sparse.KERNELS, name, slow)
    monkeypatch.setattr(sparse, "_TRIAL_WORK", 100)
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(20, 9, dtype=dtype)
        with caplog.at_level("INFO", logger="gist"):
            for _ in range(2):
                out = matrix_of(given) @ x
        assert relative_error(out, torch.from_numpy(given @ x.double().numpy())) < 1e-5
    assert {("cpu", kind): "good" for kind in (torch.float32, torch.float64)} == sparse.PICKED
    assert [line.count("broken inf") for line in caplog.messages] == [1, 1]
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(ConfigError, match="may be another one in the next run"):
            matrix_of(given) @ x
    finally:
        torch.use_deterministic_algorithms(False)


def test_graphs_of_dgl_live_as_long_as_their_matrix(monkeypatch):
    monkeypatch.setenv("GIST_PRODUCT_KERNEL", "dgl")
    before = len(sparse._dgl_graphs)
    matrix, x = matrix_of(random_matrix(30, 20, 150)), torch.randn(20, 9)
    first = matrix @ x
    assert torch.equal(matrix @ x, first)
    assert relative_error(matrix @ x[:, :1], first[:, :1].double()) < 1e-5
    assert len(sparse._dgl_graphs) == before + 1
    del matrix
    gc.collect()
    assert len(sparse._dgl_graphs) == before


# Autocast


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_under_autocast_it_runs_in_the_dtype_of_autocast(kind):
    given = random_matrix(30, 20, 150)
    matrix = matrix_of(given)
    x = torch.randn(20, 9, requires_grad=True)
    exact = torch.from_numpy(given.toarray()) @ x.detach().double()
    with torch.autocast("cpu", kind):
        out = matrix @ x
        wide = matrix @ x.double()
    assert (out.dtype, wide.dtype) == (kind, torch.float64)
    assert relative_error(out.detach(), exact) < DTYPES[kind]
    out.float().sum().backward()
    assert x.grad.dtype == torch.float32
    expected = torch.from_numpy(given.T.toarray()) @ torch.ones(30, 9, dtype=torch.float64)
    assert relative_error(x.grad, expected) < DTYPES[kind]


# Without memory, and counted


def test_operations_are_counted_forward_and_backward():
    given = random_matrix(30, 20, 150)
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(20, 9, dtype=dtype, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            out = matrix_of(given) @ x
            assert counter.get_total_flops() == 2 * 150 * 9
            out.sum().backward()
        assert counter.get_total_flops() == 2 * 2 * 150 * 9


@pytest.mark.parametrize("kind", ["meta", "fake"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [False, True])
def test_without_memory_shapes_dtypes_and_counts_are_right(kind, dtype, symmetric):
    n, m, entries, d = 2**24, 2**24 if symmetric else 2**23, 2**33, 2**12
    device = "meta" if kind == "meta" else "cpu"
    without_memory = nullcontext() if kind == "meta" else FakeTensorMode()
    with without_memory, FlopCounterMode(display=False) as counter:
        rows = CSR(
            torch.empty(n + 1, dtype=torch.int64, device=device),
            torch.empty(entries, dtype=torch.int64, device=device),
            torch.empty(entries, device=device),
            m,
        )
        x = torch.empty(m, d, dtype=dtype, device=device, requires_grad=True)
        out = SparseMatrix(rows, symmetric=symmetric) @ x
        out.sum().backward()
    for tensor, size in ((out, n), (x.grad, m)):
        assert (tensor.shape, tensor.dtype, tensor.device.type) == ((size, d), dtype, device)
    assert counter.get_total_flops() == 2 * 2 * entries * d


def test_a_matrix_is_not_spoilt_by_fake_features():
    matrix = matrix_of(random_matrix(30, 20, 150))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert (matrix @ torch.randn(20, 9)).shape == (30, 9)
    assert type(matrix @ torch.randn(20, 9)) is torch.Tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_operator_is_as_declared(dtype):
    rows = matrix_of(random_matrix(30, 20, 150)).rows
    args = (rows.indptr, rows.indices, rows.values.to(dtype), torch.randn(20, 9, dtype=dtype), 20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of the check itself
        torch.library.opcheck(
            torch.ops.gist.csr_product.default, args, test_utils=("test_schema", "test_faketensor")
        )
