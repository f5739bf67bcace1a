"""Convolutions over a whole graph, computed block by block under a limit of memory.

Shape legend: ``N`` nodes, ``d`` columns of the input, ``D`` of the output, ``b`` nodes of a block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gist.graph.adjacency import Adjacency
from gist.graph.hidden import Hidden
from gist.graph.live_bytes import linear_bytes
from gist.graph.rowwise import CHUNK_BYTES, TRIAL, RowFunction, Step
from gist.graph.sparse import CSR

Finish = Callable[[slice, int], None]
"""Completes a block of output rows in place, within so many bytes."""

WEIGHT_BYTES = 64 * 2**20
"""A weight is read in blocks of about this size, so that one on disk passes by in order."""

ROWS = 2048
"""Rows with which a product of matrices runs at full speed."""

COLUMNS = 64
"""Columns with which a product of matrices runs at a good part of full speed."""

INDEX_BYTES = 16
"""Per row of a sparse product: its offsets, cut out of the graph's and moved to start at 0."""


class Blockwise(ABC):
    """One convolution: ``[N, d] -> [N, D]``.

    Attributes:
        after: Steps that belong to the convolution and treat each node on its own.
        held: Bytes that it keeps while a block is finished.
    """

    after: tuple[Step, ...] = ()
    held: int = 0

    @property
    @abstractmethod
    def out_width(self) -> int:
        """``D``."""

    @property
    @abstractmethod
    def smallest(self) -> int:
        """Bytes that the smallest block takes."""

    @property
    @abstractmethod
    def enough(self) -> int:
        """Bytes with which it runs at about full speed."""

    @property
    @abstractmethod
    def most(self) -> int:
        """Bytes that it takes where it may take any number."""

    @abstractmethod
    def run(self, source: Hidden, out: Hidden, work: int, finish: Finish) -> None:
        """Computes all output rows without :attr:`after`, and has them finished.

        Args:
            source: ``[N, d]``.
            out: ``[N, D]``, overwritten.
            work: Bytes that may be taken beside the two.
            finish: Called once for every block of rows, when it is complete.
        """


