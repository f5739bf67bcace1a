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

from gist.errors import ConfigError, DataError, require_count
from gist.graph.convert import as_tensor
from gist.partition.streams import stream
from gist.theory.kernels import activation_kernel, finite_ntk, ntk


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """Fixed samples and targets, seen as a whole in every step.

    Each may be a tensor, an array or lists, and is made a tensor of float64.

    Attributes:
        x: ``[n, d]``.
        y: ``[n]``.
        propagation: ``[n, n]`` symmetric, multiplied with the outputs of all samples; None for the
            identity. A graph's is Ā (:func:`~gist.theory.graph_kernels.graph_problem`).

    Raises:
        DataError: no dense real numbers, shapes that do not fit, or values that are not finite.
    """

    x: Tensor
    y: Tensor
    propagation: Tensor | None = None

    def __post_init__(self) -> None:
        x, y = as_tensor("x", self.x), as_tensor("y", self.y)
        if x.dim() != 2 or not x.numel():
            raise DataError(
                "x must have a row for each sample and a column for each feature",
                got=f"shape {tuple(x.shape)}",
                expected="shape [n, d], both at least 1",
                remedy="a single feature is x[:, None], a single sample x[None]",
            )
        if y.shape != (len(x),):
            raise DataError(
                "y must have one target for each row of x",
                got=f"shape {tuple(y.shape)}",
                expected=f"shape ({len(x)},)",
                remedy="y[:, 0] if it is a column" if y.shape == (len(x), 1) else None,
            )
        self._set("x", x)
        self._set("y", y)
        if self.propagation is not None:
            matrix = as_tensor("propagation", self.propagation)
            if matrix.shape != (len(x), len(x)):
                raise DataError(
                    "propagation must have a row and a column for each row of x",
                    got=f"shape {tuple(matrix.shape)}",
                    expected=f"shape ({len(x)}, {len(x)})",
                    remedy="graph_problem makes it of a graph",
                )
            self._set("propagation", matrix)

    def _set(self, name: str, value: Tensor) -> None:
        if value.is_complex():
            raise DataError(
                f"{name} must hold real numbers", got=value.dtype, remedy=f"give {name}.real"
            )
        if broken := int((~torch.isfinite(value)).sum()):
            raise DataError(
                f"{name} must hold finite numbers",
                got=f"{broken:,} of {value.numel():,} that are NaN or infinite",
                remedy="leave the samples out, or fill them in",
            )
        object.__setattr__(self, name, value.double())

    @classmethod
    def sphere(cls, num_samples: int = 50, dim: int = 20, *, seed: int = 0) -> Problem:
        """Samples drawn uniformly from the unit sphere, targets of either sign in [0.2, 1].

        Args:
            num_samples: n.
            dim: d.
            seed: The problem depends on this and the sizes alone.

        Raises:
            ConfigError: a size below 1.
        """
        require_count("num_samples", num_samples)
        require_count("dim", dim)
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
