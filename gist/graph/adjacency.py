"""The edges of one graph, and the normalised matrices that graph layers multiply with.

Shape legend: ``N`` nodes, ``T`` targets among them (all, unless a layer's sources are more than its
targets), ``E`` stored edges, ``d`` feature columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from gist.errors import DataError
from gist.graph.dgl_graph import dgl_graph
from gist.graph.sparse import CSR, SparseMatrix, product_work, sparse_if_worth_it

_T = TypeVar("_T")

Form = Literal["identity", "gcn", "mean", "sum"]
"""A matrix that features are multiplied with: see :meth:`Adjacency.propagate`."""

NodeScale = Callable[[Form, torch.dtype], Tensor]
"""For a form and a dtype, the factor ``[T]`` of each node; see :meth:`Adjacency.node_scale`."""


class Rows(NamedTuple):
    """The edges that each node receives, in compressed rows.

    Attributes:
        indptr: ``[T + 1]``: the edges of target ``i`` are ``indptr[i]`` to ``indptr[i + 1]``.
        indices: ``[E]`` sources; of the dtype of ``indptr``: int32 where that suffices.
        weight: ``[E]``, or None for an unweighted graph.
        attr: ``[E, D]`` features of the edges, or None.
    """

    indptr: Tensor
    indices: Tensor
    weight: Tensor | None = None
    attr: Tensor | None = None

    def counts(self) -> Tensor:
        """``[T]``: edges that each target receives."""
        return self.indptr.diff()

    def take(self, rows: Tensor) -> Rows:
        """The given rows ``[k]``, in the given order, with all their edges."""
        counts = self.counts().index_select(0, rows)
        indptr = offsets(counts)
        shift = self.indptr.index_select(0, rows) - indptr[:-1]
        total = int(indptr[-1])
        entries = torch.arange(total, dtype=indptr.dtype, device=indptr.device)
        entries += shift.repeat_interleave(counts, output_size=total)
        return Rows(indptr, *self._entries(entries))

    def keep(self, kept: Tensor) -> Rows:
        """The same rows without the edges for which ``kept`` [E] is False."""
        before = torch.zeros(kept.numel() + 1, dtype=self.indptr.dtype, device=kept.device)
        torch.cumsum(kept, 0, dtype=before.dtype, out=before[1:])
        chosen = true_positions(kept)
        return Rows(before.index_select(0, self.indptr), *self._entries(chosen))

    def _entries(self, chosen: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return (
            self.indices.index_select(0, chosen),
            None if self.weight is None else self.weight.index_select(0, chosen),
            None if self.attr is None else self.attr.index_select(0, chosen),
        )

    def to(self, device: torch.device | str) -> Rows:
        """The same rows on ``device``."""
        return Rows(*(None if t is None else t.to(device) for t in self))  # type: ignore[arg-type]


def offsets(counts: Tensor) -> Tensor:
    """``[0, counts[0], counts[0] + counts[1], ...]``: where rows of these lengths start and end."""
    out = torch.zeros(counts.numel() + 1, dtype=counts.dtype, device=counts.device)
    torch.cumsum(counts, 0, dtype=counts.dtype, out=out[1:])
    return out


def true_positions(mask: Tensor) -> Tensor:
    """``mask.nonzero()`` of a vector ``[n]``, flat; numpy is several times faster on the CPU."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.nonzero()[:, 0]


