"""Rows of tensors, dense or sparse.

Shape legend: ``N`` rows, ``F`` columns, ``E`` stored entries, ``n`` rows that are taken.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor


def is_csr(tensor: Tensor) -> bool:
    """Whether a tensor is stored by compressed rows."""
    return tensor.layout == torch.sparse_csr


def take_rows(tensor: Tensor, index: Tensor) -> Tensor:
    """Some rows of a tensor, in the order asked for, in its layout.

    Args:
        tensor: ``[N, ...]`` dense, or ``[N, F]`` sparse CSR.
        index: ``[n]`` int64 on the same device; rows may be asked for twice.

    Returns:
        ``[n, ...]``; what it takes grows with the entries of these rows alone.
    """
    if not is_csr(tensor):
        return tensor.index_select(0, index)
    indptr, columns, values = parts(tensor)
    first = indptr.index_select(0, index)
    counts = indptr.index_select(0, index + 1) - first
    starts = torch.zeros(len(index) + 1, dtype=indptr.dtype, device=indptr.device)
    torch.cumsum(counts, 0, out=starts[1:])
    total = int(starts[-1])
    shift = (first - starts[:-1]).repeat_interleave(counts, output_size=total)
    entries = torch.arange(total, device=shift.device, dtype=shift.dtype) + shift
    cut = (starts, columns.index_select(0, entries), values.index_select(0, entries))
    return csr_tensor(*cut, tensor.size(1))


def csr_tensor(indptr: Tensor, columns: Tensor, values: Tensor, num_cols: int) -> Tensor:
    """A sparse CSR tensor ``[N, num_cols]`` of parts that are known to be sound.

    Args:
        indptr: ``[N + 1]``.
        columns: ``[E]``.
        values: ``[E]``.
        num_cols: ``F``.
    """
    shape = (indptr.numel() - 1, num_cols)
    with warnings.catch_warnings():  # that this layout is in beta is said once, at the first one
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support", category=UserWarning)
        return torch.sparse_csr_tensor(indptr, columns, values, shape, check_invariants=False)


def parts(tensor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of a sparse CSR tensor: where rows begin ``[N + 1]``, columns ``[E]`` and values ``[E]``."""
    return tensor.crow_indices(), tensor.col_indices(), tensor.values()


def row_numbers(tensor: Tensor) -> Tensor:
    """``[E]`` int64: the row of every stored entry of a sparse CSR tensor."""
    indptr, columns, _ = parts(tensor)
    rows = torch.arange(tensor.size(0), device=indptr.device)
    return rows.repeat_interleave(indptr.diff(), output_size=columns.numel())
