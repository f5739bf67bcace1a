"""VGG: sizes of images and layers, filters as units."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gist.nn
from gist import partition_spec
from gist.errors import ConfigError
from gist.nn import VGG
from gist.partition.residual_wiring import wire_filters
from gist.verify import verify_wiring
from tests.subnets import largest_difference, normal
from tests.vision import torchvision_models


@pytest.mark.parametrize("name", ["vgg11", "vgg13", "vgg16"])
def test_convolutions_are_those_of_torchvision(name):
    with torch.device("meta"):
        ours = getattr(gist.nn, name)(7, in_channels=1)
        theirs = getattr(torchvision_models, f"{name}_bn")()
    shapes = [
        [tuple(m.weight.shape) for m in model.features if isinstance(m, nn.Conv2d)]
        for model in (ours, theirs)
    ]
    assert shapes[0][1:] == shapes[1][1:]
    assert shapes[0][0][1] == 1
    assert [type(m) for m in ours.features] == [type(m) for m in theirs.features]
    assert ours.head.out_features == 7


@pytest.mark.parametrize("pixels", [5, 28, 32])
def test_images_of_any_size(pixels):
    model = VGG(((4,), (6, 6), (8,), (8,), (8,)), num_classes=3)
    assert model(torch.randn(2, 3, pixels, pixels)).shape == (2, 3)


@pytest.mark.parametrize("wiring", [None, wire_filters])
def test_units_are_the_filters_of_every_convolution(wiring):
    model = VGG(((4,), (6, 8)), num_classes=3)
    spec = partition_spec(model, wiring)
    assert spec.sizes == {"features.0": 4, "features.4": 6, "features.7": 8}
    assert [(s.dim, s.group) for s in spec.layouts["head.weight"].slots] == [(1, "features.7")]
    assert largest_difference(model, normal(2, 3, 8, 8), wiring) < 1e-12
    assert verify_wiring(VGG(((4,), (6, 8))), (torch.randn(2, 3, 8, 8),), wiring=wiring) < 1e-5


@pytest.mark.parametrize("widths", [(), ((4,), ()), ((4, 0),)], ids=repr)
def test_wrong_widths_are_refused(widths):
    with pytest.raises(ConfigError, match="at least one convolution for every stage"):
        VGG(widths)
