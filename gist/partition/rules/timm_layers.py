"""Rules for layers of timm; the registry imports them when it first meets one."""

from __future__ import annotations

from timm.layers.norm_act import BatchNormAct2d
from timm.layers.std_conv import StdConv2d
from timm.models.resnetv2 import PreActBasic, PreActBottleneck

from gist.partition.builder import Layer
from gist.partition.rules.registry import register_rule
from gist.partition.rules.residual import ResidualRule
from gist.partition.rules.torch import BatchNormRule, Conv2dRule
from gist.partition.spec import Axis


@register_rule(BatchNormAct2d)
class BatchNormActRule(BatchNormRule):
    """Batch normalisation, then dropout and an activation, which need rules of their own."""

    def connect(self, layer: Layer) -> Axis | None:
        """See :meth:`Rule.connect`."""
        return layer.child("act", layer.child("drop", super().connect(layer)))


@register_rule(StdConv2d)
class StdConv2dRule(Conv2dRule):
    """A convolution whose filters are each standardised over their inputs (Qiao et al., 2019).

    A filter does not depend on the others, so that they may be units; its inputs may not.
    """

    def connect(self, layer: Layer) -> Axis | None:
        """See :meth:`Rule.connect`."""
        if layer.input is not None:
            layer.refuse(
                "standardises filters over all of their input channels, which mixes units; "
                "only its output channels can be partitioned"
            )
        return super().connect(layer)


@register_rule(PreActBasic)
class PreActBasicRule(ResidualRule):
    """``x + conv2(norm2(conv1(norm1(x))))``; norms end with an activation."""

    branch = "conv2"
    filters = ("conv1", "norm2", "conv2")


@register_rule(PreActBottleneck)
class PreActBottleneckRule(ResidualRule):
    """``x + conv3(norm3(conv2(norm2(conv1(norm1(x))))))``; norms end with an activation."""

    branch = "conv3"
    filters = ("conv1", "norm2", "conv2")
