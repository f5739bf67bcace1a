"""Units of image networks: which blocks, which filters, and what is said where there are none."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gist import partition_spec
from gist.errors import PartitionError
from gist.nn import MLP, PreActResNet, preact_resnet101
from gist.nn.resnet import PreActBlock
from gist.partition.grouped.grouping import NotGroupableError
from gist.partition.residual_wiring import wire_blocks, wire_filters
from gist.partition.samplers import DisjointUniform, Overlapping
from gist.partition.subnet import build_subnet
from gist.verify import verify_grouping, verify_identity
from tests.subnets import normal, perturbed, without_absent_blocks


def small(num_blocks=(2, 4, 2), **settings) -> PreActResNet:
    widths = (4, 6, 8)[: len(num_blocks)]
    return PreActResNet(num_blocks, widths, **{"block": "basic", **settings})


def test_section_3_of_the_papers_network():
    with torch.device("meta"):
        spec = partition_spec(preact_resnet101(), wire_blocks)
    assert spec.sizes == {"stages.2": 22}
    assert spec.blocks == {f"stages.2.{i}": ("stages.2", i - 1) for i in range(1, 23)}
    for name, layout in spec.layouts.items():
        path = ".".join(name.split(".")[:3])
        assert layout.owner == spec.blocks.get(path), name
        assert not layout.slots
    assert not spec.ports


@pytest.mark.parametrize(
    ("num_blocks", "stage"),
    [((2, 4, 2), "stages.1"), ((3, 3, 3), "stages.2"), ((1, 3, 3), "stages.2"), ((5, 5, 2), 1)],
)
def test_the_stage_with_most_blocks_and_of_equals_the_last(num_blocks, stage):
    stage = "stages.1" if stage == 1 else stage
    depth = num_blocks[int(stage[-1])]
    assert partition_spec(small(num_blocks), wire_blocks).sizes == {stage: depth - 1}


def test_stages_by_name():
    wiring = partial(wire_blocks, stages=("stages.2", "stages.0"))
    spec = partition_spec(small(), wiring)
    assert spec.sizes == {"stages.2": 1, "stages.0": 1}
    assert set(spec.blocks) == {"stages.0.1", "stages.2.1"}
    assert partition_spec(small(), partial(wire_blocks, stages="stages.0")).sizes == {"stages.0": 1}


def test_a_stage_is_meant_by_a_module_that_holds_it_alone():
    model = nn.ModuleDict(
        {"a": nn.ModuleDict({"blocks": nn.Sequential(PreActBlock(4, 4), PreActBlock(4, 4))})}
    )
    assert partition_spec(model, partial(wire_blocks, stages=["a"])).sizes == {"a.blocks": 1}
    with pytest.raises(PartitionError, match=r"no stage of residual blocks 'stages'"):
        partition_spec(small(), partial(wire_blocks, stages=["stages"]))


def test_blocks_that_change_the_shape_are_held_by_all():
    blocks = [(4, 4, 1), (4, 4, 1), (4, 6, 1), (6, 6, 2), (6, 6, 1)]
    model = nn.Sequential(*(PreActBlock(*sizes) for sizes in blocks))
    spec = partition_spec(model, wire_blocks)
    assert spec.sizes == {"blocks": 2}
    assert spec.blocks == {"1": ("blocks", 0), "4": ("blocks", 1)}


@settings(max_examples=6)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(1, 3), st.integers(0, 9))
def test_a_subnet_is_the_network_with_absent_blocks_replaced_by_the_identity(blocks, m, seed):
    if max(blocks) < 2:
        blocks[0] = 2
    model = perturbed(small(tuple(blocks), block="bottleneck" if seed % 2 else "basic"))
    stages = tuple(f"stages.{i}" for i, depth in enumerate(blocks) if depth > 1)
    spec = partition_spec(model, partial(wire_blocks, stages=stages))
    samplers = [Overlapping(min_units=1 + seed % 3)]
    samplers += [DisjointUniform()] if m <= min(spec.sizes.values()) else []
    x = normal(3, 3, 8, 8, seed=seed)
    for sampler in samplers:
        assignment = sampler(spec.sizes, m, seed=seed, round=0)
        verify_identity(model, spec, assignment)
        for training in (False, True):
            for i in range(m):
                subnet = build_subnet(model, spec, assignment, i).train(training)
                shallow = without_absent_blocks(model, spec, assignment, i).train(training)
                assert torch.equal(subnet(x), shallow(x))
                expected = dict(shallow.named_buffers())
                assert dict(subnet.named_buffers()).keys() == expected.keys()
                for name, buffer in subnet.named_buffers():
                    assert torch.equal(buffer, expected[name]), name


@pytest.mark.parametrize(
    ("model", "stages", "why"),
    [
        (small((1, 1)), None, r"could do without.*'stages.0': '0 such blocks'.*: take a deeper"),
        (small(), ("stages.3",), r"no stage .*'stages.3'; expected: one of \['stages.0', 'st"),
        (small((2, 1)), ("stages.0", "stages.1"), r"could do without in stages.1"),
        (small(), (), "could do without"),
        (MLP(4, 8, 2), None, r"MLP has no residual .*ISTTrainer deals.*gist\.ResidualRule"),
        (
            nn.Sequential(nn.Linear(3, 2)),
            None,
            "without; expected.*gist.ISTTrainer deals its neu.*$",
        ),
        (nn.Sequential(nn.Conv2d(2, 6, 3)), None, "gist.LoFTTrainer deals its filters$"),
        (MLP(4, 8, 2), ("linears",), r"no stage of residual blocks 'linears'.*ResidualRule"),
    ],
    ids=[
        "shallow",
        "unknown",
        "one shallow",
        "none",
        "no blocks",
        "an MLP",
        "a CNN",
        "none of that name",
    ],
)
def test_networks_without_such_blocks_are_refused(model, stages, why):
    with pytest.raises(PartitionError, match=why):
        partition_spec(model, partial(wire_blocks, stages=stages))


def test_filters_of_every_block_and_nothing_else():
    spec = partition_spec(small(), wire_filters)
    blocks = [f"stages.{s}.{i}" for s, n in enumerate((2, 4, 2)) for i in range(n)]
    assert list(spec.sizes) == [f"{path}.conv1" for path in blocks]
    outside = [name for name in spec.layouts if not name.startswith("stages.")]
    assert {"stem.weight", "head.weight", "norm.bias"} <= {*outside}
    assert all(spec.layouts[name].is_shared for name in outside)


def test_filters_of_a_chain_are_those_of_all_its_convolutions():
    features = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 5, 3), nn.ReLU())
    head = nn.Sequential(nn.Flatten(), nn.Linear(80, 9), nn.ReLU(), nn.Linear(9, 3))
    spec = partition_spec(nn.Sequential(features, head), wire_filters)
    assert spec.sizes == {"0.0": 6, "0.2": 5}
    assert [(s.dim, s.map.width) for s in spec.layouts["1.1.weight"].slots] == [(1, 16)]
    assert spec.layouts["1.1.bias"].is_shared
    assert spec.layouts["1.3.weight"].is_shared


def test_the_last_layer_of_a_chain_stays_whole_where_it_is_a_convolution():
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 3, 1), nn.Flatten())
    assert partition_spec(model, wire_filters).sizes == {"0": 6}


@pytest.mark.parametrize(
    "model", [MLP(4, 8, 2), nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))], ids=["MLP", "chain"]
)
def test_models_without_filters_are_refused(model):
    with pytest.raises(PartitionError, match=r"has no filters to partition.*gist.ISTTrainer deals"):
        partition_spec(model, wire_filters)


def test_a_network_of_ones_own_is_wired_by_names():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c1, self.b1 = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6)
            self.c2, self.fc = nn.Conv2d(6, 4, 3), nn.Linear(4, 3)

    message = (
        r"wiring of Net is not known;.*wiring=\[...\].*\['c1', 'b1', 'c2', 'fc'\].*ResidualRule"
    )
    with pytest.raises(PartitionError, match=message):
        partition_spec(Net(), wire_filters)
    assert partition_spec(Net(), ["c1", "b1", "c2", "fc"]).sizes == {"c1": 6, "c2": 4}
    with pytest.raises(PartitionError, match=r"gist.LoFTTrainer deals its filters; .*ResidualRule"):
        partition_spec(Net(), wire_blocks)


@pytest.mark.parametrize("wiring", [wire_blocks, wire_filters])
def test_subnets_of_image_networks_run_one_after_the_other(wiring):
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(NotGroupableError):
        verify_grouping(small(), lambda model: ((x,), {}), wiring=wiring)


def test_a_wiring_may_be_any_function():
    def wire(model: nn.Module, builder) -> None:
        builder.layer("1", builder.layer("0", None, produces="h"))

    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    assert partition_spec(model, wire).sizes == {"h": 4}
