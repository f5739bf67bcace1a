"""Models that are chains of layers are wired as they are; nothing else is guessed."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gist import partition_spec
from gist.errors import PartitionError
from gist.nn.resnet import PreActBlock
from gist.partition.builder import SpecBuilder
from gist.partition.chain import chain_of, wire_chain
from gist.verify import verify_wiring
from tests.subnets import largest_difference, normal


class Named(nn.Sequential):
    """Leaves the forward pass of Sequential alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.last = nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)


class Backwards(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        for module in reversed(self):
            input = module(input)
        return input


def images() -> nn.Sequential:
    features = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)
    )
    more = nn.Sequential(nn.Conv2d(6, 5, 3, bias=False), nn.Dropout2d(0.3), nn.AvgPool2d(2))
    head = nn.Sequential(nn.Flatten(), nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))
    return nn.Sequential(OrderedDict(features=nn.Sequential(features, more), head=head))


def test_nested_chains_are_taken_apart_in_order():
    assert chain_of(images()) == [
        *(f"features.0.{i}" for i in range(4)),
        *(f"features.1.{i}" for i in range(3)),
        *(f"head.{i}" for i in range(4)),
    ]
    assert chain_of(nn.Sequential(Named(), nn.Tanh())) == ["0.first", "0.act", "0.last", "1"]


@given(st.recursive(st.just(None), lambda inner: st.lists(inner, max_size=3), max_leaves=8))
def test_a_chain_runs_as_its_layers_do_one_after_the_other(shape):
    def build(shape) -> nn.Module:
        if shape is None:
            return nn.PReLU(init=float(torch.rand(())) + 0.5)
        return nn.Sequential(*map(build, shape))

    torch.manual_seed(0)
    model = build([shape])
    x = h = torch.randn(4, 3)
    for path in chain_of(model):
        h = model.get_submodule(path)(h)
    assert torch.equal(model(x), h)


def test_a_chain_needs_no_wiring():
    model = images()
    assert partition_spec(model) == partition_spec(model, chain_of(model))
    assert partition_spec(model).sizes == {"features.0.0": 6, "features.1.0": 5, "head.1": 7}
    assert largest_difference(model, normal(4, 2, 8, 8)) < 1e-12
    assert verify_wiring(images(), (torch.randn(4, 2, 8, 8),)) < 1e-5


def test_layers_are_partitioned_however_wide_the_output_is():
    wide = nn.Sequential(nn.Sequential(nn.Linear(5, 4), nn.ReLU()), nn.Linear(4, 50))
    assert partition_spec(wide).sizes == {"0.0": 4}


def test_an_embedding_starts_a_group():
    model = nn.Sequential(nn.Embedding(9, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    assert partition_spec(model).sizes == {"0": 6}


def test_a_subclass_that_leaves_the_forward_pass_alone_is_a_chain():
    assert partition_spec(Named()).sizes == {"first": 7}
    assert largest_difference(Named(), normal(6, 5)) < 1e-12


def test_one_with_a_forward_pass_of_its_own_is_not():
    model = Backwards(nn.Linear(5, 3), nn.Linear(3, 5))
    assert chain_of(model) is None
    with pytest.raises(PartitionError, match="wiring of Backwards is not known"):
        partition_spec(model)
    with pytest.raises(PartitionError, match=r"1: no partition rule for layer type .*Backwards"):
        partition_spec(nn.Sequential(nn.Linear(5, 5), model))


@pytest.mark.parametrize("model", [nn.Linear(5, 3), nn.Sequential(), nn.ReLU()], ids=str)
def test_single_layers_and_empty_chains_are_not_known(model):
    with pytest.raises(PartitionError, match=r"is not known.*wire_filters.*wire_blocks"):
        partition_spec(model)


def test_one_module_at_several_places():
    act = nn.PReLU()
    model = nn.Sequential(nn.Linear(5, 7), act, nn.Linear(7, 6), act, nn.Linear(6, 3))
    assert chain_of(model) == ["0", "1", "2", "3", "4"]
    assert largest_difference(model, normal(6, 5)) < 1e-12
    nested = nn.Sequential(model, nn.Tanh())
    assert largest_difference(nested, normal(6, 5)) < 1e-12
    linear = nn.Linear(5, 5)
    with pytest.raises(PartitionError, match="tied"):
        partition_spec(nn.Sequential(linear, nn.ReLU(), linear, nn.Linear(5, 3)))


def test_a_layer_without_rule_is_named():
    with pytest.raises(PartitionError, match=r"1\.0: no partition rule for layer type .*Softmax"):
        partition_spec(nn.Sequential(nn.Conv2d(2, 4, 1), nn.Sequential(nn.Softmax(1))))


def test_residual_blocks_in_a_chain_ask_for_another_wiring():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), PreActBlock(4, 4), nn.Conv2d(4, 2, 1))
    with pytest.raises(PartitionError, match=r"1: adds its input.*wire_filters.*wire_blocks"):
        partition_spec(model)


def test_only_outputs_of_given_types_become_groups():
    model = images()
    builder = SpecBuilder(model)
    wire_chain(builder, [(path, None) for path in chain_of(model)], types=(nn.Linear,))
    assert builder.build().sizes == {"head.1": 7}
