"""Whether what the theory of GIST assumes holds on a graph, and what its bound says there.

Shape legend: ``n`` nodes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from gist.errors import require_count
from gist.graph.data import GraphData
from gist.theory.graph_kernels import (
    MAX_NODES,
    gist_gap,
    gist_radius,
    gist_step,
    graph_problem,
    propagation_norm,
)
from gist.theory.kernels import Spectrum, angles

PARALLEL = 1e-7
"""Rows at an angle below this, to each other or to the other's opposite, count as parallel."""


@dataclass(frozen=True, kw_only=True)
class GraphReport:
    """What the theory says of GIST-K on the largest component of a graph.

    Attributes:
        name: Name of the graph.
        num_nodes: Nodes of the whole graph.
        num_components: Its connected components.
        num_kept: n, nodes of the largest, which all that follows is of.
        is_bipartite: Whether its edges join two sides only: then Ā, and so G∞, is singular.
        degree_spread: The least ε with ``(1-ε)² d <= degree <= (1+ε)² d`` for some d.
        parallel_rows: Nodes whose row of X̂ is parallel to another node's, or zero: a kernel with
            two such rows in one direction is singular.
        num_subnets: m.
        local_steps: ζ.
        smallest: λ0 of G∞; 0 where it is numerically zero.
        largest: λ* of G∞.
        norm: ``‖Ā²‖_{1,1}``.
        lr: η, as given, or of the order that the theorem asks for.
        gap: ``1 - ρ``: at least this share of the loss a round takes off, by the bound.
        radius: Order of the error that is left, without its constant.
    """

    name: str
    num_nodes: int
    num_components: int
    num_kept: int
    is_bipartite: bool
    degree_spread: float
    parallel_rows: int
    num_subnets: int
    local_steps: int
    smallest: float
    largest: float
    norm: float
    lr: float
    gap: float
    radius: float

    @property
    def vacuous(self) -> str | None:
        """Why the bound says nothing; None where it says something.

        The radius is known up to a constant, which is taken as 1, and compared with n, the loss of
        targets of size 1 before any training.
        """
        if not self.smallest:
            return "λ0 of G∞ is numerically zero"
        if 1 - self.gap == 1:
            return "ρ rounds to 1"
        if self.radius >= self.num_kept:
            return "the radius exceeds the loss of targets of size 1"
        return None

    @property
    def findings(self) -> tuple[str, ...]:
        """What the theory assumes and the graph does not have."""
        out = []
        if self.num_components > 1:
            out.append(f"{self.num_components:,} components, of which only the largest is seen")
        if self.is_bipartite:
            out.append("the component is bipartite: Ā is singular")
        if self.parallel_rows:
            out.append(f"{self.parallel_rows:,} rows of X̂ are zero or parallel to others")
        return tuple(out)

    def __str__(self) -> str:
        lines = [
            f"GIST-K on {self.name}, m = {self.num_subnets}, ζ = {self.local_steps}",
            f"  nodes            {self.num_kept:,} of {self.num_nodes:,}",
            f"  bipartite        {'yes' if self.is_bipartite else 'no'}",
            f"  degree spread ε  {self.degree_spread:.3f}",
            f"  parallel rows    {self.parallel_rows:,}",
            f"  λ0, λ* of G∞     {self.smallest:.3g}, {self.largest:.3g}",
            f"  ‖Ā²‖₁,₁          {self.norm:.4g}",
            f"  η                {self.lr:.3g}",
        ]
        if self.gap:
            rounds = math.log(2) / self.gap
            lines.append(f"  1 - ρ            {self.gap:.3g}, half in {rounds:.3g} rounds")
            lines.append(f"  radius           {self.radius:.3g}, times a constant")
        says = f"vacuous: {self.vacuous}" if self.vacuous else "says something"
        lines.append(f"  bound            {says}")
        return "\n".join([*lines, *(f"  ! {finding}" for finding in self.findings)])


def graph_report(
    data: GraphData | Any,
    *,
    num_subnets: int = 2,
    local_steps: int = 20,
    lr: float | None = None,
    scale: float | None = None,
    max_nodes: int = MAX_NODES,
) -> GraphReport:
    """Checks what the theory of GIST assumes, and computes its bound (section 4, appendix C).

    Of the largest component, because Ā of several is of blocks with nothing to do with each other,
    and one bipartite block makes it singular.

    Args:
        data: The graph, or what :meth:`gist.GraphData.of` takes; its labels play no part.
        num_subnets: m.
        local_steps: ζ.
        lr: η; the order that the theorem asks for where it is None.
        scale: κ; ``n^(-1/2)`` where it is None.
        max_nodes: A larger component is refused.

    Raises:
        DataError: no graph, or one that is directed or has negative weights.
        ConfigError: the component is too large, or ``lr`` is; a number below 1.
    """
    require_count("num_subnets", num_subnets)
    require_count("local_steps", local_steps)
    data = GraphData.of(data).to("cpu")
    count, label = connected_components(data.adjacency.to_scipy(), directed=False)
    kept = torch.from_numpy(np.flatnonzero(label == np.bincount(label).argmax()))
    component = data.adjacency.subgraph(kept)
    x = data.x[kept]
    problem = graph_problem(component, x, torch.zeros(len(kept)), max_nodes=max_nodes)
    assert problem.propagation is not None
    spectrum = Spectrum.of(problem.kernel(1 / num_subnets), vectors=False)
    smallest, norm = spectrum.smallest, propagation_norm(problem.propagation)
    step = gist_step(problem.propagation, smallest) if lr is None else lr
    matrix = component.to_scipy()
    return GraphReport(
        name=data.name,
        num_nodes=data.num_nodes,
        num_components=count,
        num_kept=len(kept),
        is_bipartite=_is_bipartite(matrix),
        degree_spread=_degree_spread(matrix),
        parallel_rows=_parallel_rows(problem.x),
        num_subnets=num_subnets,
        local_steps=local_steps,
        smallest=smallest,
        largest=spectrum.largest,
        norm=norm,
        lr=step,
        gap=gist_gap(num_subnets, local_steps, lr=step, smallest=smallest),
        radius=gist_radius(
            num_subnets,
            dim=data.num_features,
            scale=len(kept) ** -0.5 if scale is None else scale,
            smallest=smallest,
            largest=spectrum.largest,
            norm=norm,
        ),
    )


def _is_bipartite(matrix: sp.csr_matrix) -> bool:
    """Of a connected graph: whether its double cover falls into two parts."""
    cover = sp.bmat([[None, matrix], [matrix.T, None]])
    return matrix.nnz > 0 and bool(connected_components(cover, directed=False)[0] == 2)


def _degree_spread(matrix: sp.csr_matrix) -> float:
    roots = np.sqrt(np.asarray(matrix.sum(axis=1)).ravel())
    low, high = roots.min(), roots.max()
    return float((high - low) / (high + low)) if high > 0 else 0.0


def _parallel_rows(x: Tensor) -> int:
    angle = angles(x)
    angle.fill_diagonal_(math.pi / 2)
    parallel = (angle.sin() < PARALLEL).any(dim=1)
    return int((parallel | (x == 0).all(dim=1)).sum())
