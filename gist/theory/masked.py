"""Masked training as the theory has it: exact laws, full batches, double precision.

Shape legend: ``n`` samples of ``d`` features, ``m`` neurons, ``p`` subnets, ``w`` neurons of the
widest subnet, ``R`` rounds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from gist.errors import ConfigError, DivergedError
from gist.partition.transfer import RunningMean
from gist.theory.problem import Network, Problem
from gist.theory.scheme import Scheme


@dataclass(frozen=True, kw_only=True)
class RoundTrace:
    """Losses within one round.

    Attributes:
        before: ``‖y - u‖²`` of the network that the round starts from.
        local: Mean over the subnets of ``‖y - f_l‖²``: as they are cut out, and after each of their
            τ steps.
        after: ``‖y - u‖²`` of the merged network.
    """

    before: float
    local: tuple[float, ...]
    after: float


class MaskedTraining:
    """Trains a network through masked subnets (Liao & Kyrillidis, arXiv 2112.02668).

    Every round draws p masks, trains each masked subnet for τ steps of gradient descent on
    ``½ ‖y - f_l‖²`` from the same weights, and sets every neuron to its mean over the subnets that
    held it: ``w_r + Σ_l Δw^l_r / max(X_r, 1)``, X_r of them.

    With a delay the change is that which subnets of the network of E rounds ago make of it, in the
    first rounds of the network at the start: what AsyncDrop's theorem is about (arXiv 2210.16105,
    section 3.1).

    Args:
        problem: Samples and targets.
        network: Where it starts from.
        scheme: Masks and local steps.
        lr: η.
        delay: E, in rounds; above 0 with one local step.
        seed: Seed of the masks.

    Attributes:
        network: The network as it is now.
        rounds: Rounds that are done.

    Raises:
        ConfigError: a network of other dimensions than the samples, η is no positive number, or a
            delay that cannot be.
    """

    def __init__(
        self,
        problem: Problem,
        network: Network,
        scheme: Scheme,
        *,
        lr: float,
        delay: int = 0,
        seed: int = 0,
    ) -> None:
        if network.weight.size(1) != problem.dim:
            raise ConfigError(
                "the network must take as many features as the samples have",
                got=f"a network of {network.weight.size(1)}",
                expected=problem.dim,
                remedy="Network.draw(width, problem.dim, scale=...)",
            )
        if not lr > 0:
            raise ConfigError("lr must be a positive number", got=lr)
        whole = isinstance(delay, int) and not isinstance(delay, bool)
        if not whole or delay < 0 or (delay and scheme.local_steps > 1):
            raise ConfigError(
                "changes are some rounds late, of one local step each",
                got=f"delay={delay}, local_steps={scheme.local_steps}",
                expected="delay a whole number from 0 on; local_steps=1 where it is above 0",
            )
        self.problem, self.network, self.scheme = problem, network, scheme
        self.lr, self.seed, self.rounds = lr, seed, 0
        self._past = deque([network], maxlen=delay + 1)

    def residual(self) -> Tensor:
        """``y - u`` [n], where ``u = ξ f`` is the mean output of a subnet over the masks."""
        return self.problem.y - self.scheme.keep * self.network.outputs(self.problem)

    def loss(self) -> float:
        """``‖y - u‖²``."""
        return float(self.residual().square().sum())

    def round(self) -> None:
        """Masks, local steps, merge."""
        if self.scheme.local_steps > 1:
            self._advance(self._merged())
        else:
            old = self._past[0]
            masks = self._masks()
            self._advance(single_step(self.problem, self.network, masks, lr=self.lr, taken_at=old))

    def traced_round(self) -> RoundTrace:
        """One round with the losses on its way.

        Raises:
            ConfigError: there is a delay: subnets are not cut out of the network that they change.
        """
        if self._past.maxlen != 1:
            raise ConfigError("the losses within a round cannot be told where there is a delay")
        before, losses = self.loss(), list[Tensor]()
        self._advance(self._merged(losses))
        local = tuple(float(each.mean()) for each in losses)
        return RoundTrace(before=before, local=local, after=self.loss())

    def fit(self, rounds: int) -> Tensor:
        """Trains for some rounds.

        Args:
            rounds: R; 0 measures alone.

        Returns:
            ``[R + 1, n]`` residuals ``y - u``: before the first round, and after each.

        Raises:
            ConfigError: ``rounds`` is no whole number from 0 on.
            DivergedError: they are not finite in the end.
        """
        if not isinstance(rounds, int) or isinstance(rounds, bool) or rounds < 0:
            raise ConfigError(
                "rounds must be a whole number from 0 on",
                got=repr(rounds),
                remedy="0 gives the residuals as they are",
            )
        residuals = torch.empty(rounds + 1, self.problem.num_samples, dtype=torch.float64)
        residuals[0] = self.residual()
        for i in range(1, rounds + 1):
            self.round()
            residuals[i] = self.residual()
        if not bool(torch.isfinite(residuals[-1]).all()):
            raise DivergedError(
                "the residuals are not finite",
                got=f"{self.scheme}, lr={self.lr:g}, after {self.rounds} rounds",
                remedy="lower lr",
            )
        return residuals

    def _masks(self) -> Tensor:
        return self.scheme.masks(self.network.width, seed=self.seed, round=self.rounds)

    def _merged(self, losses: list[Tensor] | None = None) -> Network:
        """Local steps and merge, subnet by subnet."""
        problem, network, steps = self.problem, self.network, self.scheme.local_steps
        held, trained = train_subnets(
            problem, network, self._masks(), lr=self.lr, local_steps=steps, losses=losses
        )
        return merge_subnets(network, held, trained)

    def _advance(self, network: Network) -> None:
        self.network = network
        self._past.append(network)
        self.rounds += 1


def train_subnets(
    problem: Problem,
    network: Network,
    masks: Tensor,
    *,
    lr: float,
    local_steps: int,
    losses: list[Tensor] | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Local steps of all subnets of a round, side by side, each as narrow as the widest.

    Args:
        problem: Samples and targets.
        network: What the subnets are cut out of.
        masks: ``[p, m]`` bool.
        lr: η.
        local_steps: τ.
        losses: Takes ``‖y - f_l‖²`` [p] of the subnets, before the first step and after each.

    Returns:
        The neurons of each subnet, ascending, and ``[p, w, d]`` their trained weights, padded.
    """
    held = list(torch.split(masks.nonzero()[:, 1], masks.sum(dim=1).tolist()))
    weight, output = network.weight[pad_sequence(held, batch_first=True)], network.output_weights
    output = pad_sequence([output[units] for units in held], batch_first=True)
    factor = output[:, :, None]  # [p, w, 1]; 0 where padded, so that nothing comes of it
    active = weight.new_empty(*weight.shape[:2], problem.num_samples)  # [p, w, n]
    gradient = torch.empty_like(weight)
    for step in range(local_steps + (losses is not None)):
        torch.matmul(weight, problem.x.T, out=active).relu_()
        residual = problem.y - problem.propagate(factor.mT @ active)  # [p, 1, n]
        if losses is not None:
            losses.append(residual.square().sum(dim=(1, 2)))
        if step < local_steps:
            pulled = problem.propagate(residual).mT * problem.x  # [p, n, d]
            torch.matmul(active.sgn_(), pulled, out=gradient)
            weight.addcmul_(factor, gradient, value=lr)
    return held, weight


