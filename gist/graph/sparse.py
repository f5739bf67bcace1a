"""Constant sparse matrices and their product with dense features: the kernels of the package.

Shape legend: ``N`` rows, ``M`` columns, ``E`` stored entries, ``d`` feature columns.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor

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
        """``self @ x`` for dense ``x`` [M, d], without autograd. Returns [N, d].

        On the CPU the embedding-bag kernel runs at memory bandwidth in float32 and bfloat16 and is
        several times faster than the sparse CSR product; in float64 it is the other way round.
        """
        values = self._cast.get(x.dtype)
        if values is None:
            values = self._cast[x.dtype] = self.values.to(x.dtype)
        if x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16):
            return F.embedding_bag(
                self.indices,
                x.contiguous(),
                self.indptr,
                mode="sum",
                per_sample_weights=values,
                include_last_offset=True,
            )
        shape = (self.indptr.numel() - 1, self.num_cols)
        matrix = torch.sparse_csr_tensor(
            self.indptr, self.indices, values, shape, check_invariants=False
        )
        return matrix @ x


class _Product(torch.autograd.Function):
    """``A @ x`` whose backward is the product with the known transpose of ``A``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: CSR, transpose: CSR) -> Tensor:
        ctx.transpose = transpose
        return matrix.product(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, None, None]:
        grad = ctx.transpose.product(grad_outputs[0]) if ctx.needs_input_grad[0] else None
        return grad, None, None


class SparseMatrix:
    """A constant ``N x M`` sparse matrix that multiplies dense tensors, differentiably in these.

    A plain object, not a tensor: modules, copies and optimisers never see it. The transpose is
    built once, on first use; a symmetric matrix is its own.
    """

    def __init__(self, rows: CSR, *, symmetric: bool = False) -> None:
        self.rows = rows
        self.symmetric = symmetric

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
        if self.symmetric:
            return self.rows
        transposed = self.rows.to_scipy().T.tocsr()
        transposed.sort_indices()
        return CSR.from_scipy(transposed).to(self.rows.values.device)

    def matmul(self, x: Tensor) -> Tensor:
        """``self @ x`` for dense ``x`` [M, d]; returns [N, d]."""
        if x.requires_grad and torch.is_grad_enabled():
            product: Tensor = _Product.apply(x, self.rows, self.columns)  # type: ignore[no-untyped-call]
            return product
        return self.rows.product(x)

    __matmul__ = matmul

    def to(self, device: torch.device | str) -> SparseMatrix:
        """The same matrix on ``device``."""
        return SparseMatrix(self.rows.to(device), symmetric=self.symmetric)


def sparse_if_worth_it(x: Tensor) -> Tensor | SparseMatrix:
    """``x`` as a sparse matrix where few of its entries are not zero; else itself."""
    if x.device.type != "cpu" or float(torch.count_nonzero(x)) > SPARSE_BELOW * x.numel():
        return x
    return SparseMatrix.from_scipy(sp.csr_matrix(x.numpy()))
