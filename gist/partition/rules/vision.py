"""Rules for the models of torchvision; the registry imports them when it first meets one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.vgg import VGG

from gist.partition.rules.registry import register_rule
from gist.partition.rules.residual import ResidualRule
from gist.partition.rules.torch import SequentialRule


@register_rule(BasicBlock)
class BasicBlockRule(ResidualRule):
    """``relu(x + bn2(conv2(relu(bn1(conv1(x))))))`` (He et al., 2016a).

    Absent, it is the identity because its input comes out of a ReLU.
    """

    branch = "bn2"
    filters = ("conv1", "bn1", "relu", "conv2")


@register_rule(Bottleneck)
class BottleneckRule(ResidualRule):
    """The same with three convolutions, of 1x1, 3x3 and 1x1 pixels."""

    branch = "bn3"
    filters = ("conv1", "bn1", "relu", "conv2")


@register_rule(VGG)
class VGGRule(SequentialRule):
    """Convolutions, a pool and a classifier (Simonyan & Zisserman, 2015), flattened in between."""

    def chain(self, module: Any) -> Sequence[str]:
        """See :meth:`Rule.chain`."""
        return ("features", "avgpool", "classifier")
