"""Specs: every finding is collected and raised once, and what was validated stays that way."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from gist.errors import PartitionError
from gist.partition.index_map import IndexMap
from gist.partition.spec import (
    Axis,
    ParamLayout,
    PartitionSpec,
    Port,
    Slot,
    UnitGroup,
    model_tensors,
)


def groups(**sizes: int) -> dict[str, UnitGroup]:
    return {name: UnitGroup(name=name, size=size) for name, size in sizes.items()}


def spec(layouts: list[ParamLayout], sizes: dict[str, int] | None = None, **more) -> PartitionSpec:
    return PartitionSpec(
        groups=groups(**({"h": 4} if sizes is None else sizes)),
        layouts={layout.name: layout for layout in layouts},
        **more,
    )


ROWS = (Slot(dim=0, group="h"),)


def layout(name="w", shape=(4, 3), slots=ROWS, **more) -> ParamLayout:
    return ParamLayout(name=name, shape=shape, slots=slots, **more)


LINEAR = [layout("weight"), layout("bias", (4,))]


def test_a_fitting_spec_is_accepted():
    fine = spec(LINEAR)
    fine.check(nn.Linear(3, 4))
    assert fine.sizes == {"h": 4}
    assert fine.layouts["weight"].groups == {"h"}
    assert not fine.layouts["weight"].is_shared


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (layout(slots=(Slot(dim=0, group="nobody"),)), r"group 'nobody' is not declared"),
        (layout(slots=(Slot(dim=2, group="h"),)), r"dim 2 does not exist"),
        (layout(slots=(Slot(dim=-1, group="h"),)), r"dim -1 does not exist"),
        (layout(shape=(3, 3)), r"dim 0 has 3 positions.*reach position 3"),
        (layout(slots=(Slot(dim=0, group="h", map=IndexMap().shift(1)),)), r"reach position 4"),
        (
            layout(
                shape=(7, 3),
                slots=(Slot(dim=0, group="h"), Slot(dim=0, group="h", map=IndexMap().shift(3))),
            ),
            r"position 3 of dim 0 is claimed more than once",
        ),
        (
            layout(shape=(5, 3), slots=(Slot(dim=0, group="h", map=IndexMap.copies((0, 1))),)),
            r"position 1 of dim 0 is claimed more than once",
        ),
        (layout(owner=("h", 0)), r"belongs to one unit as a whole and has slots"),
        (layout(slots=(), owner=("h", 4)), r"owner unit 4 is not in 'h' of 4"),
        (layout(slots=(), owner=("h", -1)), r"owner unit -1 is not in 'h'"),
        (layout(slots=(), owner=("nobody", 0)), r"owner group 'nobody' is not declared"),
    ],
)
def test_each_finding(bad, message):
    with pytest.raises(PartitionError, match=message):
        spec([bad, *LINEAR])


def test_all_findings_come_in_one_error():
    bad = [
        layout("first", slots=(Slot(dim=5, group="h"),)),
        layout("second", slots=(Slot(dim=0, group="nobody"), Slot(dim=1, group="nobody too"))),
        layout("third", slots=(), owner=("h", 99)),
    ]
    with pytest.raises(PartitionError) as caught:
        spec(bad, {"h": 4, "idle": 2})
    text = str(caught.value)
    for part in ("first", "second", "'nobody'", "'nobody too'", "third", "99", "'idle'"):
        assert part in text, text
    assert text.count("\n  - ") == 5


def test_misfiled_entries_are_refused():
    with pytest.raises(PartitionError, match="filed as"):
        PartitionSpec(groups={"other": UnitGroup(name="h", size=4)}, layouts={"weight": LINEAR[0]})
    with pytest.raises(PartitionError, match="filed as"):
        PartitionSpec(groups=groups(h=4), layouts={"other": LINEAR[0]})


def test_a_group_that_indexes_nothing_is_refused():
    with pytest.raises(PartitionError, match="'idle' indexes no parameter"):
        spec(LINEAR, {"h": 4, "idle": 3})


@pytest.mark.parametrize("size", [0, -1])
def test_empty_groups_are_refused(size):
    with pytest.raises(PartitionError, match="at least one unit"):
        UnitGroup(name="h", size=size)


def test_a_block_of_an_undeclared_group_or_unit_is_refused():
    owned = [layout("b.weight", slots=(), owner=("h", 0))]
    with pytest.raises(PartitionError, match="nobody"):
        spec(owned, blocks={"b": ("nobody", 0)})
    with pytest.raises(PartitionError, match="7"):
        spec(owned, blocks={"b": ("h", 7)})


def test_a_port_of_an_undeclared_group_is_refused():
    axis = Axis(size=4, parts=(("nobody", IndexMap()),))
    with pytest.raises(PartitionError, match="nobody"):
        spec(LINEAR, ports={"lin": Port(path="lin", input=axis, output=None)})


def test_check_names_everything_at_once():
    model = nn.Module()
    model.missing = nn.Linear(3, 4)
    model.wrong = nn.Linear(3, 5, bias=False)
    model.lazy = nn.LazyLinear(4, bias=False)
    model.register_buffer("stray", torch.zeros(2))
    declared = spec([layout("wrong.weight"), layout("lazy.weight"), layout("ghost")])
    with pytest.raises(PartitionError) as caught:
        declared.check(model)
    lines = str(caught.value).splitlines()[1:]
    assert len(lines) == 6, lines
    for name, why in [
        ("missing.weight", "no layout"),
        ("missing.bias", "no layout"),
        ("stray", "no layout"),
        ("wrong.weight", "shape (5, 3), declared (4, 3)"),
        ("lazy.weight", "lazy"),
        ("ghost", "not in the model"),
    ]:
        assert sum(name in line and why in line for line in lines) == 1, lines


def test_str_is_a_table():
    text = str(
        spec(
            [
                layout("weight", (8, 3), (Slot(dim=0, group="h", map=IndexMap.block(2)),)),
                layout("bias", (4,)),
                layout("eps", (), ()),
                layout("block.weight", (2, 2), (), owner=("h", 3)),
            ]
        )
    )
    rows = text.splitlines()
    weight, bias, eps, block = (
        next(r for r in rows if r.startswith(n)) for n in ("weight", "bias", "eps", "block.weight")
    )
    assert "8x3" in weight
    assert "dim 0: h" in weight
    assert "shared" in eps
    assert "unit 3 of h" in block
    assert weight.index("dim 0") == bias.index("dim 0") == eps.index("shared"), "columns line up"
    assert any(r.split() == ["h", "4"] for r in rows)


@pytest.mark.parametrize(
    ("frozen", "attribute"),
    [
        (spec(LINEAR), "groups"),
        (LINEAR[0], "shape"),
        (Slot(dim=0, group="h"), "dim"),
        (UnitGroup(name="h", size=1), "size"),
        (Axis(size=1, parts=()), "size"),
        (Port(path="", input=None, output=None), "path"),
    ],
)
def test_everything_is_frozen_and_keyword_only(frozen, attribute):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(frozen, attribute, None)
    with pytest.raises(TypeError):
        type(frozen)("positional")


def test_tensors_of_a_model_are_listed_once():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    model[2].weight = model[0].weight
    names = list(model_tensors(model))
    assert "0.weight" in names
    assert "2.weight" not in names
    assert "1.running_mean" in names
