"""Index maps and axes: pure geometry, without a single parameter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gist.errors import PartitionError
from gist.partition.index_map import IndexMap
from gist.partition.spec import Axis


@st.composite
def maps(draw: st.DrawFn) -> tuple[IndexMap, int]:
    """An index map whose copies lie apart, and how many units it maps."""
    units, width = draw(st.integers(1, 7)), draw(st.integers(1, 4))
    offset = draw(st.integers(0, 3))
    offsets = []
    for gap in draw(st.lists(st.integers(0, 3), min_size=1, max_size=3)):
        offsets.append(offset + gap)
        offset = offsets[-1] + units * width
    return IndexMap(width=width, offsets=tuple(offsets)), units


def naive_positions(index: IndexMap, unit: int) -> set[int]:
    return {offset + unit * index.width + k for offset in index.offsets for k in range(index.width)}


@given(maps())
def test_forward_follows_the_definition(case):
    index, units = case
    for unit in range(units):
        got = index.forward(torch.tensor([unit])).tolist()
        assert len(got) == index.positions_per_unit
        assert set(got) == naive_positions(index, unit)


@given(maps(), st.data())
def test_reverse_undoes_forward(case, data):
    index, units = case
    chosen = data.draw(st.lists(st.integers(0, units - 1), unique=True, min_size=1))
    positions = index.forward(torch.tensor(chosen))
    owners = index.reverse(positions, units).view(len(index.offsets), len(chosen), index.width)
    assert torch.equal(owners, torch.tensor(chosen).view(1, -1, 1).expand_as(owners))


@given(maps())
def test_forward_undoes_reverse_and_unclaimed_positions_have_no_owner(case):
    index, units = case
    length = index.offsets[-1] + units * index.width + 3
    owners = index.reverse(torch.arange(length), units).tolist()
    for position, owner in enumerate(owners):
        claiming = [u for u in range(units) if position in naive_positions(index, u)]
        assert claiming == ([] if owner == -1 else [owner])


@given(maps())
def test_every_unit_owns_positions_of_its_own(case):
    index, units = case
    positions = index.forward(torch.arange(units))
    assert positions.unique().numel() == positions.numel() == units * index.positions_per_unit


@given(maps(), st.integers(1, 4))
def test_widen_replaces_each_position_by_consecutive_ones(case, by):
    index, units = case
    wide = index.widen(by)
    for unit in range(units):
        expected = {p * by + k for p in naive_positions(index, unit) for k in range(by)}
        assert set(wide.forward(torch.tensor([unit])).tolist()) == expected


@given(maps(), st.integers(0, 9))
def test_shift_moves_every_position(case, by):
    index, units = case
    moved = index.shift(by)
    assert torch.equal(moved.forward(torch.arange(units)), index.forward(torch.arange(units)) + by)


@given(maps(), st.integers(1, 3), st.integers(0, 3))
def test_copy_at_repeats_the_units_at_every_start(case, times, gap):
    index, units = case
    length = index.offsets[-1] + units * index.width + gap
    copied = index.copy_at(range(0, times * length, length))
    for unit in range(units):
        expected = {p + t * length for p in naive_positions(index, unit) for t in range(times)}
        assert set(copied.forward(torch.tensor([unit])).tolist()) == expected


def test_named_constructors():
    assert IndexMap.block(3).forward(torch.tensor([0, 2])).tolist() == [0, 1, 2, 6, 7, 8]
    assert IndexMap.copies((0, 5)).forward(torch.tensor([1, 3])).tolist() == [1, 3, 6, 8]
    assert IndexMap().forward(torch.tensor([4])).tolist() == [4]
    assert str(IndexMap.block(3)) != str(IndexMap.copies((0, 5))) != str(IndexMap())


@pytest.mark.parametrize(
    "bad",
    [
        {"width": 0},
        {"width": -1},
        {"offsets": ()},
        {"offsets": (-1,)},
        {"offsets": (3, 3)},
        {"offsets": (5, 2)},
    ],
)
def test_bad_maps_are_refused(bad):
    with pytest.raises(PartitionError, match="index map"):
        IndexMap(**bad)


def test_bad_transformations_are_refused():
    with pytest.raises(PartitionError):
        IndexMap().shift(-1)
    with pytest.raises(PartitionError):
        IndexMap().widen(0)
    with pytest.raises(PartitionError):
        IndexMap().copy_at([0, 0])


def test_maps_are_frozen_and_hashable():
    index = IndexMap()
    with pytest.raises(AttributeError):
        index.width = 2  # type: ignore[misc]
    assert {IndexMap(width=2): 1}[IndexMap(width=2)] == 1


def whole(name: str, size: int) -> Axis:
    return Axis(size=size, parts=((name, IndexMap()),))


def owners(axis: Axis, sizes: dict[str, int]) -> list[tuple[str, int] | None]:
    """Who owns each position of an axis, position by position."""
    out: list[tuple[str, int] | None] = [None] * axis.size
    for group, index in axis.parts:
        for unit in range(sizes[group]):
            for position in naive_positions(index, unit):
                assert out[position] is None, "two units on one position"
                out[position] = (group, unit)
    return out


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_concat_lays_axes_one_after_the_other(widths):
    sizes = {f"g{i}": n for i, n in enumerate(widths)}
    axis = Axis.concat([whole(name, n) for name, n in sizes.items()])
    assert axis.size == sum(widths)
    assert owners(axis, sizes) == [(name, u) for name, n in sizes.items() for u in range(n)]
    assert axis.groups == frozenset(sizes)


@given(st.integers(1, 5), st.integers(1, 4))
def test_axis_widen_and_repeat(units, times):
    sizes = {"g": units}
    axis = whole("g", units)
    assert owners(axis.widen(times), sizes) == [
        ("g", u) for u in range(units) for _ in range(times)
    ]
    assert owners(axis.repeat(times), sizes) == [("g", u) for u in range(units)] * times


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_axis_operations_compose(a, b, times, by):
    sizes = {"a": a, "b": b}
    base = Axis.concat([whole("a", a), whole("b", b).widen(2)])
    plain = owners(base, sizes)
    assert owners(base.repeat(times), sizes) == plain * times
    assert owners(base.widen(by), sizes) == [owner for owner in plain for _ in range(by)]
    slots = base.slots(1)
    assert [(s.dim, s.group, s.map) for s in slots] == [(1, g, m) for g, m in base.parts]
