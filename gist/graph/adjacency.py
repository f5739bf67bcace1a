"""The edges of one graph, and the normalised matrices that graph layers multiply with.

Shape legend: ``N`` nodes, ``E`` stored entries, ``d`` feature columns.
"""

from __future__ import annotations

import copy
from functools import cached_property
from typing import Any, Literal

import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary
from torch_geometric.nn.conv.gcn_conv import gcn_norm

from gist.errors import DataError
from gist.graph.sparse import SparseMatrix, sparse_if_worth_it

Form = Literal["identity", "gcn", "mean"]


class Adjacency:
    """The edges of one graph, and the normalised matrices that graph layers multiply with.

    Row ``i`` gathers what node ``i`` receives, so entry ``(i, j)`` is the edge ``j -> i``, as in
    PyTorch Geometric's ``source_to_target`` flow. Normalised forms are built on first use and kept.

    Args:
        edge_index: ``[2, E]`` int64, row 0 sources, row 1 targets. Order and duplicates are kept.
        num_nodes: ``N``.
        edge_weight: ``[E]`` floating point, or None for an unweighted graph.

    Raises:
        DataError: shapes or dtypes are wrong, or an endpoint is not in ``[0, N)``.
    """

    def __init__(
        self, edge_index: Tensor, num_nodes: int, edge_weight: Tensor | None = None
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
        if edge_weight is not None:
            if edge_weight.shape != edge_index.shape[1:] or not edge_weight.is_floating_point():
                raise DataError(
                    "edge_weight must be one floating-point number per edge",
                    got=f"{edge_weight.dtype} of shape {tuple(edge_weight.shape)}",
                    expected=f"float of shape ({edge_index.size(1)},)",
                )
            if not bool(torch.isfinite(edge_weight).all()):
                raise DataError(
                    "edge_weight holds NaN or infinite values",
                    got=f"{int((~torch.isfinite(edge_weight)).sum())} of them",
                    expected="finite weights",
                )
        self.edge_index = edge_index.long()
        self.edge_weight = edge_weight
        self.num_nodes = int(num_nodes)
        self._constants: Any = WeakIdKeyDictionary()
        self._matrices: dict[tuple[str, torch.dtype], SparseMatrix] = {}

    def __repr__(self) -> str:
        kind = "weighted" if self.edge_weight is not None else "unweighted"
        return f"Adjacency(num_nodes={self.num_nodes}, num_edges={self.num_edges}, {kind})"

    @property
    def num_edges(self) -> int:
        """Stored directed edges: an undirected edge counts twice."""
        return self.edge_index.size(1)

    @property
    def device(self) -> torch.device:
        """Where the edges live."""
        return self.edge_index.device

    def _scipy(self, edge_index: Tensor, values: Tensor) -> sp.csr_matrix:
        # From sorted coordinates by hand: scipy's own conversion would sum duplicate edges.
        targets, order = torch.sort(edge_index[1].cpu(), stable=True)
        counts = torch.bincount(targets, minlength=self.num_nodes)
        indptr = torch.zeros(self.num_nodes + 1, dtype=torch.long)
        torch.cumsum(counts, 0, out=indptr[1:])
        arrays = (values.cpu()[order].numpy(), edge_index[0].cpu()[order].numpy(), indptr.numpy())
        return sp.csr_matrix(arrays, shape=(self.num_nodes, self.num_nodes))

    def to_scipy(self) -> sp.csr_matrix:
        """The ``N x N`` matrix with entry ``(target, source)``; weight 1 where none is given."""
        weight = self.edge_weight
        if weight is None:
            weight = torch.ones(self.num_edges, device=self.device)
        return self._scipy(self.edge_index, weight)

    @cached_property
    def is_symmetric(self) -> bool:
        """Whether every edge has its reverse with the same weight."""
        matrix = self.to_scipy()
        difference = abs(matrix - matrix.T)
        return difference.nnz == 0 or float(difference.max()) == 0.0

    @property
    def gcn(self) -> SparseMatrix:
        """``D^-1/2 (A + I) D^-1/2`` (Kipf & Welling, 2017), by PyG's ``gcn_norm``."""
        return self.matrix("gcn")

    @property
    def mean(self) -> SparseMatrix:
        """``D^-1 A``: the mean over in-neighbours, edge weights ignored, as in GraphSAGE."""
        return self.matrix("mean")

    def matrix(
        self, form: Literal["gcn", "mean"], dtype: torch.dtype = torch.float32
    ) -> SparseMatrix:
        """A normalised form of the adjacency, built on first use and kept.

        Args:
            form: ``"gcn"`` or ``"mean"``.
            dtype: Of the features it will be multiplied with: float64 is computed in float64, all
                others in float32.
        """
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
        if (form, dtype) not in self._matrices:
            self._matrices[form, dtype] = self._build(form, dtype)
        return self._matrices[form, dtype]

    def _build(self, form: Literal["gcn", "mean"], dtype: torch.dtype) -> SparseMatrix:
        if form == "gcn":
            weight = None if self.edge_weight is None else self.edge_weight.to(dtype)
            index, weight = gcn_norm(self.edge_index, weight, self.num_nodes, dtype=dtype)
        else:
            index = self.edge_index
            degree = torch.bincount(index[1], minlength=self.num_nodes).clamp(min=1)
            weight = degree.to(dtype).reciprocal()[index[1]]
        symmetric = form == "gcn" and self.is_symmetric
        matrix = SparseMatrix.from_scipy(self._scipy(index, weight), symmetric=symmetric)
        return matrix.to(self.device)

    def remember(self, x: Tensor) -> None:
        """Declares ``x`` constant: products with this very tensor are computed once and kept.

        Input features never change, so ``ÂX`` of a first layer costs one product in a whole run.
        An in-place change of ``x`` is noticed and leads to a new product.
        """
        self._constants[x] = {}

    def is_constant(self, x: Tensor) -> bool:
        """Whether products with ``x`` are kept, so that aggregating first costs nothing."""
        return x in self._constants and not x.requires_grad

    def propagate(self, form: Form, x: Tensor) -> Tensor:
        """``M x``, where M is the identity, :attr:`gcn` or :attr:`mean`, chosen by ``form``.

        Args:
            form: ``"identity"``, ``"gcn"`` or ``"mean"``.
            x: ``[N, d]``. Returns ``[N, d]``.
        """
        if form == "identity":
            return x
        if self.is_constant(x) and isinstance(kept := self._kept(form, x), Tensor):
            return kept
        return self.matrix(form, x.dtype).matmul(x)

    def project(self, form: Form, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """``M x Wᵀ + b``, where M is as in :meth:`propagate`.

        For a constant ``x``, ``M x`` is kept; where few of its entries are not zero (bags of
        words), as a sparse matrix, whose product with W costs that many times less.

        Args:
            form: ``"identity"``, ``"gcn"`` or ``"mean"``.
            x: ``[N, d_in]``.
            weight: ``[d_out, d_in]``.
            bias: ``[d_out]`` or None. Returns ``[N, d_out]``.
        """
        if self.is_constant(x) and isinstance(kept := self._kept(form, x), SparseMatrix):
            out = kept.matmul(weight.t())
            return out if bias is None else out + bias
        return F.linear(self.propagate(form, x), weight, bias)

    def _kept(self, form: Form, x: Tensor) -> Tensor | SparseMatrix:
        kept: dict[Form, tuple[int, Tensor | SparseMatrix]] = self._constants[x]
        if form not in kept or kept[form][0] != x._version:
            dense = x if form == "identity" else self.matrix(form, x.dtype).rows.product(x)
            kept[form] = (x._version, sparse_if_worth_it(dense))
        return kept[form][1]

    def to(self, device: torch.device | str) -> Adjacency:
        """The same graph on ``device``; kept products stay behind."""
        moved = self.edge_index.to(device)
        if moved is self.edge_index:
            return self
        weight = None if self.edge_weight is None else self.edge_weight.to(device)
        other = copy.copy(self)
        other.edge_index, other.edge_weight = moved, weight
        other._matrices = {key: matrix.to(device) for key, matrix in self._matrices.items()}
        other._constants = WeakIdKeyDictionary()
        return other
