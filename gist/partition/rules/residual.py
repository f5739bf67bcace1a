"""Residual blocks, ``shortcut(x) + branch(x)``: with units in them, or units themselves."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from gist.partition.builder import Layer
from gist.partition.rules.registry import Rule
from gist.partition.spec import Axis


class ResidualRule(Rule):
    """A block that adds its branch to its input; what comes in and goes out stays whole.

    As a layer, its units are the filters of the branch's first convolution (LoFT, Wang et al.,
    2023); as a whole, it is itself a unit (ResIST, Dun et al., 2022), and the identity where it is
    absent. Subclasses name the layers of one block type.
    """

    branch: ClassVar[str]
    """The branch's last layer: the output of the branch is that of this layer, or what layers
    behind it make of it that scale with it."""

    filters: ClassVar[tuple[str, ...]]
    """Layers from the first convolution, whose filters are units, to the second, which takes them
    in, in the order of the data flow."""

    shortcut: ClassVar[str] = "downsample"
    """Attribute with what makes the input fit the output; None where that is the identity."""

    def connect(self, layer: Layer) -> Axis | None:
        """See :meth:`Rule.connect`."""
        if layer.input is not None or layer.is_partitioned:
            layer.refuse(
                "adds its input to its output, so that both must stay whole; units are filters "
                "within it (wiring=gist.wire_filters) or whole blocks (wiring=gist.wire_blocks)"
            )
        first, *between, second = self.filters
        axis = layer.inner(first, None)
        for name in between:
            axis = layer.child(name, axis)
        layer.child(second, axis)
        layer.whole()
        return None

    def keeps_shape(self, block: Any) -> bool:
        """Whether the block adds its input as it is, so that without the branch it does nothing."""
        return getattr(block, self.shortcut) is None

    def branch_end(self, block: nn.Module) -> nn.Module:
        """The branch's last layer."""
        return block.get_submodule(self.branch)
