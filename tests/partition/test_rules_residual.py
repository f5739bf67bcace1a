"""Residual blocks as layers: filters of the first convolution, everything else whole."""

from __future__ import annotations

import pytest
import torch.nn.functional as F
from torch import Tensor, nn

from gist import Axis, partition_spec, register_rule
from gist.errors import PartitionError
from gist.nn.resnet import PreActBlock, PreActBottleneck
from gist.partition.builder import SpecBuilder
from gist.partition.index_map import ONE_POSITION
from gist.partition.residual_wiring import wire_filters
from gist.partition.rules.registry import rule_of
from gist.partition.rules.residual import ResidualRule
from tests.subnets import largest_difference, normal


class Gated(nn.Module):
    """``x + scale(conv2(act(conv1(x))))``, registered below as a user would."""

    def __init__(self, width: int, act: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(width, 2 * width, 1), nn.Conv2d(2 * width, width, 1)
        self.act = nn.GELU() if act is None else act
        self.scale = nn.Conv2d(width, width, 1)
        self.downsample = None

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale(F.relu(self.conv2(self.act(self.conv1(x)))))


@register_rule(Gated)
class GatedRule(ResidualRule):
    branch = "scale"
    filters = ("conv1", "act", "conv2")


def slots(spec, name):
    return {(s.dim, s.group) for s in spec.layouts[name].slots}


@pytest.mark.parametrize("kind", [PreActBlock, PreActBottleneck])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_second_convolution_takes_in_what_the_first_puts_out(kind, stride):
    spec = partition_spec(nn.Sequential(kind(6 * kind.expansion, 6, stride)), wire_filters)
    assert spec.sizes == {"0.conv1": 6}
    followers = {
        "0.conv1.weight": (0, "0.conv1"),
        "0.conv2.weight": (1, "0.conv1"),
        **{
            f"0.norm2.{name}": (0, "0.conv1")
            for name in ("weight", "bias", "running_mean", "running_var")
        },
    }
    for name in spec.layouts:
        assert slots(spec, name) == ({followers[name]} if name in followers else set()), name
    assert ("0.shortcut.weight" in spec.layouts) == (stride == 2)


def test_a_block_type_of_ones_own():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Gated(4), Gated(4), nn.Conv2d(4, 2, 1))
    assert partition_spec(model, wire_filters).sizes == {"1.conv1": 8, "2.conv1": 8}
    assert largest_difference(model, normal(2, 3, 5, 5), wire_filters) < 1e-12


def test_a_layer_between_that_has_no_rule_is_named():
    with pytest.raises(PartitionError, match=r"0\.act: no partition rule .*Softmax"):
        partition_spec(nn.Sequential(Gated(4, nn.Softmax(1))), wire_filters)


def test_inputs_and_outputs_cannot_be_partitioned():
    axis = Axis(size=4, parts=(("h", ONE_POSITION),))
    for given, produces in [(axis, None), (None, "h")]:
        builder = SpecBuilder(nn.ModuleDict({"block": Gated(4)}))
        builder.group("h", 4)
        builder.layer("block", given, produces=produces)
        with pytest.raises(PartitionError, match=r"block: adds its input .* must stay whole"):
            builder.build()


def test_what_the_rule_says_of_a_block():
    same, other = PreActBottleneck(8, 2), PreActBottleneck(8, 4)
    rule = rule_of(same)
    assert rule.keeps_shape(same)
    assert not rule.keeps_shape(other)
    assert rule.branch_end(same) is same.conv3
    assert rule_of(PreActBlock(4, 4)).branch == "conv2"
