"""Constant sparse matrices and their product with dense features: the kernels of the package.

Shape legend: ``N`` rows, ``M`` columns, ``E`` stored entries, ``d`` feature columns.

A product is one operator for PyTorch, ``gist::csr_product``. It has shapes and dtypes without
memory (meta and fake tensors), and :mod:`torch.utils.flop_counter` counts ``2 E d`` for it, forward
and backward alike.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula
from torch.utils.weak import WeakIdKeyDictionary

from gist.errors import ConfigError, DataError
from gist.graph.dgl_graph import dgl_graph, import_dgl

SPARSE_BELOW = 0.1
"""Share of entries that are not zero, below which a sparse product beats a dense one here."""


class CSR:
    """Compressed rows of an ``N x M`` matrix: indptr [N + 1], indices [E] and values [E]."""

    def __init__(self, indptr: Tensor, indices: Tensor, values: Tensor, num_cols: int) -> None:
        self.indptr, self.indices, self.values = indptr, indices, values
        self.num_cols = num_cols
        self._cast: dict[torch.dtype, Tensor] = {values.dtype: values}

    @classmethod
    def from_scipy(cls, matrix: sp.csr_matrix) -> CSR:
        """Takes a scipy CSR matrix; indices become int32 where they fit: half the traffic."""
        small = max(matrix.nnz, *matrix.shape) < 2**31 - 1
        kind = np.int32 if small else np.int64
        return cls(
            torch.from_numpy(matrix.indptr.astype(kind)),
            torch.from_numpy(matrix.indices.astype(kind)),
            torch.from_numpy(matrix.data),
            matrix.shape[1],
        )

    def to_scipy(self) -> sp.csr_matrix:
        """The same matrix for scipy, sharing memory on the CPU."""
        shape = (self.indptr.numel() - 1, self.num_cols)
        arrays = (self.values.cpu().numpy(), self.indices.cpu().numpy(), self.indptr.cpu().numpy())
        return sp.csr_matrix(arrays, shape=shape)

    def to(self, device: torch.device | str) -> CSR:
        """The same matrix on ``device``."""
        return CSR(
            self.indptr.to(device), self.indices.to(device), self.values.to(device), self.num_cols
        )

    def product(self, x: Tensor) -> Tensor:
        """``self @ x`` for dense ``x`` [M, d], without autograd, by :func:`product_kernel`.

        The result depends on neither the number of threads nor the other columns of ``x``.

        Returns:
            ``[N, d]``, of the dtype of ``x``.

        Raises:
            DataError: ``x`` has not ``M`` rows.
        """
        if x.size(0) != self.num_cols:
            raise DataError(
                "a sparse matrix is multiplied with features of another number of nodes",
                got=f"features of shape {tuple(x.shape)}",
                expected=f"{self.num_cols} rows",
            )
        values = self._values_as(x.dtype)
        out: Tensor = _csr_product(self.indptr, self.indices, values, x, self.num_cols)
        return out

    def _values_as(self, dtype: torch.dtype) -> Tensor:
        values = self._cast.get(dtype)
        if values is None:
            values = self.values.to(dtype)
            if type(values) is type(self.values):  # a fake tensor would outlive its mode
                self._cast[dtype] = values
        return values

    @property
    def _has_memory(self) -> bool:
        return not (self.values.is_meta or isinstance(self.values, FakeTensor))


def _by_embedding_bag(
    indptr: Tensor, indices: Tensor, values: Tensor, x: Tensor, num_cols: int
) -> Tensor:
    # Row i is the weighted sum of the rows of a table: a bag of its neighbours. This is what
    # torch.nn.functional.embedding_bag calls, without its checks in Python.
    scale_by_count, mode_sum, sparse_gradient, last_offset = False, 0, False, True
    return torch.embedding_bag(
        x.contiguous(),
        indices,
        indptr,
        scale_by_count,
        mode_sum,
        sparse_gradient,
        values,
        last_offset,
    )[0]


def _by_sparse_csr(
    indptr: Tensor, indices: Tensor, values: Tensor, x: Tensor, num_cols: int
) -> Tensor:
    shape = (indptr.numel() - 1, num_cols)
    return torch.sparse_csr_tensor(indptr, indices, values, shape, check_invariants=False) @ x


def _by_dgl(indptr: Tensor, indices: Tensor, values: Tensor, x: Tensor, num_cols: int) -> Tensor:
    known = _dgl_graphs.get(indptr)
    if known is None or known[0] is not indices:
        own = (indptr.detach(), indices.detach())  # else the graph would keep its own key alive
        known = _dgl_graphs[indptr] = (indices, dgl_graph(*own, num_cols))
    out: Tensor = import_dgl().ops.u_mul_e_sum(known[1], x.contiguous(), values.unsqueeze(1))
    return out


_dgl_graphs: Any = WeakIdKeyDictionary()  # for as long as the matrices live

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]

KERNELS: dict[str, Kernel] = {
    "embedding_bag": _by_embedding_bag,
    "sparse_csr": _by_sparse_csr,
    "dgl": _by_dgl,
}
"""What a product can run on, by name; ``"dgl"`` where DGL is installed."""

KERNEL_VARIABLE = "GIST_PRODUCT_KERNEL"
"""Environment variable that names the kernel of every product, instead of the rule.