def blocks(count: int, *sizes: int) -> Iterator[slice]:
    """``range(count)`` in slices, about equally long and not longer than any of ``sizes``."""
    parts = -(-count // max(min(sizes), 1))
    for part in range(parts):
        yield slice(part * count // parts, (part + 1) * count // parts)


def row_blocks(
    indptr: Tensor, per_row: int, per_edge: int, work: int, rows: slice | None = None
) -> Iterator[slice]:
    """Consecutive rows of a sparse matrix whose cost stays within ``work``; at least one row."""
    start, end = (0, indptr.numel() - 1) if rows is None else (rows.start, rows.stop)
    while start < end:
        first = int(indptr[start])

        def cost(stop: int, start: int = start, first: int = first) -> int:
            return per_row * (stop - start) + per_edge * (int(indptr[stop]) - first)

        stop = start + max(bisect_right(range(start + 1, end + 1), work, key=cost), 1)
        yield slice(start, stop)
        start = stop


def cut(matrix: CSR, rows: slice) -> CSR:
    """Some rows of a matrix, as views of it but for their offsets."""
    indptr = matrix.indptr[rows.start : rows.stop + 1]
    entries = slice(int(indptr[0]), int(indptr[-1]))
    offsets = indptr - entries.start
    return CSR(offsets, matrix.indices[entries], matrix.values[entries], matrix.num_cols)


def aggregate(matrix: CSR, rows: slice, source: Hidden) -> Tensor:
    """Some rows of ``M X``: ``[b, d]``."""
    if not source.is_in_file:
        return cut(matrix, rows).product(source.rows)
    out = source.rows.new_empty(rows.stop - rows.start, source.rows.size(1))
    for part in row_blocks(matrix.indptr, 1, 1, source.most_rows, rows):
        few = cut(matrix, part)
        out[part.start - rows.start : part.stop - rows.start] = few.product(source.rows)
        source.touched(few.indices.numel())
    return out


def matmul_t(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """``out = x Wᵀ``, over blocks of rows of the weight."""
    for columns in weight_blocks(weight):
        torch.mm(x, weight[columns].t(), out=out[:, columns])


def weight_blocks(weight: Tensor) -> Iterator[slice]:
    """Rows of a weight ``[D, d]`` that are read at a time."""
    row = max(weight.size(1) * weight.element_size(), 1)
    return blocks(weight.size(0), max(WEIGHT_BYTES // row, COLUMNS))


def node_rows(weight: Tensor) -> int:
    """Nodes of a block that is multiplied with a weight ``[D, d]``.

    Enough for full speed; of a large weight as many as it has rows: then it costs no more to read
    the weight again for each block than to read the activations, and more nodes gain nothing.
    """
    small = weight.numel() * weight.element_size() <= WEIGHT_BYTES
    return 2 * ROWS if small else max(2 * ROWS, weight.size(0))


@dataclass(frozen=True, kw_only=True, eq=False)
class Product(Blockwise):
    """``M f(X) Wᵀ + X Rᵀ + b``: GCN, GraphSAGE in both forms; GIN's first linear layer.

    The product with the graph is taken on the narrower side of the weight. Aggregating first
    (``d <= D``) takes a block of ``M X`` of ``b x d`` entries at a time; multiplying first takes
    ``X Wᵀ`` of all nodes, as many of its columns at a time as fit.

    Attributes:
        matrix: ``M``.
        weight: ``W`` [D, d].
        root: ``R`` [D, d], or None.
        loops: ``e``, a tensor with one entry, where ``R = e W``; None else.
        bias: ``b`` [D], or None.
        before: ``f``, which treats each node on its own and keeps the width; None for the identity.
        after: See :class:`Blockwise`.
    """

    matrix: CSR
    weight: Tensor
    root: Tensor | None = None
    loops: Tensor | None = None
    bias: Tensor | None = None
    before: RowFunction | None = None
    after: tuple[Step, ...] = ()

    @property
    def out_width(self) -> int:
        """See :attr:`Blockwise.out_width`."""
        return self.weight.size(0)

    @property
    def multiplies_first(self) -> bool:
        """Whether the product with the graph is taken on the side of the output."""
        return self.weight.size(0) < self.weight.size(1) or self.before is not None

    @property
    def smallest(self) -> int:
        """See :attr:`Blockwise.smallest`."""
        if not self.multiplies_first:
            return self._row_bytes(self.weight.size(1))
        return self._column_bytes(1) + self._temporary(1)

    @property
    def enough(self) -> int:
        """See :attr:`Blockwise.enough`."""
        if not self.multiplies_first:
            return min(self.matrix.num_cols, ROWS) * self._row_bytes(self.weight.size(1))
        columns = min(self.weight.size(0), COLUMNS)
        return self._column_bytes(columns) + max(CHUNK_BYTES, self._temporary(columns))

    @property
    def most(self) -> int:
        """See :attr:`Blockwise.most`."""
        if not self.multiplies_first:
            rows = min(self.matrix.num_cols, node_rows(self.weight))
            return rows * self._row_bytes(self.weight.size(1))
        fixed = 0 if self.before is None else self.before.fixed
        temporary = max(CHUNK_BYTES + fixed, self._temporary(self.out_width))
        return self._column_bytes(self.out_width) + temporary

    def _row_bytes(self, width: int) -> int:
        """A row of a product with the graph."""
        return width * self.weight.element_size() + INDEX_BYTES

    def _column_bytes(self, columns: int) -> int:
        """``f(X) Wᵀ`` for so many columns."""
        return self.matrix.num_cols * columns * self.weight.element_size()

    def _temporary(self, columns: int) -> int:
        """One row of what comes and goes beside it."""
        before = 0 if self.before is None else self.before.smallest
        return max(before, self._row_bytes(columns))

    def run(self, source: Hidden, out: Hidden, work: int, finish: Finish) -> None:
        """See :meth:`Blockwise.run`."""
        nodes, most = len(out.rows), min(source.most_rows, out.most_rows)
        if self.multiplies_first:
            for columns in self._column_blocks(work):
                self._multiply_first(source, out, columns, work)
            size = nodes
        else:
            size = min(work // self._row_bytes(self.weight.size(1)), node_rows(self.weight))
        for rows in blocks(nodes, size, most):
            if not self.multiplies_first:
                self._aggregate_first(source, out, rows)
            finish(rows, work)

    def _aggregate_first(self, source: Hidden, out: Hidden, rows: slice) -> None:
        neighbours, own = aggregate(self.matrix, rows, source), source.rows[rows]
        if self.loops is not None:
            neighbours.addcmul_(own, self.loops)
        for columns in weight_blocks(self.weight):
            target = out.rows[rows, columns]
            if self.bias is None:
                torch.mm(neighbours, self.weight[columns].t(), out=target)
            else:
                torch.addmm(self.bias[columns], neighbours, self.weight[columns].t(), out=target)
            if self.root is not None:
                target.addmm_(own, self.root[columns].t())
        source.touched(len(own))

    def _column_blocks(self, work: int) -> Iterator[slice]:
        # An eighth for what comes and goes; the rest for as many columns as fit.
        spare = min(max(work // 8, self._temporary(1)), 2 * CHUNK_BYTES)
        size = min(max((work - spare) // self._column_bytes(1), 1), self.out_width)
        while size > 1 and self._column_bytes(size) + self._temporary(size) > work:
            size -= 1
        return blocks(self.out_width, size)

    def _multiply_first(self, source: Hidden, out: Hidden, columns: slice, work: int) -> None:
        """Some columns of the output."""
        weight, target = self.weight[columns], out.rows[:, columns]
        products = source.rows.new_empty(len(source.rows), len(weight))
        left, most = work - tensor_bytes(products), min(source.most_rows, out.most_rows)
        size = node_rows(weight) if self.before is None else self.before.chunk(left)
        for rows in blocks(len(products), size, most):
            own = source.rows[rows]
            matmul_t(own if self.before is None else self.before(own), weight, products[rows])
            if self.root is not None:
                matmul_t(own, self.root[columns], target[rows])
            elif self.loops is not None:
                torch.mul(products[rows], self.loops, out=target[rows])
            else:
                target[rows] = 0
            source.touched(len(own))
            out.touched(len(own))
        size = min(left, CHUNK_BYTES) // self._row_bytes(len(weight))
        for rows in blocks(len(products), size, most):
            target[rows].add_(cut(self.matrix, rows).product(products))
            if self.bias is not None:
                target[rows].add_(self.bias[columns])
            out.touched(rows.stop - rows.start)


@dataclass(frozen=True, kw_only=True, eq=False)
class Dense(Blockwise):
    """``X Wᵀ + b``: a linear layer, which does not look at the graph.

    Attributes:
        weight: ``W`` [D, d].
        bias: ``b`` [D], or None.
    """

    weight: Tensor
    bias: Tensor | None = None

    @property
    def out_width(self) -> int:
        """See :attr:`Blockwise.out_width`."""
        return self.weight.size(0)

    @property
    def smallest(self) -> int:
        """See :attr:`Blockwise.smallest`."""
        return 0

    @property
    def enough(self) -> int:
        """See :attr:`Blockwise.enough`."""
        return 0

    @property
    def most(self) -> int:
        """See :attr:`Blockwise.most`."""
        return 0

    def run(self, source: Hidden, out: Hidden, work: int, finish: Finish) -> None:
        """See :meth:`Blockwise.run`."""
        size = node_rows(self.weight)
        for rows in blocks(len(out.rows), size, source.most_rows, out.most_rows):
            matmul_t(source.rows[rows], self.weight, out.rows[rows])
            if self.bias is not None:
                out.rows[rows] += self.bias
            source.touched(rows.stop - rows.start)
            finish(rows, work)


@dataclass(frozen=True, kw_only=True, eq=False)
class Aggregation(Blockwise):
    """``g(M X + e X)`` with a network ``g`` that treats each node on its own: GIN.

    Attributes:
        matrix: ``M``.
        eps: ``e``, a tensor with one entry: ``1 + ε``.
        network: ``g``.
        width: ``d``.
    """

    matrix: CSR
    eps: Tensor
    network: RowFunction
    width: int

    @property
    def out_width(self) -> int:
        """See :attr:`Blockwise.out_width`."""
        return self.network.out_width

    def _row_bytes(self) -> int:
        return self.width * self.eps.element_size() + INDEX_BYTES + self.network.each

    @property
    def smallest(self) -> int:
        """See :attr:`Blockwise.smallest`."""
        return self._row_bytes() + self.network.fixed

    @property
    def enough(self) -> int:
        """See :attr:`Blockwise.enough`."""
        return min(self.matrix.num_cols, ROWS) * self._row_bytes() + self.network.fixed

    @property
    def most(self) -> int:
        """See :attr:`Blockwise.most`."""
        return min(self.matrix.num_cols, 2 * ROWS) * self._row_bytes() + self.network.fixed

    def run(self, source: Hidden, out: Hidden, work: int, finish: Finish) -> None:
        """See :meth:`Blockwise.run`."""
        size = min((work - self.network.fixed) // self._row_bytes(), 2 * ROWS)
        for rows in blocks(len(out.rows), size, source.most_rows, out.most_rows):
            self._block(source, out, rows)
            finish(rows, work)

    def _block(self, source: Hidden, out: Hidden, rows: slice) -> None:
        summed = aggregate(self.matrix, rows, source)
        summed.addcmul_(source.rows[rows], self.eps)
        source.touched(len(summed))
        out.rows[rows] = self.network(summed)


class Neighbourhood(Blockwise):
    """Any convolution over one hop: run as it is on a block's nodes and those they receive from.

    What it takes per node and per edge is found in two trials.

    Args:
        conv: A PyG convolution whose output at a node depends on the node, its in-neighbours and
            these edges alone.
        graph: Its rows hold the edges that the convolution gathers from.
        like: A tensor of the dtype, device and width of the features.
    """

    def __init__(self, conv: Any, graph: Adjacency, like: Tensor) -> None:
        self.conv = conv
        self.indptr, self.indices = graph.rows[:2]
        self.most_edges = int(self.indptr.diff().max())
        node = linear_bytes(lambda size: self._trial(like, size, 1), TRIAL)
        edge = linear_bytes(lambda size: self._trial(like, 1, size), TRIAL)
        # More nodes and more edges never take more than both together: stages of the layer are
        # linear in them, and the peak is the largest stage.
        self.fixed, self.node, self.edge = max(node[0], edge[0]), node[1], edge[1]
        self._out_width = self._trial(like, 1, 1).size(1)

    @property
    def out_width(self) -> int:
        """See :attr:`Blockwise.out_width`."""
        return self._out_width

    def _trial(self, like: Tensor, targets: int, edges: int) -> Tensor:
        """A block of so many targets, whose edges come from one other node each."""
        nodes = targets + edges
        indptr = torch.arange(targets + 1, device=like.device) * edges // targets
        indices = torch.arange(targets, nodes, device=like.device)
        source = like.new_zeros(1, like.size(1)).expand(nodes, -1)
        return self._block(source, indptr, indices, slice(0, targets))

    @property
    def smallest(self) -> int:
        """See :attr:`Blockwise.smallest`."""
        return self.fixed + self.node + self.most_edges * self.edge

    @property
    def enough(self) -> int:
        """See :attr:`Blockwise.enough`."""
        return self.smallest + 4 * CHUNK_BYTES

    @property
    def most(self) -> int:
        """See :attr:`Blockwise.most`."""
        return max(self.fixed + 16 * CHUNK_BYTES, self.smallest)

    def run(self, source: Hidden, out: Hidden, work: int, finish: Finish) -> None:
        """See :meth:`Blockwise.run`."""
        most = min(work - self.fixed, 16 * CHUNK_BYTES)
        if source.is_in_file:  # an edge costs a row of the input at least
            most = min(most, source.most_rows * source.row_bytes)
        most = max(most, self.smallest - self.fixed)
        for rows in row_blocks(self.indptr, self.node, self.edge, most):
            first, last = int(self.indptr[rows.start]), int(self.indptr[rows.stop])
            indptr = self.indptr[rows.start : rows.stop + 1] - first
            out.rows[rows] = self._block(source.rows, indptr, self.indices[first:last], rows)
            source.touched(rows.stop - rows.start + last - first)
            finish(rows, work)

    def _block(self, source: Tensor, indptr: Tensor, indices: Tensor, rows: slice) -> Tensor:
        targets = torch.arange(rows.start, rows.stop, device=indices.device)
        inside = (indices >= rows.start) & (indices < rows.stop)
        others = torch.unique(indices[~inside])
        place = torch.where(
            inside, indices - rows.start, torch.searchsorted(others, indices) + targets.numel()
        )
        ends = [place, torch.repeat_interleave(indptr.diff(), output_size=indices.numel())]
        x = source.index_select(0, torch.cat([targets, others.long()]))
        out: Tensor
        if self.conv.flow == "source_to_target":
            out = self.conv((x, x[: targets.numel()]), torch.stack(ends).long())
        else:  # PyG has no bipartite form: the others' rows are computed too, and dropped
            out = self.conv(x, torch.stack(ends[::-1]).long())[: targets.numel()]
        return out


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor's entries."""
    return tensor.numel() * tensor.element_size()
