"""Rows of dense and sparse tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gist.csr import csr_tensor, parts, row_numbers, take_rows


@given(
    seed=st.integers(0, 999),
    rows=st.integers(1, 8),
    columns=st.integers(1, 6),
    kind=st.sampled_from([torch.int32, torch.int64]),
    taken=st.integers(0, 12),
)
def test_rows_of_a_sparse_matrix_are_those_of_the_dense_one(seed, rows, columns, kind, taken):
    rng = torch.Generator().manual_seed(seed)
    dense = torch.randn(rows, columns, generator=rng).relu()
    sparse = dense.to_sparse_csr()
    indptr, cols, values = parts(sparse)
    sparse = csr_tensor(indptr.to(kind), cols.to(kind), values, columns)
    index = torch.randint(rows, (taken,), generator=rng)
    cut = take_rows(sparse, index)
    assert torch.equal(cut.to_dense(), dense[index])
    assert parts(cut)[0].dtype == parts(cut)[1].dtype == kind
    assert parts(cut)[2].numel() == int((dense[index] != 0).sum())


def test_rows_of_a_dense_tensor_keep_their_shape():
    x = torch.arange(24).view(4, 2, 3)
    assert torch.equal(take_rows(x, torch.tensor([3, 0, 3])), x[[3, 0, 3]])


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_row_numbers_count_empty_rows(kind):
    matrix = csr_tensor(
        torch.tensor([0, 0, 2, 2, 3], dtype=kind),
        torch.tensor([1, 4, 0], dtype=kind),
        torch.ones(3),
        5,
    )
    assert row_numbers(matrix).tolist() == [1, 1, 3]
