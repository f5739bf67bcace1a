"""Masked training on gradients that are some rounds old: a model of asynchronous training.

Shape legend: ``n`` samples, as many modes.
"""

from __future__ import annotations

import math
from collections import deque

import numpy as np
import torch
from scipy.linalg import solve_discrete_lyapunov
from torch import Tensor

from gist.errors import ConfigError
from gist.theory.masked import MaskedTraining, single_step
from gist.theory.problem import Network, Problem
from gist.theory.scheme import Scheme


class DelayedTraining(MaskedTraining):
    """What AsyncDrop's theorem is about (arXiv 2210.16105, section 3.1), in one process.

    Every round adds the change that subnets of the network of E rounds ago make of it; in the first
    rounds that is the network at the start. With E = 0 it is :class:`MaskedTraining`.

    Args:
        problem: Samples and targets.
        network: Where it starts from.
        scheme: Masks; one local step.
        lr: η.
        delay: E, in rounds.
        seed: Seed of the masks.

    Raises:
        ConfigError: several local steps, or a delay below 0.
    """

    def __init__(
        self,
        problem: Problem,
        network: Network,
        scheme: Scheme,
        *,
        lr: float,
        delay: int,
        seed: int = 0,
    ) -> None:
        super().__init__(problem, network, scheme, lr=lr, seed=seed)
        if scheme.local_steps != 1 or delay < 0:
            raise ConfigError(
                "delayed training takes one local step, some rounds late",
                got=f"local_steps={scheme.local_steps}, delay={delay}",
                expected="local_steps=1, delay from 0 on",
            )
        self.delay = delay
        self._past = deque([network], maxlen=delay + 1)

    def round(self) -> None:
        """Masks, a step from the gradients of old weights, merge."""
        self.network = single_step(
            self.problem, self.network, self._masks(), lr=self.lr, taken_at=self._past[0]
        )
        self._past.append(self.network)
        self.rounds += 1


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
