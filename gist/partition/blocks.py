"""Blocks of a matrix on the CPU: chosen rows and columns, copied out and in, row by row.

One row of numpy's ``take`` and of its assignment costs half to a third of what torch's index
kernels cost, which compute an offset from two indices for every single entry. A row is read from
memory once, so that a block costs what reading its rows costs. Both release the interpreter lock:
rows are shared out over as many threads as torch uses.

Shape legend: a matrix ``[R, C]``, ``r`` rows and ``c`` columns of it.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By bytes per entry, kinds that numpy knows: entries are moved, never read as numbers."""

_ENTRIES_PER_THREAD = 2**20
"""A thread costs what about a tenth of so many entries cost."""


def are_plain(matrix: Tensor, part: Tensor, *index: Tensor) -> bool:
    """Whether these are matrices of one dtype, and all have memory on the CPU for numpy to use."""
    return (
        matrix.dim() == part.dim() == 2
        and matrix.dtype == part.dtype
        and matrix.element_size() in _BITS
        and all(
            type(t) in (Tensor, nn.Parameter)
            and t.device.type == "cpu"
            and t.layout == torch.strided
            for t in (matrix, part, *index)
        )
    )


def gather_block(matrix: Tensor, rows: Tensor, columns: Tensor, out: Tensor) -> None:
    """``out[i, j] = matrix[rows[i], columns[j]]``.

    Args:
        matrix: ``[R, C]``.
        rows: ``[r]`` int64.
        columns: ``[c]`` int64.
        out: ``[r, c]``, of the same dtype.
    """
    source, target, kept = _bits(matrix), _bits(out), columns.numpy()

    def some(begin: int, end: int) -> None:
        for place, row in enumerate(rows[begin:end].tolist(), begin):
            source[row].take(kept, None, target[place], "clip")

    _over_rows(rows.numel(), columns.numel(), some)


def scatter_block(matrix: Tensor, rows: Tensor, columns: Tensor, part: Tensor) -> None:
    """``matrix[rows[i], columns[j]] = part[i, j]``: the reverse of :func:`gather_block`."""
    target, source, kept = _bits(matrix), _bits(part), columns.numpy()

    def some(begin: int, end: int) -> None:
        for place, row in enumerate(rows[begin:end].tolist(), begin):
            target[row][kept] = source[place]

    _over_rows(rows.numel(), columns.numel(), some)


def _bits(tensor: Tensor) -> Any:
    return tensor.detach().view(_BITS[tensor.element_size()]).numpy()


def _over_rows(rows: int, columns: int, job: Callable[[int, int], None]) -> None:
    threads = min(torch.get_num_threads(), rows, rows * columns // _ENTRIES_PER_THREAD)
    if threads < 2:
        job(0, rows)
        return
    ends = [rows * i // threads for i in range(threads + 1)]
    with ThreadPoolExecutor(threads - 1, thread_name_prefix="gist-rows") as pool:
        others = [pool.submit(job, *ends[i : i + 2]) for i in range(1, threads)]
        job(0, ends[1])
        for other in others:
            other.result()
