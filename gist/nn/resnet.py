"""Pre-activation residual networks (He et al., 2016b), at the sizes of ResIST and LoFT.

Shape legend: ``N`` images, ``C`` channels, ``H`` x ``W`` pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from gist.errors import ConfigError
from gist.partition.builder import SpecBuilder
from gist.partition.residual_wiring import wire_filters
from gist.partition.rules.registry import register_rule
from gist.partition.rules.residual import ResidualRule

Norm = Literal["batch", "layer"]


def _layer_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(1, channels)


_NORMS: dict[str, Callable[[int], nn.Module]] = {"batch": nn.BatchNorm2d, "layer": _layer_norm}


class PreActBlock(nn.Module):
    """``shortcut(x) + conv2(relu(norm2(conv1(relu(norm1(x))))))``, with 3x3 convolutions.

    Where the shape changes, the shortcut is a 1x1 convolution of ``relu(norm1(x))``; else it is x.

    Args:
        in_channels: Channels of the input.
        channels: Filters of each convolution.
        stride: Of the first convolution and of the shortcut.
        norm: See :class:`PreActResNet`.

    Shapes:
        [N, in_channels, H, W] -> [N, channels, H / stride, W / stride].
    """

    expansion: ClassVar[int] = 1

    def __init__(
        self, in_channels: int, channels: int, stride: int = 1, *, norm: Norm = "batch"
    ) -> None:
        super().__init__()
        make_norm = _NORMS[norm]
        self.norm1 = make_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.norm2 = make_norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.shortcut = _shortcut(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the block."""
        h = F.relu(self.norm1(x))
        shortcut: Tensor = x if self.shortcut is None else self.shortcut(h)
        branch: Tensor = self.conv1(h)
        branch = self.conv2(F.relu(self.norm2(branch)))
        return shortcut + branch


