"""Which neurons each subnet of a round holds, drawn by the exact laws of the theory.

Shape legend: ``m`` neurons, ``p`` subnets of a round (the surrogates of the paper).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gist.errors import ConfigError, require_count
from gist.partition.samplers import Bernoulli, Categorical
from gist.partition.streams import stream

UNITS = "neurons"
"""Name of the group that is dealt."""


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How a round masks neurons, and for how long its subnets train (arXiv 2112.02668).

    The paper's cases have constructors of their own: :meth:`dropout`, :meth:`multi_sample_dropout`,
    :meth:`bernoulli`, :meth:`ist`, and :meth:`whole` for plain gradient descent.

    Attributes:
        sampler: :class:`~gist.Bernoulli`, every subnet holds every neuron with probability ξ; or a
            uniform :class:`~gist.Categorical`, every neuron has one owner.
        num_subnets: p.
        local_steps: τ, steps of gradient descent of each subnet in a round.

    Raises:
        ConfigError: another sampler, or numbers below 1.
    """

    sampler: Bernoulli | Categorical
    num_subnets: int = 1
    local_steps: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.sampler, Bernoulli) and self.sampler != Categorical():
            raise ConfigError(
                "the theory has masks of two laws",
                got=repr(self.sampler),
                expected="Bernoulli(keep), or Categorical() with equal probabilities",
            )
        require_count("num_subnets", self.num_subnets)
        require_count("local_steps", self.local_steps)

    @classmethod
    def dropout(cls, keep: float) -> Scheme:
        """Dropout: one mask, one step."""
        return cls(sampler=Bernoulli(keep))

    @classmethod
    def multi_sample_dropout(cls, keep: float, num_subnets: int) -> Scheme:
        """Multi-sample dropout: the mean over several masks, one step."""
        return cls(sampler=Bernoulli(keep), num_subnets=num_subnets)

    @classmethod
    def bernoulli(cls, keep: float, num_subnets: int, local_steps: int) -> Scheme:
        """Independent masks of several subnets, and several local steps."""
        return cls(sampler=Bernoulli(keep), num_subnets=num_subnets, local_steps=local_steps)

    @classmethod
    def ist(cls, num_subnets: int, local_steps: int) -> Scheme:
        """Independent subnet training: every neuron has one owner, drawn uniformly."""
        return cls(sampler=Categorical(), num_subnets=num_subnets, local_steps=local_steps)

    @classmethod
    def whole(cls, local_steps: int = 1) -> Scheme:
        """Gradient descent on the whole network: one subnet, which owns every neuron."""
        return cls.ist(1, local_steps)

    @property
    def keep(self) -> float:
        """ξ: the probability that a subnet holds a neuron."""
        return self.sampler.keep if isinstance(self.sampler, Bernoulli) else 1 / self.num_subnets

    @property
    def coverage(self) -> float:
        """θ: the probability that any subnet holds a neuron, 1 - (1 - ξ)^p or 1."""
        return 1.0 if self.exclusive else 1 - (1 - self.keep) ** self.num_subnets

    @property
    def exclusive(self) -> bool:
        """Whether every neuron has one owner: categorical masks."""
        return isinstance(self.sampler, Categorical)

    def masks(self, width: int, *, seed: int, round: int) -> Tensor:
        """Draws the masks of one round.

        They are those of the engine's sampler for the same seed and round, but for this: the engine
        gives a subnet that would be left without a neuron one, and here it has none, as the
        theorems assume. Of wide networks that never happens.

        Args:
            width: m.
            seed: Seed of the run.
            round: Index of the round.

        Returns:
            ``[p, m]`` bool.
        """
        generator = stream("assignment", seed, round, UNITS)
        return self.sampler.masks(width, self.num_subnets, generator)

    def __str__(self) -> str:
        p, tau = self.num_subnets, self.local_steps
        steps = f", τ = {tau}" if tau > 1 else ""
        if self.exclusive:
            return (f"IST, p = {p}" if p > 1 else "gradient descent") + steps
        if p == 1 and tau == 1:
            return f"dropout, ξ = {self.keep:g}"
        name = "multi-sample dropout" if tau == 1 else "Bernoulli"
        return f"{name}, ξ = {self.keep:g}, p = {p}{steps}"
