import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gist.partition import blocks
from gist.partition.blocks import are_plain, gather_block, scatter_block

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool]


@st.composite
def cases(draw: st.DrawFn):
    height, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    rows = draw(st.lists(st.integers(0, height - 1), unique=True, min_size=1))
    columns = draw(st.lists(st.integers(0, width - 1), unique=True, min_size=1))
    dtype = draw(st.sampled_from(DTYPES))
    matrix = (torch.rand(height, width) * 9 - 4).to(dtype)
    if draw(st.booleans()):
        matrix = matrix.t().contiguous().t()  # columns lie together
    return matrix, torch.tensor(sorted(rows)), torch.tensor(sorted(columns))


@given(cases(), st.integers(1, 4))
def test_blocks_are_what_torch_indexes_whatever_the_threads(case, threads):
    matrix, rows, columns = case
    expected = matrix[rows[:, None], columns]
    got = torch.empty_like(expected)
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "_ENTRIES_PER_THREAD", 1)
        torch.set_num_threads(threads)
        try:
            gather_block(matrix, rows, columns, got)
            target, wanted = torch.zeros_like(matrix), torch.zeros_like(matrix)
            scatter_block(target, rows, columns, expected)
        finally:
            torch.set_num_threads(before)
    assert torch.equal(got, expected)
    wanted[rows[:, None], columns] = expected
    assert torch.equal(target, wanted)


def test_an_error_in_a_thread_comes_up(monkeypatch):
    monkeypatch.setattr(blocks, "_ENTRIES_PER_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    rows = torch.tensor([0, 0, 0, 5])  # the last one does not exist
    with pytest.raises(IndexError):
        gather_block(torch.zeros(2, 2), rows, torch.arange(2), torch.empty(4, 2))


def test_only_plain_matrices_of_one_dtype_are_taken():
    matrix, index = torch.zeros(3, 4), torch.arange(2)
    assert are_plain(matrix, torch.empty(2, 2), index)
    assert are_plain(nn.Parameter(matrix), torch.empty(2, 2), index)
    assert not are_plain(matrix, torch.empty(2, 2, dtype=torch.float64), index)
    assert not are_plain(matrix, torch.empty(4), index)
    assert not are_plain(matrix.to("meta"), torch.empty(2, 2, device="meta"), index)
    assert not are_plain(matrix, torch.empty(2, 2), index.to("meta"))
    assert not are_plain(matrix.to_sparse(), torch.empty(2, 2), index)
    assert not are_plain(matrix.to(torch.complex128), torch.empty(2, 2, dtype=torch.complex128))
