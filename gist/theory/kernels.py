"""Neural tangent kernels of one hidden layer of rectified linear units, and their spectra.

Shape legend: ``n`` samples of ``d`` features, ``m`` neurons.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

ZERO = 1e-13
"""A smallest eigenvalue below so many times the largest one counts as zero."""

_NEARLY_PARALLEL = 1 - 1e-6  # cosines beyond lose half of their digits to arccos
_PAIRS_AT_ONCE = 2**14


def angles(x: Tensor) -> Tensor:
    """Angles between rows, in [0, π], exact to rounding also where these are nearly parallel.

    Args:
        x: ``[n, d]``. A row of zeros is at a right angle to all others.

    Returns:
        ``[n, n]`` symmetric.
    """
    unit = torch.nn.functional.normalize(x, dim=1)
    cosine = unit @ unit.T
    out = torch.arccos(cosine.clamp(-1, 1))
    near = (cosine.abs() > _NEARLY_PARALLEL).nonzero()
    for pairs in torch.split(near, _PAIRS_AT_ONCE):
        one, other = unit[pairs[:, 0]], unit[pairs[:, 1]]
        # Kahan's formula
        sharp = 2 * torch.atan2((one - other).norm(dim=1), (one + other).norm(dim=1))
        out[pairs[:, 0], pairs[:, 1]] = sharp
    return (out + out.T) / 2


def ntk(x: Tensor, *, keep: float = 1.0) -> Tensor:
    """The infinitely wide kernel H∞ of masked subnets, ξ included (arXiv 2112.02668).

    ``H∞_ij = ξ <x_i, x_j> (π - angle_ij) / (2π)``; rows need not have length 1.

    Args:
        x: ``[n, d]``.
        keep: ξ.

    Returns:
        ``[n, n]`` symmetric.
    """
    kernel = keep * (x @ x.T) * (math.pi - angles(x)) / (2 * math.pi)
    return (kernel + kernel.T) / 2


def finite_ntk(x: Tensor, weight: Tensor, mask: Tensor | None = None) -> Tensor:
    """The kernel of a network of finite width, or of one of its subnets (arXiv 2112.02668).

    ``(m∘H)_ij = <x_i, x_j> / m * Σ_r mask_r 1{<w_r, x_i> >= 0} 1{<w_r, x_j> >= 0}``, where m counts
    all neurons, masked ones too.

    Args:
        x: ``[n, d]``.
        weight: ``[m, d]``.
        mask: ``[m]`` bool; None for all neurons.

    Returns:
        ``[n, n]`` symmetric.
    """
    held = weight if mask is None else weight[mask]
    active = (x @ held.T >= 0).to(x.dtype)
    kernel = (x @ x.T) * (active @ active.T) / len(weight)
    return (kernel + kernel.T) / 2


def activation_kernel(x: Tensor, weight: Tensor) -> Tensor:
    """``K_ij = (1/m) Σ_r relu(<w_r, x_i>) relu(<w_r, x_j>)``: ``[n, n]`` of ``[n, d]``, ``[m, d]``.

    ξ(1-ξ)K is the covariance of a subnet's outputs around their mean over Bernoulli masks.
    """
    active = (x @ weight.T).relu()
    return active @ active.T / len(weight)


@dataclass(frozen=True, kw_only=True, eq=False)
class Spectrum:
    """Eigenvalues and eigenvectors of a kernel.

    Attributes:
        values: ``[n]`` ascending, as computed.
        vectors: ``[n, n]``, a column for each; None where they were not asked for.
    """

    values: Tensor
    vectors: Tensor | None = None

    @classmethod
    def of(cls, kernel: Tensor, *, vectors: bool = True) -> Spectrum:
        """The spectrum of a symmetric matrix ``[n, n]``."""
        if not vectors:
            return cls(values=torch.linalg.eigvalsh(kernel))
        values, columns = torch.linalg.eigh(kernel)
        return cls(values=values, vectors=columns)

    @property
    def largest(self) -> float:
        """λ*, which the papers call λ_max as well."""
        return float(self.values[-1])

    @property
    def smallest(self) -> float:
        """λ0; 0 where it is numerically zero (see :data:`ZERO`)."""
        return 0.0 if self.is_singular else float(self.values[0])

    @property
    def is_singular(self) -> bool:
        """Whether λ0 is numerically zero."""
        return not float(self.values[0]) >= ZERO * self.largest or self.largest <= 0
