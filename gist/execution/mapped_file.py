"""A safetensors file as memory: mapped as a whole, and read and written in rows besides.

A subnet holds some rows of a large matrix, and in them entries all over. Through the mapping, each
page of such a row would be fetched by a fault of its own, one at a time. So rows are read as a
whole, ahead of their use, into a small buffer, and the entries taken from there; to write some,
their rows are read, changed and written back. Mapping and rows see the same bytes: both are the
system's cache of the file.
"""

from __future__ import annotations

import itertools
import mmap
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from gist.errors import CheckpointError
from gist.execution.tensorfile import FileLayout, TensorPlace, bytes_of
from gist.partition.transfer import Index, gather, scatter_

BLOCK_BYTES = 2**20
"""Rows that a thread reads before it takes entries from them; they stay in its cache meanwhile."""

_GAP_BYTES = 2**14
"""Unwanted rows between two wanted ones that are read along rather than left out."""

_BLOCKS_PER_JOB = 8
"""A job asks the system for all its rows at once, so that the disk has many reads at hand."""

_SMALL_BYTES = 2**20
"""Tensors up to this size are read and written through the mapping."""

_MAP_NORESERVE = 0x4000
"""Of Linux; a private mapping may be larger than memory, since few of its pages are written."""

Job = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class _Block:
    """Some of the wanted rows of a tensor, and the rows that are read for them.

    Attributes:
        begin: Of the wanted rows, the first.
        end: The one after the last.
        runs: ``(first row, number of rows)`` of the tensor, read one after the other.
        within: ``[end - begin]`` int64, where each wanted row lies among those.
    """

    begin: int
    end: int
    runs: list[tuple[int, int]]
    within: Tensor

    @property
    def rows(self) -> int:
        """How many are read."""
        return sum(count for _, count in self.runs)


class MappedFile:
    """Tensors that live in a file.

    Args:
        path: A file of this layout.
        layout: Where its tensors lie.
        private: Changes stay in memory, and the file as it is.

    Attributes:
        tensors: All of them by name; changes go to the file.
    """

    def __init__(self, path: Path, layout: FileLayout, *, private: bool = False) -> None:
        self.path, self.layout, self.private = path, layout, private
        self._file = os.open(path, os.O_RDWR | getattr(os, "O_CLOEXEC", 0))
        weakref.finalize(self, os.close, self._file)
        flags = mmap.MAP_PRIVATE | _MAP_NORESERVE if private else mmap.MAP_SHARED
        self._map = mmap.mmap(self._file, layout.nbytes, flags=flags)
        self.tensors = {name: self._mapped(place) for name, place in layout.places.items()}
        self._buffers = threading.local()

    @classmethod
    def create(cls, path: Path, layout: FileLayout) -> MappedFile:
        """A new file of zeros, all of its room on the disk taken.

        Raises:
            OSError: the file exists, or the disk has no room.
        """
        with path.open("xb") as file:
            os.posix_fallocate(file.fileno(), 0, layout.nbytes)  # else a full disk kills, later
            file.write(layout.header)
        return cls(path, layout)

    def _mapped(self, place: TensorPlace) -> Tensor:
        count = torch.Size(place.shape).numel()
        if not count:
            return torch.empty(place.shape, dtype=place.dtype)
        flat = torch.frombuffer(self._map, dtype=place.dtype, count=count, offset=place.offset)
        return flat.view(place.shape)

    def drop(self) -> None:
        """Lets go of the memory that the mapping takes; what it changed stays."""
        if not self.private and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def sync(self) -> None:
        """Returns when everything is on the disk."""
        os.fsync(self._file)

    def reads(self, name: str, index: Index, out: Tensor) -> Iterator[Job]:
        """Jobs that fill ``out``, contiguous, with a tensor's entries; in any order or at once."""
        place = self.layout.places[name]
        if _is_small(place):
            yield partial(gather, self.tensors[name], index, out)
            return
        whole = _has_whole_rows(index)

        def job(blocks: list[_Block]) -> None:
            self._announce(place, blocks)
            for block in blocks:
                part = out[block.begin : block.end]
                if whole and block.rows == len(part):
                    self._read(place, block, bytes_of(part))
                else:
                    gather(self._rows(place, block), (block.within, *index[1:]), out=part)

        for blocks in _jobs(index[0], place):
            yield partial(job, blocks)

    def writes(self, name: str, index: Index, part: Tensor) -> Iterator[Job]:
        """Jobs that put ``part`` into a tensor's entries; in any order or at once."""
        place = self.layout.places[name]
        if _is_small(place):
            yield partial(scatter_, self.tensors[name], index, part)
            return
        part = part.contiguous()
        whole = _has_whole_rows(index)

        def job(blocks: list[_Block]) -> None:
            if not whole:
                self._announce(place, blocks)
            for block in blocks:
                some = part[block.begin : block.end]
                if whole and block.rows == len(some):
                    self._write(place, block, bytes_of(some))
                else:
                    rows = self._rows(place, block)
                    scatter_(rows, (block.within, *index[1:]), some)
                    self._write(place, block, bytes_of(rows))

        for blocks in _jobs(index[0], place):
            yield partial(job, blocks)

    def _announce(self, place: TensorPlace, blocks: list[_Block]) -> None:
        # The disk works on all of them while the first is being waited for.
        if hasattr(os, "posix_fadvise"):
            for begin, length in (run for block in blocks for run in _bytes(place, block)):
                os.posix_fadvise(self._file, begin, length, os.POSIX_FADV_WILLNEED)

    def _rows(self, place: TensorPlace, block: _Block) -> Tensor:
        """The rows of a block, in this thread's buffer: overwritten by the next."""
        length = block.rows * _row_bytes(place)
        buffer: Tensor | None = getattr(self._buffers, "bytes", None)
        if buffer is None or buffer.numel() < length:
            buffer = self._buffers.bytes = torch.empty(max(length, BLOCK_BYTES), dtype=torch.uint8)
        self._read(place, block, bytes_of(buffer[:length]))
        return buffer[:length].view(place.dtype).view(block.rows, *place.shape[1:])

    def _read(self, place: TensorPlace, block: _Block, into: memoryview) -> None:
        done = 0
        for begin, length in _bytes(place, block):
            stop = done + length
            while done < stop:
                count = os.preadv(self._file, [into[done:stop]], begin + length - (stop - done))
                if not count:
                    raise CheckpointError(f"{self.path} was cut short while it was in use")
                done += count

    def _write(self, place: TensorPlace, block: _Block, data: memoryview) -> None:
        done = 0
        for begin, length in _bytes(place, block):
            stop = done + length
            while done < stop:
                done += os.pwrite(self._file, data[done:stop], begin + length - (stop - done))


