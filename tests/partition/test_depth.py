"""Branches of blocks, scaled by how often they ran: by hooks, and folded into weights."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from gist import partition_spec
from gist.errors import PartitionError
from gist.nn import PreActResNet
from gist.partition.assignment import Assignment
from gist.partition.builder import SpecBuilder
from gist.partition.depth import block_shares, fold_depth, scaled_blocks
from gist.partition.residual_wiring import wire_blocks, wire_filters
from gist.partition.samplers import DisjointUniform, Overlapping
from gist.partition.subnet import build_subnet
from tests.subnets import normal, perturbed
from tests.vision import resnetv2, timm, torchvision_models


def ours(block: str) -> nn.Module:
    return PreActResNet((1, 4), (4, 6), block=block, num_classes=3)


def timms(basic: bool, **settings) -> nn.Module:
    given = {"norm_layer": timm.layers.BatchNormAct2d, "conv_layer": timm.layers.create_conv2d}
    return resnetv2.ResNetV2(
        [1, 3], (32, 32), num_classes=3, stem_chs=8, basic=basic, **{**given, **settings}
    )


def torchvisions(block: str) -> nn.Module:
    kind = getattr(torchvision_models.resnet, block)
    channels = 4 * kind.expansion
    stem = nn.Sequential(nn.Conv2d(3, channels, 3, stride=2), nn.ReLU())
    return nn.Sequential(stem, nn.Sequential(*(kind(channels, 4) for _ in range(3))))


MODELS = {
    "ours, basic": partial(ours, "basic"),
    "ours, bottleneck": partial(ours, "bottleneck"),
    "torchvision, basic": partial(torchvisions, "BasicBlock"),
    "torchvision, bottleneck": partial(torchvisions, "Bottleneck"),
    "timm, basic": partial(timms, True),
    "timm, bottleneck": partial(timms, False),
}


def wired(model: nn.Module):
    spec = partition_spec(model, wire_blocks)
    return spec, dict.fromkeys(spec.sizes, 0.3)


class Halved(nn.Module):
    """``x + share * (block(x) - x)``: for blocks that end with the sum."""

    def __init__(self, block: nn.Module, share: float) -> None:
        super().__init__()
        self.block, self.share = block, share

    def forward(self, x: Tensor) -> Tensor:
        return x + self.share * (self.block(x) - x)


@pytest.mark.parametrize("name", [name for name in MODELS if "torchvision" not in name])
def test_what_blocks_add_is_scaled(name):
    model = perturbed(MODELS[name]())
    spec, shares = wired(model)
    reference = copy.deepcopy(model)
    for path in spec.blocks:
        reference.set_submodule(path, Halved(reference.get_submodule(path), 0.3))
    x = normal(2, 3, 32, 32)
    whole = model(x)
    with scaled_blocks(model, spec, shares):
        scaled = model(x)
    assert torch.allclose(scaled, reference(x), rtol=1e-11, atol=1e-11)
    assert not torch.allclose(scaled, whole, rtol=1e-7, atol=1e-7)
    assert torch.equal(model(x), whole), "on leaving it is as before"


def test_the_activation_behind_the_sum_is_not_scaled():
    block = perturbed(torchvision_models.resnet.BasicBlock(4, 4))
    model = nn.Sequential(copy.deepcopy(block), block)
    spec, shares = wired(model)
    x = normal(2, 4, 5, 5).relu()
    h = model[0](x)
    branch = block.bn2(block.conv2(block.bn1(block.conv1(h)).relu()))
    with scaled_blocks(model, spec, shares):
        assert torch.allclose(model(x), (h + 0.3 * branch).relu(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_folding_gives_the_same_function(make):
    model = perturbed(make())
    spec, shares = wired(model)
    folded = copy.deepcopy(model)
    fold_depth(folded, spec, shares)
    x = normal(2, 3, 32, 32)
    with torch.no_grad(), scaled_blocks(model, spec, shares):
        expected = model(x)
    difference = (folded(x) - expected).abs().max() / expected.abs().max()
    assert float(difference.detach()) < 1e-12
    state = model.state_dict()
    changed = [k for k, v in folded.state_dict().items() if not torch.equal(v, state[k])]
    assert {k.rpartition(".")[0].rpartition(".")[0] for k in changed} == set(spec.blocks)


def test_shares_are_means_over_the_subnets():
    spec = partition_spec(
        PreActResNet((3, 5), (2, 2), block="basic"),
        partial(wire_blocks, stages=("stages.0", "stages.1")),
    )
    held = {
        "stages.0": (torch.tensor([0]), torch.tensor([0, 1])),
        "stages.1": (torch.tensor([0, 1, 2]), torch.tensor([3])),
    }
    assignment = Assignment(round=0, sizes=spec.sizes, held=held)
    assert block_shares(spec, assignment) == {"stages.0": 3 / 4, "stages.1": 4 / 8}
    for m in (1, 2):
        dealt = DisjointUniform()(spec.sizes, m, seed=0, round=0)
        assert block_shares(spec, dealt) == dict.fromkeys(spec.sizes, 1 / m)


def test_filters_have_no_shares():
    model = ours("basic")
    spec = partition_spec(model, wire_filters)
    assignment = DisjointUniform()(spec.sizes, 2, seed=0, round=0)
    assert block_shares(spec, assignment) == {}
    x = torch.randn(2, 3, 8, 8)
    with scaled_blocks(model.eval(), spec, {}):
        assert torch.equal(model(x), model(x))
        assert not any(module._forward_hooks for module in model.modules())


def test_a_share_of_one_changes_nothing():
    model = perturbed(ours("basic"))
    spec, _ = wired(model)
    ones = dict.fromkeys(spec.sizes, 1.0)
    x = normal(2, 3, 8, 8)
    before = model(x)
    with scaled_blocks(model, spec, ones):
        assert torch.equal(model(x), before)
        assert not any(module._forward_hooks for module in model.modules())
    fold_depth(model, spec, ones)
    assert torch.equal(model(x), before)


def test_absent_blocks_of_a_subnet_are_passed_over():
    model = perturbed(ours("basic"))
    spec, shares = wired(model)
    assignment = Overlapping()(spec.sizes, 3, seed=0, round=0)
    for i in range(3):
        subnet = build_subnet(model, spec, assignment, i)
        folded = copy.deepcopy(subnet)
        fold_depth(folded, spec, shares)
        x = normal(2, 3, 8, 8)
        with scaled_blocks(subnet, spec, shares):
            assert sum(bool(module._forward_hooks) for module in subnet.modules()) == 1
            assert torch.allclose(subnet(x), folded(x), rtol=1e-12, atol=1e-12)


def test_hooks_are_gone_when_an_error_leaves_the_context():
    model = ours("basic")
    spec, shares = wired(model)
    with pytest.raises(ZeroDivisionError), scaled_blocks(model, spec, shares):
        raise ZeroDivisionError
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("share", [None, 0.0, -0.5, 1.5, float("nan")])
def test_wrong_shares_are_refused(share):
    model = ours("basic")
    spec, _ = wired(model)
    shares = {} if share is None else {"stages.1": share}
    with (
        pytest.raises(PartitionError, match=r"'stages\.1' need a share .*expected: a number in"),
        scaled_blocks(model, spec, shares),
    ):
        pass


def test_blocks_without_a_branch_are_refused():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    builder = SpecBuilder(model)
    builder.block("1", "h", 0, size=1)
    builder.whole()
    spec = builder.build()
    for scale in (fold_depth, lambda *given: scaled_blocks(*given).__enter__()):
        with pytest.raises(PartitionError, match=r"1 has no residual branch.*Linear.*Residual"):
            scale(model, spec, {"h": 0.5})


def test_a_branch_that_does_not_scale_with_its_weight_is_not_folded():
    model = perturbed(timms(True, conv_layer=timm.layers.StdConv2d))
    spec, shares = wired(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PartitionError, match=r"1\.blocks\.1 cannot be scaled .*StdConv2d"):
        fold_depth(model, spec, shares)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with scaled_blocks(model, spec, shares):
        assert not torch.allclose(model(normal(2, 3, 32, 32)), torch.zeros(()).double())