class Adjacency:
    """The edges of one graph, and the normalised matrices that graph layers multiply with.

    Row ``i`` gathers what node ``i`` receives, so entry ``(i, j)`` is the edge ``j -> i``, as in
    PyTorch Geometric's ``source_to_target`` flow. Normalised forms are built on first use and kept.

    Args:
        edge_index: ``[2, E]`` int64, row 0 sources, row 1 targets. Order and duplicates are kept.
        num_nodes: ``N``.
        edge_weight: ``[E]`` floating point, or None for an unweighted graph.
        edge_attr: ``[E, D]`` floating point features of the edges, or None.

    Raises:
        DataError: shapes or dtypes are wrong, or an endpoint is not in ``[0, N)``.
    """

    def __init__(
        self,
        edge_index: Tensor,
        num_nodes: int,
        edge_weight: Tensor | None = None,
        edge_attr: Tensor | None = None,
    ) -> None:
        if edge_index.dim() != 2 or edge_index.size(0) != 2 or edge_index.is_floating_point():
            raise DataError(
                "edge_index must hold sources and targets as integers",
                got=f"{edge_index.dtype} of shape {tuple(edge_index.shape)}",
                expected="int64 of shape (2, E)",
                remedy="pass a PyG edge_index, or use GraphData.from_scipy for a matrix",
            )
        if edge_index.numel():
            low, high = int(edge_index.min()), int(edge_index.max())
            if low < 0 or high >= num_nodes:
                raise DataError(
                    "edges out of range: an endpoint names a node that does not exist",
                    got=f"endpoints between {low} and {high}",
                    expected=f"0 to {num_nodes - 1}, since there are {num_nodes} nodes",
                    remedy="renumber the nodes, or pass features for all of them",
                )
        edges = edge_index.size(1)
        if edge_weight is not None:
            _check_edge_values("edge_weight", edge_weight, (edges,))
        if edge_attr is not None:
            columns = max(edge_attr.size(-1), 1) if edge_attr.dim() else 1
            _check_edge_values("edge_attr", edge_attr, (edges, columns))
        self.edge_index = edge_index.long()
        self.edge_weight = edge_weight
        self.edge_attr = edge_attr
        self._start(int(num_nodes), int(num_nodes), edge_index.size(1))

    def _start(self, targets: int, nodes: int, edges: int) -> None:
        self.num_targets, self.num_nodes, self.num_edges = targets, nodes, edges
        self._constants: Any = WeakIdKeyDictionary()
        self._matrices: dict[tuple[Form, torch.dtype], SparseMatrix] = {}
        self._scale: NodeScale | None = None
        self._by_source = False

    @classmethod
    def from_csr(
        cls,
        indptr: Tensor,
        indices: Tensor,
        weight: Tensor | None = None,
        attr: Tensor | None = None,
        *,
        num_nodes: int | None = None,
        part_of: Adjacency | None = None,
        node_scale: NodeScale | None = None,
        by_source: bool = False,
    ) -> Adjacency:
        """A graph whose compressed rows are known: nothing is sorted, copied or checked.

        Args:
            indptr: ``[T + 1]`` int32 or int64: row ``i`` has the edges ``indptr[i]`` to
                ``indptr[i + 1]``.
            indices: ``[E]`` sources, of the same dtype.
            weight: ``[E]`` floating point, or None.
            attr: ``[E, D]`` floating point, or None.
            num_nodes: ``N``, where it is more than ``T``: then the targets are the first ``T``
                nodes, as in PyG's bipartite layers.
            part_of: A graph of which this is an induced subgraph. What holds for every part of
                it (symmetry, no self loops) is then not looked for again.
            node_scale: What normalises the rows in place of the graph's own degrees.
            by_source: List the edges in order of source, then row, instead of row by row.
        """
        self = cls.__new__(cls)
        targets = indptr.numel() - 1
        nodes = targets if num_nodes is None else num_nodes
        self._start(targets, nodes, indices.numel())
        self.rows = Rows(indptr, indices, weight, attr)
        self._scale, self._by_source = node_scale, by_source
        if part_of is not None:
            self.is_symmetric = part_of.is_symmetric
            self.has_symmetric_pattern = part_of.has_symmetric_pattern
            if not part_of.has_self_loops:
                self.has_self_loops = False
        return self

    def __repr__(self) -> str:
        kind = "weighted" if self.is_weighted else "unweighted"
        targets = "" if self.is_square else f"num_targets={self.num_targets}, "
        return (
            f"{type(self).__name__}({targets}num_nodes={self.num_nodes}, "
            f"num_edges={self.num_edges}, {kind})"
        )

    num_nodes: int
    """``N``: nodes that send, and rows of the features."""

    num_targets: int
    """``T``: nodes that receive, the first of all nodes; ``N`` in a whole graph."""

    num_edges: int
    """Stored directed edges: an undirected edge counts twice."""

    @property
    def device(self) -> torch.device:
        """Where the edges live."""
        given = vars(self).get("edge_index")
        return self.rows.indices.device if given is None else given.device

    @property
    def is_square(self) -> bool:
        """Whether every node receives: ``T = N``."""
        return self.num_targets == self.num_nodes

    @property
    def is_weighted(self) -> bool:
        """Whether the edges have weights."""
        return (self.edge_weight if "edge_weight" in vars(self) else self.rows.weight) is not None

    @property
    def is_listed(self) -> bool:
        """Whether ``edge_index`` is there, and need not be made of the rows."""
        return "edge_index" in vars(self)

    @property
    def num_edge_features(self) -> int:
        """``D``: columns of ``edge_attr``, 0 where the edges have no features."""
        attr = self.edge_attr if "edge_attr" in vars(self) else self.rows.attr
        return 0 if attr is None else attr.size(1)

    @cached_property
    def edge_index(self) -> Tensor:
        """``[2, E]`` int64: sources and targets."""
        indptr, indices = self._listed[:2]
        owners = torch.arange(indptr.numel() - 1, device=self.device)
        repeated = owners.repeat_interleave(indptr.diff(), output_size=self.num_edges)
        ends = [indices.long(), repeated]
        return torch.stack(ends[::-1] if self._by_source else ends)

    @cached_property
    def edge_weight(self) -> Tensor | None:
        """``[E]``, or None for an unweighted graph."""
        return None if self.rows.weight is None else self._listed.weight

    @cached_property
    def unweighted(self) -> Adjacency:
        """The same edges without weights; itself where it has none."""
        if not self.is_weighted:
            return self
        other = type(self).from_csr(*self.rows._replace(weight=None), num_nodes=self.num_nodes)
        other.is_symmetric = other.has_symmetric_pattern = self.has_symmetric_pattern
        other.has_self_loops = self.has_self_loops
        return other

    @cached_property
    def edge_attr(self) -> Tensor | None:
        """``[E, D]``, or None for a graph without edge features."""
        return None if self.rows.attr is None else self._listed.attr

    @cached_property
    def _listed(self) -> Rows:
        """The edges in the order of ``edge_index``: in rows or, by source, in columns."""
        if not self._by_source:
            return self.rows
        indptr, indices, weight, attr = self.rows.to("cpu")
        places = np.arange(self.num_edges, dtype=indices.numpy().dtype)
        matrix = sp.csr_matrix(
            (places, indices.numpy(), indptr.numpy()), shape=(self.num_targets, self.num_nodes)
        ).tocsc()  # a stable sort by source in one pass
        order = torch.from_numpy(matrix.data)
        return Rows(
            torch.from_numpy(matrix.indptr),
            torch.from_numpy(matrix.indices),
            *(None if t is None else t.index_select(0, order) for t in (weight, attr)),
        ).to(self.device)

    @cached_property
    def rows(self) -> Rows:
        """The edges that each node receives; within a row in the order of ``edge_index``."""
        sources, targets = self.edge_index.cpu()
        kind = index_dtype(self.num_edges, self.num_nodes)
        # Each edge selects its target. Transposed, that is a stable sort by target in one pass.
        index = np.arange(self.num_edges + 1, dtype=kind)
        selects = (np.ones(self.num_edges, dtype=np.int8), targets.numpy().astype(kind), index)
        received = sp.csr_matrix(selects, shape=(self.num_edges, self.num_nodes)).tocsc()
        order = torch.from_numpy(received.indices)
        given = (self.edge_weight, self.edge_attr)
        weight, attr = (None if t is None else t.cpu().index_select(0, order) for t in given)
        return Rows(
            torch.from_numpy(received.indptr),
            sources.index_select(0, order).to(order.dtype),
            weight,
            attr,
        ).to(self.device)

    @cached_property
    def dgl(self) -> Any:
        """The same graph as a ``DGLGraph``, its edges in the order of :attr:`rows`; bare of data.

        Raises:
            MissingDependencyError: DGL cannot be imported.
        """
        # int64, as DGL's own graphs are: models may look up nodes and edges by number.
        return dgl_graph(self.rows.indptr.long(), self.rows.indices.long(), self.num_nodes)

    def to_scipy(self) -> sp.csr_matrix:
        """The ``T x N`` matrix with entry ``(target, source)``; weight 1 where none is given.

        A copy: what is done to it does not reach the graph.
        """
        indptr, indices, weight, _ = self.rows
        values = torch.ones(self.num_edges) if weight is None else weight
        arrays = tuple(tensor.cpu().numpy().copy() for tensor in (values, indices, indptr))
        return sp.csr_matrix(arrays, shape=(self.num_targets, self.num_nodes))

    @cached_property
    def is_symmetric(self) -> bool:
        """Whether every edge has its reverse with the same weight."""
        return self.is_square and _equals_transpose(self.to_scipy())

    @cached_property
    def has_symmetric_pattern(self) -> bool:
        """Whether every edge has its reverse, whatever its weight."""
        if not self.is_weighted:
            return self.is_symmetric
        pattern = self.to_scipy()
        pattern.data = np.ones(self.num_edges, dtype=np.float32)
        return self.is_square and _equals_transpose(pattern)

    @cached_property
    def has_self_loops(self) -> bool:
        """Whether an edge leads from a node to itself."""
        return bool((self.rows.indices == self._row_numbers()).any())

    def self_looped(self) -> Tensor:
        """``[T]`` bool: whether an edge leads from the node to itself."""
        row = self._row_numbers()
        looped = torch.zeros(self.num_targets, dtype=torch.bool, device=self.device)
        looped[row[self.rows.indices == row].long()] = True
        return looped

    def _row_numbers(self) -> Tensor:
        rows = torch.arange(self.num_targets, dtype=self.rows.indices.dtype, device=self.device)
        return rows.repeat_interleave(self.rows.counts(), output_size=self.num_edges)

    def subgraph(self, nodes: Tensor) -> Adjacency:
        """The induced subgraph: the given nodes ``[n]``, in this order, and the edges between them.

        Args:
            nodes: Different nodes, int64.
        """
        rows = self.rows.take(nodes)
        place = torch.full((self.num_nodes,), -1, dtype=rows.indices.dtype, device=self.device)
        place[nodes] = torch.arange(nodes.numel(), dtype=place.dtype, device=self.device)
        moved = rows._replace(indices=place.index_select(0, rows.indices))
        return Adjacency.from_csr(*moved.keep(moved.indices >= 0), part_of=self)

    @property
    def gcn(self) -> SparseMatrix:
        """``D^-1/2 (A + I) D^-1/2`` (Kipf & Welling, 2017), as PyG's ``gcn_norm`` has it."""
        return self.matrix("gcn")

    @property
    def mean(self) -> SparseMatrix:
        """``D^-1 A``: the mean over in-neighbours, as in GraphSAGE, weighted if the edges are."""
        return self.matrix("mean")

    def matrix(self, form: Form, dtype: torch.dtype = torch.float32) -> SparseMatrix:
        """A normalised form of the adjacency, built on first use and kept.

        Args:
            form: ``"gcn"``, ``"mean"`` or ``"sum"``.
            dtype: Of the features it will be multiplied with: float64 is computed in float64, all
                others in float32.

        Raises:
            DataError: ``"gcn"`` of a graph whose sources are not its targets.
        """
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
        if (form, dtype) not in self._matrices:
            build = {"gcn": self._gcn, "mean": self._mean, "sum": self._sum}[form]
            self._matrices[form, dtype] = build(dtype)
        return self._matrices[form, dtype]

    def node_scale(self, form: Form, dtype: torch.dtype) -> Tensor:
        """What normalises a form, ``[T]``: ``D^-1/2`` of ``A + I`` for gcn, ``D^-1`` for mean.

        ``D`` adds up what a node receives: the weights of its edges (1 each in an unweighted
        graph), and for gcn of its self loop (1 where it has none). A node that receives nothing
        gets 0 for gcn and 1 for mean.
        """
        if self._scale is not None:
            return self._scale(form, dtype).to(self.device)
        if form == "mean":
            degree = _row_sums(self.rows, dtype)
            return degree.masked_fill_(degree == 0, 1.0).reciprocal_()
        scale = _row_sums(self._looped, dtype).rsqrt_()
        return scale.masked_fill_(scale == float("inf"), 0.0)

    def _gcn(self, dtype: torch.dtype) -> SparseMatrix:
        if not self.is_square:
            raise DataError(
                "the symmetric normalisation of a GCN needs a graph whose nodes all receive",
                got=repr(self),
                remedy="sample layers of a GCN with gist.LADIES or gist.FastGCN",
            )
        looped = self._looped
        scale = self.node_scale("gcn", dtype)
        values = scale.repeat_interleave(looped.counts(), output_size=looped.indices.numel())
        values *= scale.index_select(0, looped.indices)
        if looped.weight is not None:
            values *= looped.weight.to(dtype)
        rows = CSR(looped.indptr, looped.indices, values, self.num_nodes)
        return SparseMatrix(rows, symmetric=self.is_symmetric)

    @cached_property
    def _looped(self) -> Rows:
        """The rows with exactly one self loop each, at the end: the last given one, or weight 1."""
        rows, loop_weight = self.rows._replace(attr=None), None
        if rows.weight is not None:
            loop_weight = rows.weight.new_ones(self.num_nodes)
        if self.has_self_loops:
            row = self._row_numbers()
            loop = rows.indices == row
            if loop_weight is not None and rows.weight is not None:
                places = true_positions(loop)
                nodes = row.index_select(0, places)
                final = torch.ones_like(nodes, dtype=torch.bool)
                final[:-1] = nodes[1:] != nodes[:-1]
                loop_weight[nodes[final].long()] = rows.weight[places[final]]
            rows = rows.keep(~loop)
        nodes = torch.arange(self.num_nodes + 1, dtype=rows.indptr.dtype, device=self.device)
        indptr = rows.indptr + nodes
        last = indptr[1:].long() - 1
        others = torch.ones(rows.indices.numel() + self.num_nodes, dtype=torch.bool)
        others = others.to(self.device).index_fill_(0, last, False)

        def ended(values: Tensor, ends: Tensor) -> Tensor:
            out = torch.empty(others.numel(), dtype=values.dtype, device=values.device)
            return out.masked_scatter_(others, values).index_copy_(0, last, ends)

        if rows.weight is None or loop_weight is None:
            return Rows(indptr, ended(rows.indices, nodes[:-1]), None)
        return Rows(indptr, ended(rows.indices, nodes[:-1]), ended(rows.weight, loop_weight))

    def _sum(self, dtype: torch.dtype) -> SparseMatrix:
        indptr, indices = self.rows[:2]
        ones = torch.ones(self.num_edges, dtype=dtype, device=self.device)
        rows = CSR(indptr, indices, ones, self.num_nodes)
        return SparseMatrix(rows, symmetric=self.has_symmetric_pattern)

    def _mean(self, dtype: torch.dtype) -> SparseMatrix:
        indptr, indices, weight, _ = self.rows
        scale = self.node_scale("mean", dtype)
        values = scale.repeat_interleave(self.rows.counts(), output_size=self.num_edges)
        if weight is not None:
            values *= weight

        def columns() -> CSR:  # of a symmetric A: (D^-1 A)^T = A D^-1 has the same pattern
            values = scale.index_select(0, indices)
            return CSR(indptr, indices, values if weight is None else values * weight, len(scale))

        rows = CSR(indptr, indices, values, self.num_nodes)
        return SparseMatrix(rows, columns=columns if self.is_symmetric else None)

    def remember(self, x: Tensor, forms: Iterable[Form] = ()) -> None:
        """Declares ``x`` constant: products with this very tensor are computed once and kept.

        Input features never change, so ``ÂX`` of a first layer costs one product in a whole run,
        if it is to be had at all: see :meth:`project`. An in-place change of ``x`` is noticed and
        leads to a new product.

        Args:
            x: ``[N, d]``.
            forms: Products to compute at once; the others on first use.
        """
        self._constants[x] = {}
        for form in forms:
            self._kept(form, x)

    def remembered(self, x: Tensor) -> frozenset[Form]:
        """The forms of which is known by now how to multiply with ``x``."""
        return frozenset(form for form, dense in self._constants.get(x, ()) if not dense)

    def is_constant(self, x: Tensor) -> bool:
        """Whether ``x`` was declared constant: :meth:`project` then knows what is least work."""
        return x in self._constants and not x.requires_grad

    def propagate(self, form: Form, x: Tensor) -> Tensor:
        """``M x``, where M is the matrix that ``form`` names.

        Args:
            form: ``"identity"`` (the targets' own rows), ``"gcn"`` (:attr:`gcn`), ``"mean"``
                (:attr:`mean`), or ``"sum"``: ``A`` with edge weights left out, as in PyG's GIN.
            x: ``[N, d]``. Returns ``[T, d]``.
        """
        if form == "identity":
            return self._own(x)
        if not self.is_constant(x):
            return self.matrix(form, x.dtype).matmul(x)
        kept = self._kept(form, x)
        return kept if isinstance(kept, Tensor) else self._once((form, True), x, self._product)

    def project(self, form: Form, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """``M x Wᵀ + b``, where M is as in :meth:`propagate`.

        For a constant ``x``, ``M x`` is kept; where few of its entries are not zero (bags of
        words; on the CPU), as a sparse matrix, whose product with W costs that many times less.
        Where ``M``, if it is square, and ``x`` have fewer entries together than their product, it
        is ``M (x Wᵀ)`` instead.

        Args:
            form: As in :meth:`propagate`.
            x: ``[N, d_in]``.
            weight: ``[d_out, d_in]``.
            bias: ``[d_out]`` or None. Returns ``[T, d_out]``.
        """
        if not self.is_constant(x) or isinstance(kept := self._kept(form, x), Tensor):
            return F.linear(self.propagate(form, x), weight, bias)
        if kept is None:
            out = self.propagate(form, self.project("identity", x, weight))
        else:
            out = kept.matmul(weight.t())
        return out if bias is None else out + bias

    def _own(self, x: Tensor) -> Tensor:
        return x if self.is_square else x[: self.num_targets]

    def _kept(self, form: Form, x: Tensor) -> Tensor | SparseMatrix | None:
        """``M x`` of a constant ``x``; None where it is less work with ``x``, then ``M``."""
        return self._once((form, False), x, self._to_keep)

    def _once(self, key: tuple[Form, bool], x: Tensor, make: Callable[[Form, Tensor], _T]) -> _T:
        """What ``make`` gives for a form and ``x``, until ``x`` changes; its key: (form, dense)."""
        kept: dict[tuple[Form, bool], tuple[int, _T]] = self._constants[x]
        if key not in kept or kept[key][0] != x._version:
            kept[key] = (x._version, make(key[0], x))
        return kept[key][1]

    def _product(self, form: Form, x: Tensor) -> Tensor:
        return self._own(x) if form == "identity" else self.matrix(form, x.dtype).rows.product(x)

    @property
    def _sends_to_itself(self) -> bool:
        """Whether sources and targets are the same nodes."""
        return self.is_square

    def _to_keep(self, form: Form, x: Tensor) -> Tensor | SparseMatrix | None:
        product = self._product(form, x)
        if form != "identity" and self._sends_to_itself:
            entries = self.matrix(form, x.dtype).rows.indices.numel()
            if entries + product_work(x) < product_work(product):
                return None
        return sparse_if_worth_it(product)

    def to(self, device: torch.device | str) -> Adjacency:
        """The same graph on ``device``; kept products stay behind."""
        if torch.empty(0, device=device).device == self.device:
            return self
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__)
        for name in ("_looped", "_listed", "unweighted", "dgl"):
            other.__dict__.pop(name, None)
        for name in ("edge_index", "edge_weight", "edge_attr", "rows"):
            value = vars(self).get(name)
            if value is not None:
                setattr(other, name, value.to(device))
        other._constants = WeakIdKeyDictionary()
        other._matrices = {key: matrix.to(device) for key, matrix in self._matrices.items()}
        return other


