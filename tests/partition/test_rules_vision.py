"""Models of torchvision and timm: filters and blocks as units, and what is refused."""

from __future__ import annotations

import re
from collections import OrderedDict
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import gist
from gist import partition_spec
from gist.errors import PartitionError
from gist.execution.initialise import initialise, place_model
from gist.partition.residual_wiring import wire_blocks, wire_filters
from gist.partition.rules.registry import _ON_DEMAND
from gist.partition.samplers import Overlapping
from gist.partition.spec import model_tensors
from gist.partition.subnet import build_subnet
from gist.verify import verify_wiring
from tests.subnets import (
    assignments,
    largest_difference,
    normal,
    perturbed,
    without_absent_blocks,
)
from tests.vision import resnetv2, timm, torchvision_models


def torchvision_resnet(block: str, **settings) -> nn.Module:
    """A stage of torchvision's blocks with a small stem and head, of few channels."""
    kind = getattr(torchvision_models.resnet, block)
    out = 8 * kind.expansion
    shorten = nn.Sequential(nn.Conv2d(6, out, 1, stride=2), nn.BatchNorm2d(out))
    first = kind(6, 8, stride=2, downsample=shorten, **settings)
    layers = OrderedDict(
        stem=nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU()),
        layer3=nn.Sequential(first, kind(out, 8, **settings), kind(out, 8, **settings)),
        head=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(out, 5)),
    )
    return nn.Sequential(layers)


def timm_resnet(basic: bool, **settings) -> nn.Module:
    norm_and_conv = {
        "norm_layer": timm.layers.BatchNormAct2d,
        "conv_layer": timm.layers.create_conv2d,
    }
    layers, channels = [1, 3], (32, 64)
    given = {"stem_chs": 8, "num_classes": 5, "basic": basic, "bottle_ratio": 1.0 if basic else 0.5}
    return resnetv2.ResNetV2(layers, channels, **{**given, **norm_and_conv, **settings})


RESNETS = {
    "torchvision, basic": partial(torchvision_resnet, "BasicBlock"),
    "torchvision, bottleneck": partial(torchvision_resnet, "Bottleneck"),
    "timm, basic": partial(timm_resnet, True),
    "timm, bottleneck": partial(timm_resnet, False, act_layer=nn.SiLU, avg_down=True),
}


@pytest.mark.parametrize("make", RESNETS.values(), ids=RESNETS)
def test_filters(make):
    x = torch.randn(2, 3, 32, 32)
    assert largest_difference(make(), x.double(), wire_filters) < 1e-12
    assert verify_wiring(make(), (x,), wiring=wire_filters) < 1e-5


@pytest.mark.parametrize("make", RESNETS.values(), ids=RESNETS)
def test_blocks(make):
    model = perturbed(make())
    x = normal(2, 3, 32, 32)
    spec = partition_spec(model, wire_blocks)
    assert list(spec.sizes.values()) == [2]
    for assignment in assignments(spec):
        for i in range(assignment.num_subnets):
            for training in (False, True):
                subnet = build_subnet(model, spec, assignment, i).train(training)
                shallow = without_absent_blocks(model, spec, assignment, i).train(training)
                assert torch.equal(subnet(x), shallow(x))
    assert verify_wiring(make(), (x.float(),), wiring=wire_blocks) < 1e-5


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("resnet18", {"layer3": 1}), ("resnet50", {"layer3": 5}), ("resnet101", {"layer3": 22})],
)
def test_torchvisions_networks(name, sizes):
    with torch.device("meta"):
        model = getattr(torchvision_models, name)()
    assert partition_spec(model, partial(wire_blocks, stages=("layer3",))).sizes == sizes
    filters = partition_spec(model, wire_filters)
    blocks = sum(len(getattr(model, f"layer{i}")) for i in (1, 2, 3, 4))
    assert len(filters.groups) == blocks
    assert filters.sizes["layer4.1.conv1"] == 512
    with pytest.raises(PartitionError, match=r"wiring of ResNet is not known.*wire_filters"):
        partition_spec(model)


def test_timms_networks():
    with torch.device("meta"):
        model = resnetv2.resnetv2_50()
    assert partition_spec(model, wire_blocks).sizes == {"stages.2.blocks": 5}
    by_name = partial(wire_blocks, stages=("stages.1", "stages.2.blocks"))
    assert partition_spec(model, by_name).sizes == {"stages.1.blocks": 3, "stages.2.blocks": 5}
    assert partition_spec(model, wire_filters).sizes["stages.2.blocks.1.conv1"] == 256


