"""How fast the training error falls: the bounds of the papers, and the sharp lazy prediction.

Shape legend: ``n`` samples, as many eigenvalues.
"""

from __future__ import annotations

from torch import Tensor

from gist.errors import ConfigError
from gist.theory.scheme import Scheme


def loss_bound(scheme: Scheme, *, lr: float, smallest: float) -> float:
    """The factor by which the expected loss ``‖y - u‖²`` falls in a round, at least.

    It holds down to the floor. ``1 - ηθτλ0/4`` for Bernoulli masks (arXiv 2112.02668; with its
    corollaries on dropout, p = τ = 1, and multi-sample dropout, τ = 1; and AsyncDrop, arXiv
    2210.16105, section 3.1), and ``½ + ½(1 - ηλ0/2)^τ`` for categorical ones.

    Args:
        scheme: Masks and local steps.
        lr: η.
        smallest: λ0 of the kernel with ξ inside.

    Returns:
        A factor below 1, or 1 where the bound is vacuous: λ0 is zero, or the factor rounds to 1.

    Raises:
        ConfigError: η is so large that the factor would be negative, where no bound holds.
    """
    tau = scheme.local_steps
    share = lr * smallest / (2 if scheme.exclusive else 4 / (scheme.coverage * tau))
    if not 0 <= share <= 1:
        raise ConfigError(
            f"no bound holds for {scheme} with so large a step",
            got=f"lr={lr:g}, λ0 = {smallest:g}",
            remedy="lower lr",
        )
    return 0.5 + 0.5 * (1 - share) ** tau if scheme.exclusive else 1 - share


def mode_rates(scheme: Scheme, *, lr: float, eigenvalues: Tensor) -> Tensor:
    """What is left of the mean residual after a round, mode by mode of the kernel, if it is wide.

    ``1 - θ [1 - (1 - ηλ_i)^τ]``, which is ``(1 - ηλ_i)^τ`` where every neuron has an owner. Not in
    the paper: in the lazy regime each subnet's residual shrinks along the modes of H∞ in τ steps,
    and of its change the merged network keeps the share θ. Losses fall with the square.

    Args:
        scheme: Masks and local steps.
        lr: η.
        eigenvalues: ``[n]``, λ_i of the kernel with ξ inside.

    Returns:
        ``[n]``.
    """
    return 1 - scheme.coverage * (1 - (1 - lr * eigenvalues) ** scheme.local_steps)
