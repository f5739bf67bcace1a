"""A layer's features of all nodes, in memory or in a file that is mapped into it.

Shape legend: ``N`` nodes, ``d`` feature columns.
"""

from __future__ import annotations

import mmap
import os
import tempfile

import torch
from torch import Tensor

from gist.errors import ConfigError


class Hidden:
    """Features ``[N, d]`` of all nodes, and what they take in memory.

    Those in a file are ordinary tensors. The kernel brings pages of the file in when they are used;
    who uses them says so (:meth:`touched`), and they are let go of again, so that no more of them
    are resident than allowed. What was written stays in the file.

    Args:
        rows: The features.
        mapping: The file behind them; None for features in memory.
        allowance: Bytes of the file that may be resident.
    """

    def __init__(self, rows: Tensor, mapping: mmap.mmap | None = None, allowance: int = 0) -> None:
        self.rows = rows
        self._mapping, self._allowance, self._touched = mapping, allowance, 0

    @classmethod
    def in_file(cls, shape: tuple[int, int], dtype: torch.dtype, allowance: int) -> Hidden:
        """Room in a file in the folder that ``TMPDIR`` names.

        The file has no name any more once it is mapped: nothing remains of it when the features are
        no longer used, however the process ends.

        Args:
            shape: ``(N, d)``.
            dtype: Of the features.
            allowance: Bytes of the file that may be resident.

        Raises:
            ConfigError: the disk has no room.
        """
        count = shape[0] * shape[1]
        size = count * dtype.itemsize
        folder = tempfile.gettempdir()
        with tempfile.TemporaryFile(prefix="gist-hidden-", dir=folder) as file:
            try:
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk shows here, not later
            except OSError as error:
                raise ConfigError(
                    "no room on disk for a hidden layer that does not fit into memory_limit",
                    got=f"{error.strerror}, {size:,} bytes in {folder}",
                    remedy="set TMPDIR to a folder with more room, or raise memory_limit",
                ) from error
            mapping = mmap.mmap(file.fileno(), size)
        rows = torch.frombuffer(mapping, dtype=dtype, count=count).view(shape)
        return cls(rows, mapping, allowance)

    @property
    def is_in_file(self) -> bool:
        """Whether the features are in a file."""
        return self._mapping is not None

    @property
    def row_bytes(self) -> int:
        """Bytes of one node's features."""
        return self.rows.size(1) * self.rows.element_size()

    @property
    def bytes(self) -> int:
        """Bytes of memory that they take."""
        return self._allowance if self.is_in_file else self.rows.numel() * self.rows.element_size()

    @property
    def most_rows(self) -> int:
        """Rows to use at a time, so that no more are resident than allowed; at least 1."""
        if not self.is_in_file:
            return self.rows.size(0)
        return max(self._allowance // self.row_bytes, 1)

    def touched(self, rows: int) -> None:
        """So many rows were used, and may be let go of."""
        self._touched += rows
        if self._mapping is not None and self._touched >= self.most_rows:
            self._mapping.madvise(mmap.MADV_DONTNEED)
            self._touched = 0

    def columns(self, columns: slice) -> Hidden:
        """Some columns of all nodes: a view, whose rows count as whole rows."""
        return _Columns(self, columns)


class _Columns(Hidden):
    def __init__(self, whole: Hidden, columns: slice) -> None:
        super().__init__(whole.rows[:, columns], whole._mapping, whole._allowance)
        self._whole = whole

    @property
    def row_bytes(self) -> int:
        """See :attr:`Hidden.row_bytes`: pages are brought in whole."""
        return self._whole.row_bytes

    def touched(self, rows: int) -> None:
        """See :meth:`Hidden.touched`."""
        self._whole.touched(rows)
