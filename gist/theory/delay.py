"""What a delay does to a mode of the residual. Not in the papers.

AsyncDrop's theorem (arXiv 2210.16105, section 3.1) bounds masked training on changes that are E
rounds old; :class:`~gist.theory.masked.MaskedTraining` does it. Here is the lazy prediction.

Shape legend: ``n`` modes.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.linalg import solve_discrete_lyapunov
from torch import Tensor


def delayed_rates(shares: Tensor, delay: int) -> Tensor:
    """What is left of a residual mode after a round, in the long run.

    Of ``e_{k+1} = e_k - s e_{k-E}``: the largest modulus of a root of ``z^(E+1) = z^E - s``, which
    is ``1 - s`` for E = 0 and s below 1. Below 1 as long as ``s < 2 sin(π / (4E + 2))``.

    Args:
        shares: ``[n]``: s, the share of a mode that a round takes off, above 0.
        delay: E.

    Returns:
        ``[n]``.
    """
    roots = np.linalg.eigvals(_companions(shares, delay))
    return torch.from_numpy(np.abs(roots).max(axis=1))


def delayed_gain(shares: Tensor, delay: int) -> Tensor:
    """The variance that noise of variance 1 in every round keeps up in a residual mode.

    Of ``e_{k+1} = e_k - s e_{k-E} + s ε_k`` in the long run: ``s / (2 - s)`` for E = 0.

    Args:
        shares: ``[n]``: s, the share of a mode that a round takes off, above 0.
        delay: E.

    Returns:
        ``[n]``; infinite where the mode does not settle.
    """
    out = torch.full_like(shares, math.inf)
    steps, rates = _companions(shares, delay), delayed_rates(shares, delay)
    for i in (rates < 1).nonzero()[:, 0].tolist():
        noise = np.zeros_like(steps[i])
        noise[0, 0] = float(shares[i]) ** 2
        out[i] = solve_discrete_lyapunov(steps[i], noise)[0, 0]
    return out


def _companions(shares: Tensor, delay: int) -> np.ndarray:
    """``[n, E + 1, E + 1]``: from ``(e_k, ..., e_{k-E})`` to the same a round later."""
    out = np.tile(np.eye(delay + 1, k=-1), (len(shares), 1, 1))
    out[:, 0, 0] += 1.0
    out[:, 0, -1] -= shares.numpy()
    return out
