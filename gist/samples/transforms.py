"""What turns stored samples into a model's input.

Shape legend: ``B`` samples of a batch, ``C`` channels, ``H`` and ``W`` height and width, ``F``
features.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, is_dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from gist.errors import ConfigError

Numbers = float | Iterable[float] | Tensor
"""One number for all channels or features, or one for each."""


class Transform(Protocol):
    """Any callable of this form; a frozen dataclass, if a run is to notice changed settings."""

    def __call__(self, batch: Tensor, *, training: bool, generator: Generator) -> Tensor:
        """The model's input of a batch of stored samples.

        Args:
            batch: ``[B, ...]``, as stored; not to be changed in place.
            training: Whether to augment.
            generator: On the CPU; the only source of what is drawn.
        """


def identify(transform: Transform | None) -> str:
    """Names a transform, with its settings where it is a dataclass."""
    if transform is None or is_dataclass(transform):
        return repr(transform)
    named = transform if hasattr(transform, "__qualname__") else type(transform)
    return f"{named.__module__}.{named.__qualname__}"


@dataclass(frozen=True, kw_only=True)
class ImageTransform:
    """Images of bytes as normalised floats: ``(x / 255 - mean) / std``, channel by channel.

    In training an image is padded with zeros, cut to its size again at a place drawn uniformly, and
    mirrored with probability one half: the usual augmentation of CIFAR (He et al., 2016, section
    4.2). Zeros are padded before normalising, so that the border is black.

    Attributes:
        mean: Of ``x / 255``: one number, or one for each channel.
        std: As ``mean``, positive.
        pad: Zeros on each side before an image is cut; 0 leaves images where they are.
        flip: Whether to mirror left and right.

    Raises:
        ConfigError: a value that cannot be used.
    """

    mean: Numbers = 0.0
    std: Numbers = 1.0
    pad: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        _settle(self)
        if not isinstance(self.pad, int) or isinstance(self.pad, bool) or self.pad < 0:
            raise ConfigError("pad must be a whole number of at least 0", got=repr(self.pad))
        if not isinstance(self.flip, bool):
            raise ConfigError("flip must be True or False", got=repr(self.flip))

    def __call__(self, batch: Tensor, *, training: bool, generator: Generator) -> Tensor:
        """``[B, C, H, W]`` uint8 to float32 of the same shape; see :class:`Transform`."""
        if training and (self.pad or self.flip):
            batch = self._augmented(batch, generator)
        mean, std = (
            torch.tensor(values, dtype=torch.float32, device=batch.device).view(-1, 1, 1)
            for values in (self.mean, self.std)
        )
        return batch.float().mul_(1 / (255 * std)).sub_(mean / std)

    def _augmented(self, batch: Tensor, generator: Generator) -> Tensor:
        count, _, height, width = batch.shape
        down, right = torch.randint(2 * self.pad + 1, (2, count, 1), generator=generator)
        rows, columns = down + torch.arange(height), right + torch.arange(width)
        if self.flip:
            mirrored = torch.rand(count, 1, generator=generator) < 0.5
            columns = torch.where(mirrored, columns.flip(1), columns)
        pixels = rows[:, :, None] * (width + 2 * self.pad) + columns[:, None, :]
        index = pixels.view(count, 1, -1).to(batch.device).expand(-1, batch.size(1), -1)
        return F.pad(batch, (self.pad,) * 4).flatten(2).gather(2, index).view(batch.shape)


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Standardised features: ``(x - mean) / std``, feature by feature.

    Attributes:
        mean: One number, or one for each feature.
        std: As ``mean``, positive.

    Raises:
        ConfigError: a value that cannot be used.
    """

    mean: Numbers = 0.0
    std: Numbers = 1.0

    def __post_init__(self) -> None:
        _settle(self)

    def __call__(self, batch: Tensor, *, training: bool, generator: Generator) -> Tensor:
        """``[B, ..., F]`` to the same shape, float32 or as exact as it is; see :class:`Transform`.

        Nothing is drawn.
        """
        kind = batch.dtype if batch.is_floating_point() else torch.float32
        mean, std = (
            torch.tensor(values, dtype=kind, device=batch.device)
            for values in (self.mean, self.std)
        )
        return (batch - mean) / std


def _settle(transform: ImageTransform | Scale) -> None:
    """Mean and standard deviation become tuples of numbers, checked."""
    for name in ("mean", "std"):
        given = getattr(transform, name)
        given = given.tolist() if hasattr(given, "tolist") else given
        numbers = tuple(given) if isinstance(given, Iterable) else (given,)
        sound = [
            isinstance(n, int | float) and math.isfinite(n) and (name == "mean" or n > 0)
            for n in numbers
        ]
        if not all(sound) or not sound:
            bad = numbers[sound.index(False)] if sound else numbers
            raise ConfigError(
                f"{name} must be {'positive' if name == 'std' else 'finite'}: one number, or one "
                "for each channel or feature",
                got=repr(bad),
                remedy="features that are constant need std=1" if bad == 0 else None,
            )
        object.__setattr__(transform, name, tuple(float(n) for n in numbers))
