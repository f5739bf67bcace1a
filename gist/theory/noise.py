"""Why the error stops falling: variances of what masks do, and the floor that they keep up.

Shape legend: ``n`` samples, ``m`` neurons, ``p`` subnets.
"""

from __future__ import annotations

import math

from gist.theory.delay import delayed_gain
from gist.theory.kernels import Spectrum
from gist.theory.problem import Network, Problem
from gist.theory.rates import mode_rates
from gist.theory.scheme import Scheme


def sampling_variance(problem: Problem, network: Network, scheme: Scheme) -> float:
    """``E ‖f_l - u‖²`` over the masks: ``ξ(1-ξ)/m Σ_r ‖relu(X w_r)‖²``, propagated on a graph.

    Of categorical masks ``(p-1)/(p² m) ‖Ā relu(X̂Θ)‖_F²``, the sampling error of GIST-K (GIST,
    arXiv 2102.10424, appendix C). Its Lemma 8 drops factors; the error is of order 1/p in the
    number p of subnets, and not of order 1/p².
    """
    outputs = problem.activation_kernel(network).trace()
    return scheme.keep * (1 - scheme.keep) * float(outputs)


def copy_variance(keep: float, num_subnets: int) -> float:
    """Variance of the share of a neuron's holders that hold another given neuron.

    Of ``(1/X_r) Σ_l m^l_r m^l_s`` given ``X_r >= 1`` holders, Bernoulli masks:
    ``ξ(1-ξ) E[1/X | X >= 1]``. Lemma 28 of arXiv 2112.02668 prints :func:`bound_variance` for it,
    which is another number, and smaller where ξ is small and p large (ξ = 0.1, p = 10).

    Args:
        keep: ξ.
        num_subnets: p.
    """
    drawn = range(1, num_subnets + 1)
    chance = [math.comb(num_subnets, x) * keep**x * (1 - keep) ** (num_subnets - x) for x in drawn]
    mean = sum(c / x for c, x in zip(chance, drawn, strict=True)) / sum(chance)
    return keep * (1 - keep) * mean


def bound_variance(keep: float, num_subnets: int) -> float:
    """``(θ - ξ²) / p``: the variance that the paper's bounds for Bernoulli masks go with.

    Corollary 6 of arXiv 2112.02668 prints ``(θ - ξ)/p``, which would be 0 for dropout and
    contradicts Corollary 5.

    Args:
        keep: ξ.
        num_subnets: p.
    """
    coverage = Scheme.multi_sample_dropout(keep, num_subnets).coverage
    return (coverage - keep**2) / num_subnets


def noise_floor(
    problem: Problem, network: Network, scheme: Scheme, *, lr: float, delay: int = 0
) -> float:
    """``E ‖y - u‖²`` in the long run, to leading order in 1/m. Not in the papers.

    At the end of the training a subnet's residual is the deviation of its output from the mean over
    masks, of covariance ``ξ(1-ξ)K`` (:func:`~gist.theory.kernels.activation_kernel`). In a mode of
    the kernel a round takes off the share s of the residual (1 minus :func:`mode_rates`) and adds
    the same share of the mean deviation, of variance ``ξ(1-ξ) v'Kv / p``. That keeps up the sum of
    ``s / (2 - s)`` times it; with a delay, :func:`~gist.theory.delay.delayed_gain`.

    The deviations of categorical masks add up to zero in every round, so that nothing of this order
    is left of them; their floor is of order 1/m (:func:`categorical_order`). Left out of Bernoulli
    masks is what the implicit weight decay of dropout, of order 1/m, does to the mean; it shows
    where ξ is small and p large.

    Args:
        problem: Samples and targets.
        network: A network that fits them, at the width in question.
        scheme: Masks and local steps.
        lr: η.
        delay: E, with one local step.

    Returns:
        The floor; infinite where a mode does not settle.
    """
    if scheme.exclusive:
        return 0.0
    spectrum = Spectrum.of(scheme.keep * problem.finite_kernel(network))
    assert spectrum.vectors is not None
    shares = 1 - mode_rates(scheme, lr=lr, eigenvalues=spectrum.values)
    deviation = problem.activation_kernel(network) @ spectrum.vectors
    variance = (spectrum.vectors * deviation).sum(dim=0) / scheme.num_subnets
    gain = delayed_gain(shares, delay)
    return scheme.keep * (1 - scheme.keep) * float((gain * variance).sum())


def categorical_order(
    scheme: Scheme, *, width: int, num_samples: int, dim: int, scale: float, smallest: float
) -> float:
    """Order of the floor of categorical masks in the paper's bound, without its constant.

    ``τ (p-1)² κ² n³ d / (λ0² m)``. The main text of arXiv 2112.02668 drops the κ².

    Args:
        scheme: Categorical masks and local steps.
        width: m.
        num_samples: n.
        dim: d.
        scale: κ.
        smallest: λ0 of the kernel with ξ inside.

    Returns:
        It; infinite where λ0 is zero and p above 1.
    """
    factors = scheme.local_steps * (scheme.num_subnets - 1) ** 2 * scale**2 * num_samples**3 * dim
    if not factors:
        return 0.0
    return factors / (smallest**2 * width) if smallest > 0 else math.inf