class PreActBottleneck(nn.Module):
    """The same with three convolutions: 1x1, 3x3 with the stride, and 1x1 to 4 x ``channels``.

    Args:
        in_channels: Channels of the input.
        channels: Filters of the first two convolutions.
        stride: Of the second convolution and of the shortcut.
        norm: See :class:`PreActResNet`.

    Shapes:
        [N, in_channels, H, W] -> [N, 4 * channels, H / stride, W / stride].
    """

    expansion: ClassVar[int] = 4

    def __init__(
        self, in_channels: int, channels: int, stride: int = 1, *, norm: Norm = "batch"
    ) -> None:
        super().__init__()
        out_channels, make_norm = self.expansion * channels, _NORMS[norm]
        self.norm1 = make_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.norm2 = make_norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.norm3 = make_norm(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.shortcut = _shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the block."""
        h = F.relu(self.norm1(x))
        shortcut: Tensor = x if self.shortcut is None else self.shortcut(h)
        branch: Tensor = self.conv1(h)
        branch = self.conv2(F.relu(self.norm2(branch)))
        branch = self.conv3(F.relu(self.norm3(branch)))
        return shortcut + branch


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)


@register_rule(PreActBlock)
class PreActBlockRule(ResidualRule):
    """Units are the filters of the first convolution."""

    branch = "conv2"
    filters = ("conv1", "norm2", "conv2")
    shortcut = "shortcut"


@register_rule(PreActBottleneck)
class PreActBottleneckRule(PreActBlockRule):
    """Units are the filters of the first convolution, which the 3x3 convolution takes in."""

    branch = "conv3"


_BLOCKS: dict[str, type[PreActBlock | PreActBottleneck]] = {
    "basic": PreActBlock,
    "bottleneck": PreActBottleneck,
}


class PreActResNet(nn.Module):
    """Pre-activation ResNet (He et al., 2016b): stem, stages of blocks, norm, mean, linear head.

    From the second stage on, the first block of a stage halves height and width. Without other
    ``wiring``, its units are the filters within blocks (:func:`gist.wire_filters`);
    :func:`gist.wire_blocks` makes them the blocks.

    Args:
        num_blocks: Blocks of each stage.
        widths: Filters of each stage; its output has four times as many with ``"bottleneck"``.
        block: ``"basic"`` (:class:`PreActBlock`) or ``"bottleneck"`` (:class:`PreActBottleneck`).
        num_classes: Outputs per image.
        in_channels: Channels of the images.
        stem: ``"cifar"``, a 3x3 convolution; or ``"imagenet"``, one of 7x7 and a pool, each of
            which halves height and width.

    Raises:
        ConfigError: no stage, or stages that do not fit; an unknown ``block`` or ``stem``.

    Shapes:
        [N, in_channels, H, W] -> [N, num_classes].
    """

    def __init__(
        self,
        num_blocks: Sequence[int] = (3, 4, 23, 3),
        widths: Sequence[int] = (64, 128, 256, 512),
        *,
        block: Literal["basic", "bottleneck"] = "bottleneck",
        num_classes: int = 10,
        in_channels: int = 3,
        stem: Literal["cifar", "imagenet"] = "cifar",
        norm: Norm = "batch",
    ) -> None:
        super().__init__()
        if not num_blocks or len(num_blocks) != len(widths) or min(*num_blocks, *widths) < 1:
            raise ConfigError(
                "PreActResNet needs a number of blocks and a width for every stage",
                got=f"num_blocks={num_blocks}, widths={widths}",
                expected="as many of both, each at least 1",
            )
        if block not in _BLOCKS:
            raise ConfigError("unknown block", got=repr(block), expected=" or ".join(_BLOCKS))
        if norm not in _NORMS:
            raise ConfigError("unknown norm", got=repr(norm), expected=" or ".join(_NORMS))
        kind = _BLOCKS[block]
        self.stem = _stem(stem, in_channels, widths[0])
        self.stages = nn.Sequential()
        channels = widths[0]
        for stage, (count, width) in enumerate(zip(num_blocks, widths, strict=True)):
            blocks = nn.Sequential()
            for i in range(count):
                blocks.append(
                    kind(channels, width, stride=2 if stage > 0 and i == 0 else 1, norm=norm)
                )
                channels = kind.expansion * width
            self.stages.append(blocks)
        self.norm = _NORMS[norm](channels)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of every image."""
        h = F.relu(self.norm(self.stages(self.stem(x))))
        out: Tensor = self.head(h.mean(dim=(2, 3)))
        return out

    def declare_wiring(self, builder: SpecBuilder) -> None:
        """Filters within blocks; see :func:`gist.wire_filters`."""
        wire_filters(self, builder)


def _stem(stem: str, in_channels: int, channels: int) -> nn.Module:
    if stem == "cifar":
        return nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
    if stem == "imagenet":
        conv = nn.Conv2d(in_channels, channels, 7, stride=2, padding=3, bias=False)
        return nn.Sequential(conv, nn.MaxPool2d(3, stride=2, padding=1))
    raise ConfigError("unknown stem", got=repr(stem), expected="cifar or imagenet")


def _doubling(width: int, num_blocks: Sequence[int], **kwargs: Any) -> PreActResNet:
    """From stage to stage twice as many filters."""
    return PreActResNet(num_blocks, [width * 2**i for i in range(len(num_blocks))], **kwargs)


def preact_resnet8(num_classes: int = 10, width: int = 16, **kwargs: Any) -> PreActResNet:
    """Three stages of one basic block, ``width`` to 4 ``width`` wide: for small devices."""
    return _doubling(width, (1, 1, 1), block="basic", num_classes=num_classes, **kwargs)


def preact_resnet18(num_classes: int = 10, width: int = 64, **kwargs: Any) -> PreActResNet:
    """Four stages of 2, 2, 2 and 2 basic blocks, ``width`` to 8 ``width`` wide."""
    return _doubling(width, (2, 2, 2, 2), block="basic", num_classes=num_classes, **kwargs)


def preact_resnet20(num_classes: int = 10, width: int = 16, **kwargs: Any) -> PreActResNet:
    """Three stages of 3 basic blocks, ``width`` to 4 ``width`` wide: He et al.'s smallest."""
    return _doubling(width, (3, 3, 3), block="basic", num_classes=num_classes, **kwargs)


def preact_resnet32(num_classes: int = 10, width: int = 16, **kwargs: Any) -> PreActResNet:
    """Three stages of 5 basic blocks, ``width`` to 4 ``width`` wide."""
    return _doubling(width, (5, 5, 5), block="basic", num_classes=num_classes, **kwargs)


def preact_resnet34(num_classes: int = 10, width: int = 64, **kwargs: Any) -> PreActResNet:
    """Four stages of 3, 4, 6 and 3 basic blocks, ``width`` to 8 ``width`` wide."""
    return _doubling(width, (3, 4, 6, 3), block="basic", num_classes=num_classes, **kwargs)


def preact_resnet101(num_classes: int = 10, width: int = 64, **kwargs: Any) -> PreActResNet:
    """Four stages of 3, 4, 23 and 3 bottlenecks, ``width`` to 8 ``width`` wide."""
    return _doubling(width, (3, 4, 23, 3), num_classes=num_classes, **kwargs)


def preact_resnet152(num_classes: int = 10, width: int = 64, **kwargs: Any) -> PreActResNet:
    """Four stages of 3, 4, 36 and 3 bottlenecks, as ResIST has them (He et al.: 3, 8, 36, 3)."""
    return _doubling(width, (3, 4, 36, 3), num_classes=num_classes, **kwargs)


def preact_resnet200(num_classes: int = 10, width: int = 64, **kwargs: Any) -> PreActResNet:
    """Four stages of 3, 4, 50 and 3 bottlenecks, as ResIST has them (He et al.: 3, 24, 36, 3)."""
    return _doubling(width, (3, 4, 50, 3), num_classes=num_classes, **kwargs)
