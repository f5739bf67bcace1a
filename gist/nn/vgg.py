"""Plain convolutional networks (VGG, Simonyan & Zisserman, 2015) for small images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from gist.errors import ConfigError


class VGG(nn.Sequential):
    """3x3 convolutions with batch normalisation and ReLU, a pool behind every stage, linear head.

    A chain: units are the filters of every convolution. Pools round up, so that images of any size
    are large enough.

    Args:
        widths: Filters of every convolution, one sequence per stage.
        num_classes: Outputs per image.
        in_channels: Channels of the images.

    Raises:
        ConfigError: a stage without convolutions, or a width below 1.

    Shapes:
        [N, in_channels, H, W] -> [N, num_classes].
    """

    def __init__(
        self, widths: Sequence[Sequence[int]], *, num_classes: int = 10, in_channels: int = 3
    ) -> None:
        if not widths or not all(stage and min(stage) >= 1 for stage in widths):
            raise ConfigError(
                "VGG needs the width of at least one convolution for every stage", got=widths
            )
        super().__init__()
        self.features = nn.Sequential()
        channels = in_channels
        for stage in widths:
            for width in stage:
                self.features.append(nn.Conv2d(channels, width, 3, padding=1, bias=False))
                self.features.append(nn.BatchNorm2d(width))
                self.features.append(nn.ReLU())
                channels = width
            self.features.append(nn.MaxPool2d(2, ceil_mode=True))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.head = nn.Linear(channels, num_classes)


def vgg11(num_classes: int = 10, width: int = 64, **kwargs: Any) -> VGG:
    """Eight convolutions (configuration A), ``width`` to 8 ``width`` wide."""
    return _stages(width, (1, 1, 2, 2, 2), num_classes=num_classes, **kwargs)


def vgg13(num_classes: int = 10, width: int = 64, **kwargs: Any) -> VGG:
    """Ten convolutions (configuration B), ``width`` to 8 ``width`` wide."""
    return _stages(width, (2, 2, 2, 2, 2), num_classes=num_classes, **kwargs)


def vgg16(num_classes: int = 10, width: int = 64, **kwargs: Any) -> VGG:
    """Thirteen convolutions (configuration D), ``width`` to 8 ``width`` wide."""
    return _stages(width, (2, 2, 3, 3, 3), num_classes=num_classes, **kwargs)


def _stages(width: int, counts: Sequence[int], **kwargs: Any) -> VGG:
    """So many convolutions in each stage; widths double up to the fourth."""
    return VGG([[width * min(2**i, 8)] * count for i, count in enumerate(counts)], **kwargs)