def _check_edge_values(name: str, values: Tensor, shape: tuple[int, ...]) -> None:
    """Refuses what is not one finite number, or one row of them, for every edge."""
    if values.shape != shape or not values.is_floating_point():
        raise DataError(
            f"{name} must be one floating-point {'number' if len(shape) == 1 else 'row'} per edge",
            got=f"{values.dtype} of shape {tuple(values.shape)}",
            expected=f"float of shape {shape}" if len(shape) == 1 else f"float ({shape[0]}, D)",
        )
    if not bool(torch.isfinite(values).all()):
        raise DataError(
            f"{name} holds NaN or infinite values",
            got=f"{int((~torch.isfinite(values)).sum())} of them",
            expected="finite values",
        )


def _row_sums(rows: Rows, dtype: torch.dtype) -> Tensor:
    """``[T]``: the sum of each row's weights, or the number of its edges."""
    if rows.weight is None:
        return rows.counts().to(dtype)
    weight = rows.weight.to(dtype)
    return torch.segment_reduce(weight, "sum", offsets=rows.indptr.long(), initial=0)


def index_dtype(*sizes: int) -> type[np.signedinteger[Any]]:
    """int32 where it can count up to all of ``sizes``: half the memory traffic; else int64."""
    return np.int32 if max(sizes) < 2**31 - 1 else np.int64


def _equals_transpose(matrix: sp.csr_matrix) -> bool:
    matrix.sum_duplicates()
    matrix.eliminate_zeros()
    transpose = matrix.T.tocsr()  # rows come out sorted
    return all(
        np.array_equal(getattr(matrix, name), getattr(transpose, name))
        for name in ("indptr", "indices", "data")
    )
