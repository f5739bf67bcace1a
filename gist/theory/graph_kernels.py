"""GIST-K: the kernel regime of subnet training on a graph, one hidden layer (GIST, section 4).

Shape legend: ``n`` nodes, ``d`` features.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from gist.errors import ConfigError, DataError
from gist.graph.adjacency import Adjacency
from gist.theory.problem import Problem

MAX_NODES = 3000
"""Kernels are dense, and their spectra take n³: seconds at this size, minutes at ten times it."""


def propagation_matrix(adjacency: Adjacency, *, max_nodes: int = MAX_NODES) -> Tensor:
    """``Ā = I + D^(-1/2) A D^(-1/2)`` (GIST, arXiv 2102.10424, section 4).

    Not the renormalised matrix of a GCN, which adds the loops before it counts degrees. A node
    without edges has its 1 alone.

    Args:
        adjacency: A symmetric graph. Edges count with their weights, duplicates add up.
        max_nodes: Larger graphs are refused.

    Returns:
        ``[n, n]`` float64, dense. Its eigenvalues lie in [0, 2].

    Raises:
        DataError: the graph is directed, or has negative weights.
        ConfigError: it is too large.
    """
    if adjacency.num_nodes > max_nodes:
        raise ConfigError(
            "a dense kernel of so many nodes is not computed",
            got=f"{adjacency.num_nodes:,} nodes",
            expected=f"at most {max_nodes:,}",
            remedy="take a part of the graph, or raise max_nodes; time grows with its cube",
        )
    matrix = adjacency.to_scipy().astype(np.float64).toarray()
    if not adjacency.is_symmetric or matrix.min() < 0:
        raise DataError(
            "the kernel of a graph is defined for symmetric edges without negative weights",
            got=repr(adjacency),
            remedy="make it with symmetrize=True",
        )
    edges = torch.from_numpy(matrix)
    scale = edges.sum(dim=1).rsqrt()
    scale[scale.isinf()] = 0.0
    out = scale[:, None] * edges * scale
    out.diagonal().add_(1.0)
    return (out + out.T) / 2


def graph_problem(
    adjacency: Adjacency, x: Tensor, y: Tensor, *, max_nodes: int = MAX_NODES
) -> Problem:
    """GIST-K as a problem for masked training: samples ``X̂ = ĀX``, outputs multiplied with Ā.

    With the categorical masks of m subnets, ``kernel(1 / m)`` of it is
    ``G∞ = Ā H∞ Ā`` with ``H∞_ij = (1/m) <x̂_i, x̂_j> (π - arccos cos_ij) / (2π)``, and
    ``finite_kernel(network, mask)`` the G_j of a sub-GCN. Eq. (7) of the paper prints 1/(d1 m) in
    front of H∞, d1 being the width; with that, G_j would not tend to it.

    Args:
        adjacency: A symmetric graph.
        x: ``[n, d]`` features.
        y: ``[n]`` targets.
        max_nodes: Larger graphs are refused.

    Raises:
        DataError: the graph is directed, or has negative weights.
        ConfigError: it is too large.
    """
    propagation = propagation_matrix(adjacency, max_nodes=max_nodes)
    return Problem(x=propagation @ x.double(), y=y, propagation=propagation)


def propagation_norm(propagation: Tensor) -> float:
    """``‖Ā²‖_{1,1}``, the sum of its entries, which are not negative: ``‖Ā 1‖²``."""
    return float(propagation.sum(dim=1).square().sum())


def gist_step(propagation: Tensor, smallest: float) -> float:
    """``λ0 / (n ‖Ā²‖_{1,1})``: the order of η that the theorem asks for, its constant set to 1."""
    return smallest / (len(propagation) * propagation_norm(propagation))


def gist_gamma(num_subnets: int) -> float:
    """``γ = (1 - 1/m)^(1/3)`` of m subnets."""
    return math.cbrt(1 - 1 / num_subnets)


def gist_gap(num_subnets: int, local_steps: int, *, lr: float, smallest: float) -> float:
    """``1 - ρ``, by which the expected loss falls in a round of GIST-K, at least.

    ``ρ = γ + (1-γ) (1 - ηλ0/2)^ζ`` is mostly so near to 1 that only the difference can be told.

    Args:
        num_subnets: m.
        local_steps: ζ.
        lr: η.
        smallest: λ0 of G∞.

    Raises:
        ConfigError: ``ηλ0/2`` is not in [0, 1), where no bound holds.
    """
    share = lr * smallest / 2
    if not 0 <= share < 1:
        raise ConfigError("the bound needs ηλ0/2 in [0, 1)", got=share, remedy="lower lr")
    one_less_gamma = -math.expm1(math.log1p(-1 / num_subnets) / 3) if num_subnets > 1 else 1.0
    return one_less_gamma * -math.expm1(local_steps * math.log1p(-share))


def gist_radius(
    num_subnets: int, *, dim: int, scale: float, smallest: float, largest: float, norm: float
) -> float:
    """Order of the error that GIST-K does not get below, without its constant.

    ``γ² d κ² λ*² ‖Ā²‖_{1,1} / (m (1-γ) λ0²)``. The paper has m² in place of m; that comes from
    factors which its Lemma 8 drops, see :func:`~gist.theory.noise.sampling_variance`.

    Args:
        num_subnets: m.
        dim: d.
        scale: κ.
        smallest: λ0 of G∞.
        largest: λ* of G∞.
        norm: ``‖Ā²‖_{1,1}``.

    Returns:
        It; infinite where λ0 is zero and m above 1.
    """
    gamma = gist_gamma(num_subnets)
    if not gamma:
        return 0.0
    if not smallest > 0:
        return math.inf
    spread = (largest / smallest) ** 2
    return gamma**2 * dim * scale**2 * spread * norm / (num_subnets * (1 - gamma))
