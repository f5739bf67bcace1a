"""Modules that are held whole, or belong to one unit as a whole."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gist.errors import PartitionError
from gist.partition.builder import SpecBuilder


def net() -> nn.Module:
    model = nn.Module()
    model.first, model.norm, model.last = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
    model.odd = nn.GRU(2, 2)  # has no rule
    model.register_buffer("scale", torch.ones(2))
    return model


def test_whole_declares_what_is_not_declared_yet():
    builder = SpecBuilder(net())
    builder.layer("last", builder.layer("first", None, produces="h"))
    builder.whole()
    spec = builder.build()
    assert not spec.layouts["first.weight"].is_shared
    assert not spec.layouts["last.weight"].is_shared
    others = [name for name in spec.layouts if not name.startswith(("first", "last.weight"))]
    assert {"norm.weight", "norm.num_batches_tracked", "odd.weight_hh_l0", "scale"} <= {*others}
    assert all(spec.layouts[name].is_shared for name in others)


def test_whole_declares_the_named_module_alone():
    builder = SpecBuilder(net())
    builder.whole("norm")
    builder.whole("odd")
    builder.layer("last", builder.layer("first", None, produces="h"))
    with pytest.raises(PartitionError) as caught:
        builder.build()
    text = str(caught.value)
    assert "scale: no layer of the wiring declares it" in text
    assert "norm" not in text
    assert "odd" not in text


def test_lazy_tensors_of_whole_modules_are_named():
    model = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.LazyLinear(2)})
    builder = SpecBuilder(model)
    builder.whole()
    with pytest.raises(PartitionError, match=r"b\.weight: is lazy"):
        builder.build()


def test_modules_that_are_not_there_are_named():
    builder = SpecBuilder(net())
    builder.whole("nowhere")
    builder.block("neither", "blocks", 0, size=1)
    builder.whole()
    with pytest.raises(PartitionError) as caught:
        builder.build()
    assert "nowhere: no such module" in str(caught.value)
    assert "neither: no such module" in str(caught.value)


def test_a_block_tied_to_what_is_not_in_it_is_refused():
    model = nn.ModuleDict({name: nn.Linear(3, 3) for name in "abc"})
    model["b"].weight = model["a"].weight
    for block, outside in [("a", r"b\.weight"), ("b", r"a\.weight")]:
        builder = SpecBuilder(model)
        builder.block(block, "blocks", 0, size=1)
        builder.whole()
        with pytest.raises(PartitionError, match=f"{block}: .* tied to {outside}"):
            builder.build()


def test_ties_within_a_block_stay_in_it():
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))})
    model["a"][1].weight = model["a"][0].weight
    builder = SpecBuilder(model)
    builder.block("a", "blocks", 0, size=1)
    assert {layout.owner for layout in builder.build().layouts.values()} == {("blocks", 0)}