def vgg() -> nn.Module:
    features = torchvision_models.vgg.make_layers([6, "M", 8, "M"], batch_norm=True)
    model = torchvision_models.VGG(nn.Sequential(*features), init_weights=False)
    model.classifier = nn.Sequential(
        nn.Linear(8 * 49, 12), nn.ReLU(True), nn.Dropout(), nn.Linear(12, 3)
    )
    return model


@pytest.mark.parametrize(
    ("wiring", "sizes"),
    [
        (None, {"features.0": 6, "features.4": 8, "classifier.0": 12}),
        (wire_filters, {"features.0": 6, "features.4": 8}),
    ],
)
def test_torchvisions_vgg_is_a_chain(wiring, sizes):
    with torch.device("meta"):  # its own classifier is large
        model = vgg()
    tensors = {n: torch.empty_like(t, device="cpu") for n, t in model_tensors(model).items()}
    place_model(model, tensors)
    initialise(model, seed=0)
    assert partition_spec(model, wiring).sizes == sizes
    assert largest_difference(model, normal(2, 3, 28, 28), wiring) < 1e-12


def test_vgg11_has_a_group_for_every_layer_but_the_last():
    with torch.device("meta"):
        model = torchvision_models.vgg11_bn(num_classes=10)
    widths = [64, 128, 256, 256, 512, 512, 512, 512, 4096, 4096]
    assert list(partition_spec(model).sizes.values()) == widths
    assert list(partition_spec(model, wire_filters).sizes.values()) == widths[:8]


def test_a_filter_that_is_standardised_may_be_a_unit():
    model = nn.Sequential(
        timm.layers.StdConv2d(3, 6, 3, bias=True), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1)
    )
    assert partition_spec(model).sizes == {"0": 6}
    assert largest_difference(model, normal(2, 3, 6, 6)) < 1e-12


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (
            {"conv_layer": timm.layers.StdConv2d},
            r"stages\.0\.blocks\.0\.conv2: standardises filters over all of their input channels",
        ),
        (
            {"norm_layer": partial(timm.layers.GroupNormAct, num_groups=4)},
            r"stages\.1\.blocks\.2\.norm2: no partition rule for layer type .*GroupNormAct",
        ),
        (
            {"act_layer": "hard_mish"},
            r"norm2\.act: no partition rule for layer type .*timm",
        ),
    ],
    ids=["standardised", "group norm", "activation"],
)
def test_filters_of_blocks_that_mix_them_are_refused_and_blocks_are_not(settings, why):
    model = timm_resnet(True, **settings)
    with pytest.raises(PartitionError, match=why):
        partition_spec(model, wire_filters)
    model = perturbed(model)
    spec = partition_spec(model, wire_blocks)
    assert spec.sizes == {"stages.1.blocks": 2}
    assignment = Overlapping(min_units=1)(spec.sizes, 2, seed=0, round=0)
    x = normal(2, 3, 32, 32)
    for i in (0, 1):
        shallow = without_absent_blocks(model, spec, assignment, i)
        assert torch.equal(build_subnet(model, spec, assignment, i)(x), shallow(x))


def test_grouped_convolutions_are_refused_as_units_and_not_as_blocks():
    model = torchvision_resnet("Bottleneck", groups=4, base_width=8)
    with pytest.raises(PartitionError, match=r"layer3\.0\.conv2: grouped convolutions"):
        partition_spec(model, wire_filters)
    assert partition_spec(model, wire_blocks).sizes == {"layer3": 2}


@pytest.mark.parametrize("wiring", [wire_filters, wire_blocks])
def test_torchvisions_smallest_network_is_verified(wiring):
    model = torchvision_models.resnet18(num_classes=5)
    assert verify_wiring(model, (torch.randn(2, 3, 32, 32),), wiring=wiring) < 1e-4


def test_nothing_of_these_packages_is_imported_before_it_is_met():
    package = Path(gist.__file__).parent
    statement = re.compile(r"^\s*(from|import) (torchvision|timm)\b", re.MULTILINE)
    importers = {p.stem for p in package.rglob("*.py") if statement.search(p.read_text())}
    assert importers == {"vision", "timm_layers"}
    assert importers <= {module.rpartition(".")[2] for module in _ON_DEMAND.values()}