``"fastest"`` tries all of them at the first product for each type of device and dtype. What is
picked may differ from run to run, and with it how products are rounded.
"""

FASTEST = "fastest"

PICKED: dict[tuple[str, torch.dtype], str] = {}
"""The kernels that ``"fastest"`` stands for so far, by type of device and dtype."""

_TRIAL_WORK = 2**24
"""Entries times columns of a trial: some milliseconds."""

_TRIAL_CALLS = 3


def product_kernel(device: str, dtype: torch.dtype) -> str:
    """The kernel that products run on.

    ``"embedding_bag"`` on the CPU in float32, bfloat16 and float16: it moves each row once, at
    memory bandwidth, and was the fastest at every width from 7 to 4,096 on graphs of 2,000 to
    169,343 nodes (``examples/benchmarks/graph_product.py``). Splitting wide features into blocks of
    columns, and sorting rows by degree, did not pay. In float64 it is far slower than
    ``"sparse_csr"``, which is also what serves on other devices. A fixed rule instead of a trial:
    the kernels round differently, and a run must be the same bits every time, and on every machine.

    Args:
        device: Device type, such as ``"cpu"``.
        dtype: Of the features.

    Returns:
        A name in :data:`KERNELS`, or :data:`FASTEST`.

    Raises:
        ConfigError: :data:`KERNEL_VARIABLE` names no kernel, or asks for a trial in a deterministic
            run.
    """
    named = os.environ.get(KERNEL_VARIABLE)
    if named is None:
        fast = device == "cpu" and dtype in (torch.float32, torch.bfloat16, torch.float16)
        return "embedding_bag" if fast else "sparse_csr"
    if named not in (*KERNELS, FASTEST):
        raise ConfigError(
            f"{KERNEL_VARIABLE} names no kernel",
            got=repr(named),
            expected=" or ".join((*KERNELS, FASTEST)),
        )
    if named == FASTEST and torch.are_deterministic_algorithms_enabled():
        raise ConfigError(
            "the fastest kernel may be another one in the next run, which rounds differently",
            got=f"{KERNEL_VARIABLE}={named}, deterministic algorithms",
            remedy="name a kernel, or leave deterministic out",
        )
    return named


def _fastest(*args: Any) -> str:
    """The fastest kernel for such a device and dtype, by a trial on the first rows of a matrix."""
    indptr, indices, values, x, num_cols = args
    key = (x.device.type, x.dtype)
    if key not in PICKED:
        entries = max(_TRIAL_WORK // x.size(1), 1)
        rows = max(int(torch.searchsorted(indptr, entries, right=True)) - 1, 1)
        last = int(indptr[rows])
        part = (indptr[: rows + 1], indices[:last], values[:last], x, num_cols)
        seconds = {name: _trial_seconds(kernel, part) for name, kernel in KERNELS.items()}
        PICKED[key] = min(seconds, key=lambda name: seconds[name])
        measured = ", ".join(f"{name} {1e3 * s:.3g} ms" for name, s in seconds.items())
        logging.getLogger(__name__).info("graph product, %s %s: %s", *key, measured)
    return PICKED[key]


def _trial_seconds(kernel: Kernel, args: tuple[Any, ...]) -> float:
    """The best of a few calls; infinity for a kernel that is not there, or cannot do this."""

    def call() -> float:
        start = time.perf_counter()
        out = kernel(*args)
        if out.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    try:
        call()  # what is made once is made here
        return min(call() for _ in range(_TRIAL_CALLS))
    except Exception:  # anything that a library says of a dtype or device
        return math.inf


_OPERATOR = "gist::csr_product"

torch.library.define(
    _OPERATOR, "(Tensor indptr, Tensor indices, Tensor values, Tensor x, int num_cols) -> Tensor"
)


@torch.library.impl(_OPERATOR, "CompositeExplicitAutograd")
def _run(indptr: Tensor, indices: Tensor, values: Tensor, x: Tensor, num_cols: int) -> Tensor:
    if indices.numel() == 0 or x.numel() == 0:
        return x.new_zeros(indptr.numel() - 1, x.size(1))
    args = (indptr, indices, values, x, num_cols)
    name = product_kernel(x.device.type, x.dtype)
    return KERNELS[_fastest(*args) if name == FASTEST else name](*args)


@torch.library.register_fake(_OPERATOR)  # type: ignore[untyped-decorator]
def _shape(indptr: Tensor, indices: Tensor, values: Tensor, x: Tensor, num_cols: int) -> Tensor:
    return x.new_empty(indptr.numel() - 1, x.size(1))


_csr_product = torch.ops.gist.csr_product.default


@register_flop_formula(torch.ops.gist.csr_product)
def _flops(
    indptr: torch.Size, indices: torch.Size, values: torch.Size, x: torch.Size, *_: Any, **__: Any
) -> int:
    return 2 * indices[0] * x[1]


class _Product(torch.autograd.Function):
    """``A @ x`` whose backward is the product with the known transpose of ``A``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: CSR, transpose: CSR) -> Tensor:
        ctx.matrix, ctx.transpose = matrix, transpose
        return matrix.product(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        return _multiply(grad_outputs[0], ctx.transpose, ctx.matrix), None, None


def _multiply(x: Tensor, matrix: CSR, transpose: CSR) -> Tensor:
    out: Tensor = _Product.apply(x, matrix, transpose)  # type: ignore[no-untyped-call]
    return out


class SparseMatrix:
    """A constant ``N x M`` sparse matrix that multiplies dense tensors, differentiably in these.

    A plain object, not a tensor: modules, copies and optimisers never see it. The transpose is
    built once, on first use; a symmetric matrix is its own.

    Without memory (``rows`` on the meta device, or fake) it multiplies tensors of the same kind:
    shapes, dtypes and counts of operations are right, forward and backward.

    Args:
        rows: The matrix.
        symmetric: Whether it is its own transpose; believed, not checked.
        columns: Makes the transpose, where that is less work than to transpose.
    """

    def __init__(
        self, rows: CSR, *, symmetric: bool = False, columns: Callable[[], CSR] | None = None
    ) -> None:
        self.rows = rows
        self.symmetric = symmetric
        self._make_columns = columns

    @classmethod
    def from_scipy(cls, matrix: sp.spmatrix, *, symmetric: bool = False) -> SparseMatrix:
        """Takes any scipy sparse matrix; ``symmetric`` is believed, not checked."""
        return cls(CSR.from_scipy(matrix.tocsr()), symmetric=symmetric)

    @property
    def shape(self) -> tuple[int, int]:
        """``(N, M)``."""
        return self.rows.indptr.numel() - 1, self.rows.num_cols

    @cached_property
    def columns(self) -> CSR:
        """Compressed rows of the transpose."""
        rows = self.rows
        if self.symmetric:
            return rows
        if self._make_columns is not None:
            return self._make_columns()
        if not rows._has_memory:  # a matrix of the same size
            indptr = rows.indptr.new_empty(rows.num_cols + 1)
            return CSR(indptr, rows.indices, rows.values, rows.indptr.numel() - 1)
        transposed = rows.to_scipy().T.tocsr()
        transposed.sort_indices()
        return CSR.from_scipy(transposed).to(rows.values.device)

    def matmul(self, x: Tensor) -> Tensor:
        """``self @ x`` for dense ``x`` [M, d]; returns [N, d].

        Under :class:`torch.autocast` it runs in the dtype of autocast, as every matrix product
        there: half the bytes to move, which is all that it costs. float64 stays as it is.

        Raises:
            DataError: ``x`` has not ``M`` rows.
        """
        kind = x.device.type
        if not x.is_meta and x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        if x.requires_grad and torch.is_grad_enabled():
            return _multiply(x, self.rows, self.columns)
        return self.rows.product(x)

    __matmul__ = matmul

    def to(self, device: torch.device | str) -> SparseMatrix:
        """The same matrix on ``device``."""
        known = "columns" in vars(self) or self._make_columns is not None
        columns = (lambda: self.columns.to(device)) if known and not self.symmetric else None
        return SparseMatrix(self.rows.to(device), symmetric=self.symmetric, columns=columns)


def sparse_if_worth_it(x: Tensor) -> Tensor | SparseMatrix:
    """``x`` as a sparse matrix where few of its entries are not zero; else itself."""
    if product_work(x) < _dense_work(x):
        return SparseMatrix.from_scipy(sp.csr_matrix(x.numpy()))
    return x


def product_work(x: Tensor) -> float:
    """What multiplying with a constant ``x`` costs, in stored entries of a sparse matrix.

    That is those of its entries that are not zero, or :data:`SPARSE_BELOW` of all of them, which is
    what a dense product costs; always the latter where products with ``x`` stay dense.
    """
    if x.device.type != "cpu":
        return _dense_work(x)
    return min(float(torch.count_nonzero(x)), _dense_work(x))


def _dense_work(x: Tensor) -> float:
    return SPARSE_BELOW * x.numel()
