"""Experiments: what the theory predicts beside what masked training does, as records.

Shape legend: ``n`` samples, as many modes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gist.errors import ConfigError, require_count
from gist.partition.samplers import Bernoulli
from gist.theory.delay import delayed_rates
from gist.theory.kernels import Spectrum
from gist.theory.masked import MaskedTraining
from gist.theory.noise import noise_floor
from gist.theory.problem import Network, Problem
from gist.theory.rates import loss_bound, mode_rates
from gist.theory.scheme import Scheme

SCHEMES = (
    Scheme.whole(),
    Scheme.dropout(0.5),
    Scheme.multi_sample_dropout(0.5, 4),
    Scheme.bernoulli(0.5, 4, 3),
    Scheme.ist(4, 5),
)
"""One of each case of the paper."""

VARIED = ("num_subnets", "keep", "local_steps", "width", "lr", "scale", "delay")
"""What :func:`floors` varies: p, ξ, τ, m, η, κ, E."""

_SETTLED, _MAX_ROUNDS = 10.0, 1_000_000


@dataclass(frozen=True, kw_only=True)
class Contraction:
    """How much of the residual a round leaves.

    Attributes:
        name: The scheme in words.
        scheme: Masks and local steps.
        width: m.
        lr: η.
        eigenvalues: The kernel's, ascending, ξ inside.
        predicted: For each the share that a round leaves of its mode, by the lazy prediction.
        measured: The same, measured: mean residual over the repeats, per round.
        bound: What the theorem bounds the loss ratio by; 1 where it is vacuous.
        loss_ratio: Mean loss after all rounds over that before, per round.
    """

    name: str
    scheme: Scheme
    width: int
    lr: float
    eigenvalues: tuple[float, ...]
    predicted: tuple[float, ...]
    measured: tuple[float, ...]
    bound: float
    loss_ratio: float


def contraction(
    problem: Problem | None = None,
    schemes: Scheme | Sequence[Scheme] = SCHEMES,
    *,
    width: int = 4000,
    scale: float = 0.5,
    lr: float | None = None,
    rounds: int = 4,
    repeats: int = 4,
    seed: int = 0,
) -> list[Contraction]:
    """Measures how fast the modes of the residual shrink, scheme by scheme.

    Targets are those of the problem moved so that the residual has the same share of every mode
    at the start, of length ‖y‖ together: so each rate can be told. A larger κ makes a network of
    some width change less, and the masks more noise.

    Args:
        problem: Samples; :meth:`~gist.theory.problem.Problem.sphere` where it is None.
        schemes: What to measure: one, or several.
        width: m.
        scale: κ.
        lr: η; :func:`default_lr` where it is None.
        rounds: Rounds of each run.
        repeats: Runs of each scheme, each with a network and masks of its own.
        seed: Seed of the first.

    Raises:
        ConfigError: a number below 1 of anything, or what is no scheme.
    """
    schemes = [schemes] if isinstance(schemes, Scheme) else schemes
    if not isinstance(schemes, Sequence) or not all(isinstance(each, Scheme) for each in schemes):
        raise ConfigError(
            "schemes must be a Scheme, or a sequence of them",
            got=repr(schemes),
            expected="such as Scheme.ist(4, 5)",
        )
    for name, value in (("width", width), ("rounds", rounds), ("repeats", repeats)):
        require_count(name, value)
    problem = problem or Problem.sphere()
    spectrum = Spectrum.of(problem.kernel())
    lr = 0.5 / spectrum.largest if lr is None else lr
    assert spectrum.vectors is not None
    even = spectrum.vectors.sum(dim=1) * problem.y.norm() / math.sqrt(problem.num_samples)
    out = []
    for scheme in schemes:
        eigenvalues = scheme.keep * spectrum.values
        runs = []
        for repeat in range(seed, seed + repeats):
            network = Network.draw(width, problem.dim, scale=scale, seed=repeat)
            start = scheme.keep * network.outputs(problem)
            moved = replace(problem, y=start + even)
            runs.append(MaskedTraining(moved, network, scheme, lr=lr, seed=repeat).fit(rounds))
        residuals = torch.stack(runs)
        modes = residuals.mean(dim=0) @ spectrum.vectors
        losses = residuals.square().sum(dim=2).mean(dim=0)
        left = modes[-1] / modes[0]
        out.append(
            Contraction(
                name=str(scheme),
                scheme=scheme,
                width=width,
                lr=lr,
                eigenvalues=tuple(eigenvalues.tolist()),
                predicted=tuple(mode_rates(scheme, lr=lr, eigenvalues=eigenvalues).tolist()),
                measured=tuple((left.sign() * left.abs() ** (1 / rounds)).tolist()),
                bound=loss_bound(scheme, lr=lr, smallest=scheme.keep * spectrum.smallest),
                loss_ratio=float(losses[-1] / losses[0]) ** (1 / rounds),
            )
        )
    return out


@dataclass(frozen=True, kw_only=True)
class Floor:
    """Where the loss ends in one case.

    Attributes:
        varied: What a series of floors differs in.
        value: Its value here.
        name: The scheme in words.
        scheme: Masks and local steps.
        width: m.
        lr: η.
        scale: κ.
        delay: E.
        rounds: Rounds that were trained.
        measured: Mean of ``‖y - u‖²`` over the last of them.
        predicted: :func:`~gist.theory.noise.noise_floor`, the leading order in 1/m; 0 for
            categorical masks.
    """

    varied: str
    value: float
    name: str
    scheme: Scheme
    width: int
    lr: float
    scale: float
    delay: int
    rounds: int
    measured: float
    predicted: float


def floors(
    vary: str,
    values: Sequence[float],
    *,
    problem: Problem | None = None,
    scheme: Scheme | None = None,
    width: int = 1000,
    lr: float | None = None,
    scale: float | None = None,
    delay: int = 0,
    averaged: int = 200,
    seed: int = 0,
) -> list[Floor]:
    """Measures where the loss ends, for several values of one thing.

    Args:
        vary: One of :data:`VARIED`: p, ξ (of Bernoulli masks), τ, m, η, κ or E.
        values: Its values, a sequence or an array.
        problem: Samples and targets; :meth:`~gist.theory.problem.Problem.sphere` where it is None.
        scheme: Masks and local steps; Bernoulli with ξ = 0.8, p = 4, τ = 1 where it is None.
        width: m.
        lr: η; :func:`default_lr` where it is None.
        scale: κ; ``n^(-1/2)`` where it is None.
        delay: E; above 0 with one local step.
        averaged: Rounds that the loss is averaged over, after those that it takes to settle.
        seed: Seed of network and masks.

    Returns:
        One record for each value.

    Raises:
        ConfigError: something that cannot be varied, or a value or setting that cannot be used;
            all but steps too large or too small are refused before any training.
        DivergedError: the training diverged.
    """
    if vary not in VARIED:
        raise ConfigError(
            "this cannot be varied", got=repr(vary), expected=f"one of {', '.join(VARIED)}"
        )
    numbers = _numbers(vary, values)
    require_count("averaged", averaged)
    problem = problem or Problem.sphere()
    scheme = scheme or Scheme.multi_sample_dropout(0.8, 4)
    if vary == "keep" and scheme.exclusive:
        raise ConfigError(
            "keep, ξ, can be varied of Bernoulli masks alone",
            got=f"scheme: {scheme}",
            remedy="give a scheme such as Scheme.dropout(0.5), or vary num_subnets: ξ is 1/p here",
        )
    case: dict[str, Any] = {
        "scheme": scheme,
        "width": width,
        "lr": default_lr(problem) if lr is None else lr,
        "scale": problem.num_samples**-0.5 if scale is None else scale,
        "delay": delay,
    }
    runs = []
    for number in numbers:
        value = number if vary in ("keep", "lr", "scale") else _whole(vary, number)
        changed: dict[str, Any] = {vary: value}
        if vary == "keep":
            changed = {"scheme": replace(scheme, sampler=Bernoulli(value))}
        elif vary in ("num_subnets", "local_steps"):
            changed = {"scheme": replace(scheme, **changed)}
        this = {**case, **changed}
        runs.append((value, this, _training(problem, **this, seed=seed)))
    return [
        Floor(
            varied=vary,
            value=value,
            name=str(this["scheme"]),
            **this,
            **_floor(training, this["delay"], averaged),
        )
        for value, this, training in runs
    ]


def _training(
    problem: Problem,
    *,
    scheme: Scheme,
    width: int,
    lr: float,
    scale: float,
    delay: int,
    seed: int,
) -> MaskedTraining:
    network = Network.draw(width, problem.dim, scale=scale, seed=seed)
    return MaskedTraining(problem, network, scheme, lr=lr, delay=delay, seed=seed)


def _floor(training: MaskedTraining, delay: int, averaged: int) -> dict[str, Any]:
    problem, network = training.problem, training.network
    scheme, lr = training.scheme, training.lr
    values = _eigenvalues(problem, network)
    unmasked = replace(problem, y=problem.y / scheme.keep)
    fit = MaskedTraining(unmasked, network, Scheme.whole(), lr=1 / float(values[-1]))
    fit.fit(_rounds_to_settle(fit.scheme, fit.lr, values))
    values = scheme.keep * _eigenvalues(problem, fit.network)
    training.fit(_rounds_to_settle(scheme, lr, values, delay))
    losses = training.fit(averaged).square().sum(dim=1)
    return {
        "rounds": training.rounds,
        "measured": float(losses.mean()),
        "predicted": noise_floor(problem, fit.network, scheme, lr=lr, delay=delay),
    }


def default_lr(problem: Problem) -> float:
    """``0.5 / λ_max`` of the infinitely wide kernel without masks."""
    return 0.5 / Spectrum.of(problem.kernel(), vectors=False).largest


def _numbers(name: str, values: Any) -> list[float]:
    """The values as Python's own numbers, so that records are JSON."""
    given = values.tolist() if isinstance(values, np.ndarray) else values
    fits = isinstance(given, Sequence) and all(
        isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
        for value in given
    )
    if not fits or not len(given):
        raise ConfigError(
            f"values of {name} must be finite numbers, at least one",
            got=repr(values),
            expected="a sequence or an array of them, such as (1, 2, 4)",
        )
    return [float(value) for value in given]


def _whole(name: str, value: float) -> int:
    if value != int(value):
        raise ConfigError(f"{name} must be a whole number", got=value)
    return int(value)


def _eigenvalues(problem: Problem, network: Network) -> Tensor:
    return Spectrum.of(problem.finite_kernel(network), vectors=False).values


def _rounds_to_settle(scheme: Scheme, lr: float, eigenvalues: Tensor, delay: int = 0) -> int:
    """Rounds after which what is left of every mode is e^-10 of it, about."""
    rates = mode_rates(scheme, lr=lr, eigenvalues=eigenvalues)
    slowest = float((delayed_rates(1 - rates, delay) if delay else rates.abs()).max())
    rounds = _SETTLED / -math.log(slowest) if slowest < 1 else math.inf
    if not rounds < _MAX_ROUNDS:
        raise ConfigError(
            f"a mode of the residual does not shrink within {_MAX_ROUNDS:,} rounds",
            got=f"{scheme}, lr={lr:g}, delay={delay}",
            remedy="another lr; or fewer samples, no two of them parallel",
        )
    return math.ceil(rounds)
