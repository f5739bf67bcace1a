"""Graph attention over a whole graph, computed block by block under a limit of memory.

Shape legend: ``N`` nodes, ``e`` edges of a block, ``d`` columns of the input, ``D`` of the output,
``H`` heads, ``C`` columns of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg
from torch import Tensor

from gist.graph.blockwise import (
    COLUMNS,
    INDEX_BYTES,
    ROWS,
    Blockwise,
    Finish,
    blocks,
    cut,
    matmul_t,
    node_rows,
    row_blocks,
    tensor_bytes,
)
from gist.graph.hidden import Hidden
from gist.graph.rowwise import CHUNK_BYTES
from gist.graph.sparse import CSR


class Attention(Blockwise):
    """Head by head a product ``A_h X W_hᵀ`` with a matrix that depends on ``X``: GAT and GATv2.

    ``A_h`` has the pattern of the graph; its row ``i`` is the softmax of the scores of the edges
    into ``i``. ``X W_hᵀ`` is computed for as many heads or columns at a time as fit, scores and
    ``A_h`` for a block of rows at a time, so that no message per edge and column ever exists but
    those of GATv2's scores.

    Of a layer that concatenates its heads, some columns may be computed apart. Their ``W_h`` is all
    that is needed, but for the scores: those of GAT are ``x_j · W_hᵀ a``, where ``W_hᵀ a`` [d] is a
    sum over the columns of the head; those of GATv2 need the whole head. Features ``e`` of an edge
    add ``e · W_ehᵀ a`` to the score of GAT, and ``W_eh e`` to what GATv2 scores.

    Args:
        conv: A ``GATConv`` or ``GATv2Conv``.
        matrix: The pattern; its values are not used.
        width: ``d``.
        columns: Those of ``H C`` that are computed, whole heads of a GATv2; by default all. The
            conv's weights and biases have these rows alone, its attention vectors all heads.
        add_up: Makes of one's own ``W_hᵀ a`` of all heads ``[2 H, d]`` the sum over all ranks; None
            where all columns are computed here.
        ranks: Which compute the other columns, and this one.
        attr: Features of the edges, in the order of the matrix's entries; None where there are
            none.
    """

    def __init__(
        self,
        conv: Any,
        matrix: CSR,
        width: int,
        columns: slice | None = None,
        add_up: Callable[[Tensor], Tensor] | None = None,
        ranks: int = 1,
        attr: Tensor | None = None,
    ) -> None:
        self.attr = attr
        self.conv, self.matrix, self.width = conv, matrix, width
        self.columns = columns or slice(0, conv.heads * conv.out_channels)
        self.add_up, self.ranks = add_up, ranks
        self.nodes = matrix.num_cols
        self.heads: int = conv.heads
        self.channels: int = conv.out_channels
        self.itemsize: int = conv.att_src.element_size() if self.folds else conv.att.element_size()
        self.most_edges = int(matrix.indptr.diff().max())

    @property
    def out_width(self) -> int:
        """See :attr:`Blockwise.out_width`."""
        return self.columns.stop - self.columns.start if self.conv.concat else self.channels

    @property
    def folds(self) -> bool:
        """Whether scores are sums of one number for each end (GAT), and not of vectors (GATv2)."""
        return isinstance(self.conv, pyg.GATConv)

    def _score_bytes(self, heads: int) -> int:
        """What the scores of so many heads need of all nodes."""
        if self.folds:
            folded = self.width * (2 * self.ranks + 1 if self.ranks > 1 else 1)
            return 2 * self.heads * (self.nodes + folded) * self.itemsize
        return 0 if self.conv.share_weights else heads * self._column_bytes(self.channels)

    def _column_bytes(self, columns: int) -> int:
        return self.nodes * columns * self.itemsize

    def _row_bytes(self, columns: int) -> int:
        return (columns + 2) * self.itemsize + INDEX_BYTES

    @property
    def _edge_bytes(self) -> int:
        vectors = 0 if self.folds else 2 * self.channels
        if self.attr is not None:
            vectors += 1 if self.folds else self.channels
        return 8 + (3 + vectors) * self.itemsize

    def _least(self, columns: int, heads: int = 1) -> int:
        """Bytes with which one row of so many heads at a time can be computed."""
        block = self._row_bytes(columns) + self.most_edges * self._edge_bytes
        return self._score_bytes(heads) + heads * self._column_bytes(columns) + block

    @property
    def smallest(self) -> int:
        """See :attr:`Blockwise.smallest`."""
        return self._least(1 if self.folds else self.channels)

    @property
    def enough(self) -> int:
        """See :attr:`Blockwise.enough`."""
        columns = min(self.channels, COLUMNS) if self.folds else self.channels
        return self._least(columns) + CHUNK_BYTES

    @property
    def most(self) -> int:
        """See :attr:`Blockwise.most`."""
        heads = -(-self.columns.stop // self.channels) - self.columns.start // self.channels
        return self._least(self.channels, heads) + 4 * CHUNK_BYTES

    def run(self, source: Hidden, out: Hidden, work: int, finish: Finish) -> None:
        """See :meth:`Blockwise.run`."""
        conv, most = self.conv, min(2 * ROWS, source.most_rows, out.most_rows)
        for rows in blocks(self.nodes, most):
            if conv.res is None:
                out.rows[rows] = 0
            else:
                matmul_t(source.rows[rows], conv.res.weight, out.rows[rows])
                source.touched(rows.stop - rows.start)
            if conv.bias is not None:
                out.rows[rows] += conv.bias
            out.touched(rows.stop - rows.start)
        self._add_heads(source, out, work)
        for rows in blocks(self.nodes, most):
            finish(rows, work)

    def _add_heads(self, source: Hidden, out: Hidden, work: int) -> None:
        """Adds all heads to ``out``: several in one pass over ``source``, or a part of one."""
        heads, size = self.heads, self.channels
        most = work - min(CHUNK_BYTES, work // 4)  # the rest is for more than one row at a time
        while heads > 1 and self._least(size, heads) > most:
            heads = -(-heads // 2)
        while self.folds and size > 1 and self._least(size) > most:
            size = -(-size // 2)
        scores = self._folded(source) if self.folds else None
        for span, channels in self._spans():
            for group in _blocks_of(span, heads):
                for part in _blocks_of(channels, size):
                    self._add_group(source, out, scores, group, part, work)

    def _spans(self) -> Iterator[tuple[slice, slice]]:
        """The columns that are computed, as heads and the same channels of each of them."""
        first, last, size = self.columns.start, self.columns.stop, self.channels
        while first < last:
            head, offset = divmod(first, size)
            whole = (last - first) // size if not offset else 0
            stop = first + whole * size if whole else min(last, (head + 1) * size)
            heads = slice(head, head + max(whole, 1))
            yield heads, slice(offset, size if whole else stop - head * size)
            first = stop

    def _add_group(
        self,
        source: Hidden,
        out: Hidden,
        scores: Tensor | None,
        group: slice,
        part: slice,
        work: int,
    ) -> None:
        """Adds some columns of each head of a group."""
        conv, count = self.conv, group.stop - group.start
        products = self._project(conv.lin if self.folds else conv.lin_l, source, group, part)
        own = products
        if not self.folds and not conv.share_weights:
            own = self._project(conv.lin_r, source, group, part)
        costs = self._row_bytes(products.size(2)), self._edge_bytes
        left = work - self._score_bytes(count) - tensor_bytes(products)
        left = min(left, 4 * CHUNK_BYTES, out.most_rows * costs[0])
        left = max(left, costs[0] + self.most_edges * costs[1])
        for place, head in enumerate(range(group.start, group.stop)):
            if scores is None:
                ends = products[place], own[place]
            else:
                ends = scores[0, head], scores[1, head]
            first = head * self.channels - self.columns.start if conv.concat else 0
            target = out.rows[:, first + part.start : first + part.stop]
            for rows in row_blocks(self.matrix.indptr, *costs, left):
                attention = self._attention(*ends, head, rows)
                share = 1.0 if conv.concat else 1.0 / self.heads
                target[rows].add_(attention.product(products[place]), alpha=share)
                out.touched(rows.stop - rows.start)
                del attention

    def _project(self, linear: Any, source: Hidden, group: slice, part: slice) -> Tensor:
        """``X W_hᵀ + b_h``, some columns of each head of a group: ``[heads, N, columns]``."""
        heads, columns = range(group.start, group.stop), part.stop - part.start
        out = source.rows.new_empty(len(heads), self.nodes, columns)
        for rows in blocks(self.nodes, node_rows(linear.weight), source.most_rows):
            for place, head in enumerate(heads):
                first = head * self.channels - self.columns.start
                chosen = slice(first + part.start, first + part.stop)
                matmul_t(source.rows[rows], linear.weight[chosen], out[place, rows])
                if linear.bias is not None:
                    out[place, rows] += linear.bias[chosen]
            source.touched(rows.stop - rows.start)
        return out

    def _folded(self, source: Hidden) -> Tensor:
        """``[2, H, N]``: the score of each node as the source, and as the target, of an edge."""
        weight: Tensor = self.conv.lin.weight
        vectors = self.conv.att_src, self.conv.att_dst
        folded = weight.new_zeros(2, self.heads, weight.size(1))
        at = 0
        for heads, channels in self._spans():
            count, size = heads.stop - heads.start, channels.stop - channels.start
            own = weight[at : at + count * size].view(count, size, -1)
            at += count * size
            for end, vector in enumerate(vectors):
                folded[end, heads] = torch.bmm(vector[0, heads, None, channels], own)[:, 0]
        folded = folded.flatten(0, 1)  # [2H, d]
        if self.add_up is not None:
            folded = self.add_up(folded)
        out = folded.new_empty(2 * self.heads, self.nodes)
        for rows in blocks(self.nodes, source.most_rows):
            torch.mm(folded, source.rows[rows].t(), out=out[:, rows])
            source.touched(rows.stop - rows.start)
        return out.view(2, self.heads, -1)

    def _edge_weight(self, head: int) -> Tensor:
        """What a head multiplies features of edges with: ``[D]``, or ``[D, C]`` of GATv2."""
        channels = slice(head * self.channels, (head + 1) * self.channels)
        weight: Tensor = self.conv.lin_edge.weight[channels].t()
        return weight @ self.conv.att_edge[0, head] if self.folds else weight

    def _attention(self, sources: Tensor, own: Tensor, head: int, rows: slice) -> CSR:
        """Some rows of ``A_h``: the softmax of the scores of their edges."""
        block = cut(self.matrix, rows)
        counts = block.indptr.diff()
        target = torch.repeat_interleave(counts, output_size=block.indices.numel())  # [e]
        scores = sources.index_select(0, block.indices)
        scores += own[rows].index_select(0, target)
        if self.attr is not None:
            entries = slice(int(self.matrix.indptr[rows.start]), int(self.matrix.indptr[rows.stop]))
            scores += self.attr[entries] @ self._edge_weight(head)
        F.leaky_relu_(scores, self.conv.negative_slope)
        if not self.folds:
            scores = scores @ self.conv.att[0, head]
        offsets = block.indptr.long()
        largest = torch.segment_reduce(scores, "max", offsets=offsets)
        scores.sub_(largest.index_select(0, target)).exp_()
        total = torch.segment_reduce(scores, "sum", offsets=offsets).add_(1e-16)  # as PyG has it
        scores.div_(total.index_select(0, target))
        return CSR(block.indptr, block.indices, scores, self.nodes)


def _blocks_of(whole: slice, size: int) -> Iterator[slice]:
    """A slice in slices that are not longer than ``size``."""
    for block in blocks(whole.stop - whole.start, size):
        yield slice(whole.start + block.start, whole.start + block.stop)
