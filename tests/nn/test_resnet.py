"""Pre-activation ResNets: their function, their sizes, their subnets."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F

import gist.nn
from gist import partition_spec
from gist.errors import ConfigError
from gist.nn import PreActResNet
from gist.nn.resnet import PreActBlock, PreActBottleneck
from gist.partition.residual_wiring import wire_blocks, wire_filters
from gist.verify import verify_wiring
from tests.subnets import largest_difference, normal, perturbed
from tests.vision import resnetv2, timm


def small(**settings) -> PreActResNet:
    return PreActResNet((2, 3, 2), (6, 8, 10), **{"num_classes": 4, **settings})


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [8, 16])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(PreActBlock, resnetv2.PreActBasic), (PreActBottleneck, resnetv2.PreActBottleneck)],
)
def test_blocks_are_those_of_timm(ours, theirs, channels, stride):
    in_channels, out_channels = ours.expansion * 8, ours.expansion * channels
    changes = stride != 1 or out_channels != in_channels
    reference = theirs(
        in_channels,
        out_channels,
        stride=stride,
        conv_layer=timm.layers.create_conv2d,
        norm_layer=timm.layers.BatchNormAct2d,
        proj_layer=resnetv2.DownsampleConv if changes else None,
    )
    reference = perturbed(reference)
    block = ours(in_channels, channels, stride).double()
    state = reference.state_dict()
    block.load_state_dict({k.replace("downsample.conv", "shortcut"): v for k, v in state.items()})
    assert (block.shortcut is None) == (not changes)
    x = normal(3, in_channels, 6, 6)
    for training in (False, True):
        block.train(training)
        reference.train(training)
        assert torch.equal(block(x), reference(x))


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_the_network_is_stem_blocks_norm_mean_and_head(block):
    model = perturbed(small(block=block, in_channels=2))
    h = x = normal(3, 2, 8, 8)
    h = F.conv2d(h, model.stem.weight, padding=1)
    for stage in model.stages:
        for each in stage:
            h = each(h)
    norm = model.norm
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    shift = norm.bias - norm.running_mean * scale
    h = (h * scale[:, None, None] + shift[:, None, None]).clamp(min=0)
    assert h.shape[2:] == (2, 2), "halved by all stages but the first"
    expected = h.flatten(2).mean(2) @ model.head.weight.T + model.head.bias
    assert torch.allclose(model(x), expected, rtol=0, atol=1e-12)


def test_the_stem_for_large_images_divides_height_and_width_by_four():
    stem = small(stem="imagenet").stem
    assert stem(torch.zeros(1, 3, 64, 64)).shape == (1, 6, 16, 16)


BOTTLENECK = (2 * 1024 * 256 + 9 * 256**2 + 2 * (1024 + 2 * 256)) / 1e6  # of the third stage
SIZES = {  # millions of parameters at 10 classes, and the blocks
    "preact_resnet8": (0.078, [1, 1, 1]),
    "preact_resnet18": (11.17, [2, 2, 2, 2]),
    "preact_resnet20": (0.27, [3, 3, 3]),
    "preact_resnet34": (21.28, [3, 4, 6, 3]),
    "preact_resnet101": (42.5, [3, 4, 23, 3]),
    "preact_resnet152": (42.5 + 13 * BOTTLENECK, [3, 4, 36, 3]),
    "preact_resnet200": (42.5 + 27 * BOTTLENECK, [3, 4, 50, 3]),
}


@pytest.mark.parametrize(("name", "size"), SIZES.items(), ids=SIZES)
def test_sizes(name, size):
    with torch.device("meta"):
        model = getattr(gist.nn, name)()
        other = getattr(gist.nn, name)(7, in_channels=1)
    millions, depths = size
    count = sum(p.numel() for p in model.parameters())
    assert abs(count / 1e6 - millions) <= 0.01 * millions
    assert [len(stage) for stage in model.stages] == depths
    assert model.head.out_features == 10
    assert (other.head.out_features, other.stem.in_channels) == (7, 1)


WIRINGS = {"declared": None, "filters": wire_filters, "blocks": wire_blocks} | {
    "two stages": partial(wire_blocks, stages=("stages.0", "stages.1"))
}


@pytest.mark.parametrize("wiring", WIRINGS.values(), ids=WIRINGS)
@pytest.mark.parametrize("block", ["basic", "bottleneck"])
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_subnets(norm, block, wiring):
    settings = {"block": block, "norm": norm}
    assert largest_difference(small(**settings), normal(2, 3, 8, 8), wiring) < 1e-12
    x = torch.randn(2, 3, 8, 8)
    assert verify_wiring(small(**settings), (x,), wiring=wiring) < 1e-5


def test_with_layer_norms_an_image_has_the_same_scores_whatever_is_beside_it():
    model, x = small(norm="layer").double(), normal(3, 3, 8, 8)
    assert not list(model.buffers())
    assert torch.allclose(model(x)[:1], model(x[:1]), rtol=0, atol=1e-12)


def test_filters_are_the_default():
    assert partition_spec(small()) == partition_spec(small(), wire_filters)
    assert partition_spec(small(block="basic")).sizes == {
        f"stages.{stage}.{i}.conv1": width
        for stage, (count, width) in enumerate([(2, 6), (3, 8), (2, 10)])
        for i in range(count)
    }


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"num_blocks": ()}, r"num_blocks=\(\)"),
        ({"num_blocks": (1, 2)}, r"num_blocks=\(1, 2\), widths=\(64, 128, 256, 512\)"),
        ({"num_blocks": (1,), "widths": (0,)}, r"widths=\(0,\)"),
        ({"num_blocks": (0,), "widths": (4,)}, r"num_blocks=\(0,\)"),
        ({"block": "wide"}, "unknown block; got: 'wide'; expected: basic or bottleneck"),
        ({"norm": "group"}, "unknown norm; got: 'group'; expected: batch or layer"),
        ({"stem": "mnist"}, "unknown stem; got: 'mnist'; expected: cifar or imagenet"),
    ],
)
def test_wrong_settings_are_refused(settings, why):
    with pytest.raises(ConfigError, match=why):
        PreActResNet(**settings)