def merge_subnets(network: Network, held: Sequence[Tensor], trained: Tensor) -> Network:
    """The mean of every neuron over the subnets that held it, by the engine's merge.

    Args:
        network: What they were cut out of; neurons that nobody held stay.
        held: Neurons of each subnet.
        trained: ``[p, w, d]``.
    """
    mean = RunningMean(network.weight)
    for units, weight in zip(held, trained, strict=True):
        mean.add((units, None), weight[: len(units)])
    return replace(network, weight=mean.value)


def single_step(
    problem: Problem,
    network: Network,
    masks: Tensor,
    *,
    lr: float,
    taken_at: Network | None = None,
) -> Network:
    """A whole round with τ = 1, which takes what one step of the whole network takes, whatever p.

    All subnets start from the same weights and share what goes into the neurons; a neuron's mean
    over its holders is a step along the mean of their residuals.

    Args:
        problem: Samples and targets.
        network: The network before.
        masks: ``[p, m]`` bool.
        lr: η.
        taken_at: The network that gradients are taken at, of the same signs; ``network`` itself
            where it is None.
    """
    active = ((taken_at or network).weight @ problem.x.T).relu_()  # [m, n]
    factor = network.output_weights[:, None]
    held = masks.to(active.dtype)
    residual = problem.y - problem.propagate((held * network.output_weights) @ active)  # [p, n]
    mean = (held / held.sum(dim=0).clamp(min=1)).T @ problem.propagate(residual)  # [m, n]
    gradient = active.sgn_().mul_(mean) @ problem.x
    return replace(network, weight=torch.addcmul(network.weight, factor, gradient, value=lr))