def _is_small(place: TensorPlace) -> bool:
    return len(place.shape) < 2 or place.nbytes <= _SMALL_BYTES


def _has_whole_rows(index: Index) -> bool:
    return all(positions is None for positions in index[1:])


def _row_bytes(place: TensorPlace) -> int:
    return place.nbytes // place.shape[0]


def _bytes(place: TensorPlace, block: _Block) -> Iterator[tuple[int, int]]:
    """Where the runs of a block begin in the file, and their lengths."""
    row = _row_bytes(place)
    for first, count in block.runs:
        yield place.offset + first * row, count * row


def _jobs(rows: Tensor | None, place: TensorPlace) -> Iterator[list[_Block]]:
    blocks = _blocks(rows, place)
    while job := list(itertools.islice(blocks, _BLOCKS_PER_JOB)):
        yield job


def _blocks(rows: Tensor | None, place: TensorPlace) -> Iterator[_Block]:
    """All wanted rows, in order."""
    row = _row_bytes(place)
    most = max(1, BLOCK_BYTES // row)
    if rows is None:
        for first in range(0, place.shape[0], most):
            count = min(most, place.shape[0] - first)
            yield _Block(
                begin=first, end=first + count, runs=[(first, count)], within=torch.arange(count)
            )
        return
    runs: list[tuple[int, int]] = []
    within: list[int] = []
    begin, read, next_row = 0, 0, 0
    for number, wanted in enumerate(rows.tolist()):
        joins = bool(runs) and (wanted - next_row) * row <= _GAP_BYTES
        more = wanted - next_row + 1 if joins else 1
        if runs and read + more > most:
            yield _Block(begin=begin, end=number, runs=runs, within=torch.tensor(within))
            runs, within, begin, read, joins, more = [], [], number, 0, False, 1
        if joins:
            runs[-1] = (runs[-1][0], runs[-1][1] + more)
        else:
            runs.append((wanted, 1))
        read += more
        within.append(read - 1)
        next_row = wanted + 1
    yield _Block(begin=begin, end=rows.numel(), runs=runs, within=torch.tensor(within))
