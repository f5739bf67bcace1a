"""A regression problem and the network that is trained on it: one hidden layer, the first trained.

Shape legend: ``n`` samples of ``d`` features, ``m`` neurons, ``p`` subnets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import scipy.sparse as sp
import torch
from torch import Tensor
from torch.nn.functional import normalize

from gist.errors import ConfigError, DataError
from gist.partition.streams import stream
from gist.theory.kernels import activation_kernel, finite_ntk, ntk


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """Fixed samples and targets, seen as a whole in every step.

    Attributes:
        x: ``[n, d]``, made float64.
        y: ``[n]``, made float64.
        propagation: ``[n, n]`` symmetric, multiplied with the outputs of all samples; None for the
            identity. A graph's is Ā (:func:`~gist.theory.graph_kernels.graph_problem`).

    Raises:
        DataError: shapes that do not fit, or values that are not finite.
    """

    x: Tensor
    y: Tensor
    propagation: Tensor | None = None

    def __post_init__(self) -> None:
        n = len(self.x)
        for name, shape in (("x", (n, self.x.size(-1))), ("y", (n,)), ("propagation", (n, n))):
            value = getattr(self, name)
            if value is None:
                continue
            if value.shape != shape or not n or not bool(torch.isfinite(value).all()):
                raise DataError(
                    f"{name} must hold finite numbers",
                    got=f"shape {tuple(value.shape)}",
                    expected=f"shape {shape}",
                )
            object.__setattr__(self, name, value.double())

    @classmethod
    def sphere(cls, num_samples: int = 50, dim: int = 20, *, seed: int = 0) -> Problem:
        """Samples drawn uniformly from the unit sphere, targets of either sign in [0.2, 1]."""
        generator = stream("theory", "problem", seed)
        x = torch.randn(num_samples, dim, generator=generator, dtype=torch.float64)
        size = 0.2 + 0.8 * torch.rand(num_samples, generator=generator, dtype=torch.float64)
        return cls(x=normalize(x, dim=1), y=size * _signs(num_samples, generator))

    @property
    def num_samples(self) -> int:
        """n."""
        return len(self.x)

    @property
    def dim(self) -> int:
        """d."""
        return self.x.size(1)

    def propagate(self, values: Tensor) -> Tensor:
        """``[..., n]`` of ``[..., n]``: times :attr:`propagation`, which is its own transpose."""
        return values if self.propagation is None else values @ self.propagation

    def kernel(self, keep: float = 1.0) -> Tensor:
        """H∞ with ξ, or ``G∞ = Ā H∞ Ā``: what :func:`~gist.theory.kernels.ntk` is propagated to."""
        return self._propagated(ntk(self.x, keep=keep))

    def finite_kernel(self, network: Network, mask: Tensor | None = None) -> Tensor:
        """That of a network, or of the subnet that holds the neurons of ``mask`` [m]."""
        return self._propagated(finite_ntk(self.x, network.weight, mask))

    def activation_kernel(self, network: Network) -> Tensor:
        """See :func:`~gist.theory.kernels.activation_kernel`; propagated likewise."""
        return self._propagated(activation_kernel(self.x, network.weight))

    def _propagated(self, kernel: Tensor) -> Tensor:
        if self.propagation is None:
            return kernel
        kernel = self._product(self._product(kernel).T)
        return (kernel + kernel.T) / 2

    def _product(self, dense: Tensor) -> Tensor:
        """:attr:`propagation` times a matrix, with its zeros left out where most are."""
        assert self.propagation is not None
        if int(self.propagation.count_nonzero()) > self.propagation.numel() / 20:
            return self.propagation @ dense
        return torch.from_numpy(sp.csr_array(self.propagation.numpy()) @ dense.numpy())


@dataclass(frozen=True, kw_only=True, eq=False)
class Network:
    """``f(x) = m^(-1/2) Σ_r a_r relu(<w_r, x>)``, of which w is trained and a is not.

    Attributes:
        weight: ``[m, d]`` float64.
        signs: ``[m]`` float64, a in {-1, 1}.
    """

    weight: Tensor
    signs: Tensor

    @classmethod
    def draw(cls, width: int, dim: int, *, scale: float, seed: int = 0) -> Network:
        """Weights from N(0, κ²), signs with equal probabilities.

        Args:
            width: m.
            dim: d.
            scale: κ.
            seed: The network depends on this and the sizes alone.

        Raises:
            ConfigError: there is nothing to draw.
        """
        if width < 1 or not scale > 0:
            raise ConfigError(
                "a network needs neurons, and weights of some scale",
                got=f"width={width}, scale={scale}",
            )
        generator = stream("theory", "network", seed)
        weight = torch.randn(width, dim, generator=generator, dtype=torch.float64)
        return cls(weight=scale * weight, signs=_signs(width, generator))

    @property
    def width(self) -> int:
        """m."""
        return len(self.weight)

    @property
    def output_weights(self) -> Tensor:
        """``[m]``: a_r / sqrt(m)."""
        return self.signs / math.sqrt(self.width)

    def outputs(self, problem: Problem, masks: Tensor | None = None) -> Tensor:
        """f of all samples, by the whole network or by subnets; without any factor 1/ξ.

        Args:
            problem: The samples.
            masks: ``[p, m]`` bool; None for the whole network.

        Returns:
            ``[n]``, or ``[p, n]``.
        """
        weights = self.output_weights
        if masks is not None:
            weights = masks * weights
        return problem.propagate(weights @ (self.weight @ problem.x.T).relu())


def _signs(size: int, generator: torch.Generator) -> Tensor:
    return 2.0 * torch.randint(2, (size,), generator=generator).double() - 1.0
