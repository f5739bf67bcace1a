"""Extract and merge over arbitrary specs, against a loop over single entries."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

from gist.errors import PartitionError
from gist.partition.assignment import Assignment
from gist.partition.index_map import IndexMap
from gist.partition.samplers import Bernoulli, Categorical, DisjointUniform, Overlapping
from gist.partition.spec import ParamLayout, PartitionSpec, Slot, UnitGroup
from gist.partition.transfer import Merge, Selection, extract, gather, merge, scatter_

SAMPLERS = [
    DisjointUniform(),
    Overlapping(min_units=3),
    Bernoulli(keep=0.4),
    Categorical(),
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.int32, torch.bool]


@st.composite
def dims(draw: st.DrawFn, sizes: dict[str, int], dim: int) -> tuple[int, tuple[Slot, ...]]:
    """Length and slots of one dim: parts of groups in blocks and copies, and positions of none."""
    slots, length = [], draw(st.integers(0, 2))
    for _ in range(draw(st.integers(0, 2))):
        group = draw(st.sampled_from(sorted(sizes)))
        width, times = draw(st.integers(1, 2)), draw(st.integers(1, 2))
        one = sizes[group] * width
        offsets = tuple(length + k * one for k in range(times))
        slots.append(Slot(dim=dim, group=group, map=IndexMap(width=width, offsets=offsets)))
        length += times * one + draw(st.integers(0, 1))
    return max(length, 1), tuple(slots)


@st.composite
def specs(draw: st.DrawFn) -> PartitionSpec:
    """Any spec: several slots per dim, up to four dims, whole-unit tensors, shared tensors."""
    sizes = draw(st.dictionaries(st.sampled_from("abc"), st.integers(1, 5), min_size=1, max_size=3))
    layouts = {}
    for i in range(draw(st.integers(1, 3))):
        shape, slots = [], []
        for dim in range(draw(st.integers(0, 3))):
            length, along = draw(dims(sizes, dim))
            shape.append(length)
            slots += along
        name = f"w{i}"
        layouts[name] = ParamLayout(name=name, shape=tuple(shape), slots=tuple(slots))
    for group, size in sizes.items():
        name = f"anchor.{group}"  # every group indexes something
        layouts[name] = ParamLayout(name=name, shape=(size,), slots=(Slot(dim=0, group=group),))
        if draw(st.booleans()):
            unit = draw(st.integers(0, size - 1))
            name = f"owned.{group}"
            layouts[name] = ParamLayout(name=name, shape=(2, 2), owner=(group, unit))
    groups = {name: UnitGroup(name=name, size=size) for name, size in sizes.items()}
    return PartitionSpec(groups=groups, layouts=layouts)


@st.composite
def cases(draw: st.DrawFn) -> tuple[PartitionSpec, Assignment, dict[str, Tensor]]:
    spec = draw(specs())
    m = draw(st.integers(1, min(spec.sizes.values())))
    sampler = draw(st.sampled_from(SAMPLERS))
    assignment = sampler(spec.sizes, m, seed=draw(st.integers(0, 999)), round=0)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    tensors = {}
    for name, layout in spec.layouts.items():
        dtype = draw(st.sampled_from(DTYPES))
        values = torch.randn(layout.shape, generator=generator, dtype=torch.float64)
        tensors[name] = (values * 100).to(dtype) if dtype != torch.bool else values > 0
    return spec, assignment, tensors


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def holders(
    layout: ParamLayout, spec: PartitionSpec, dealt: Assignment
) -> dict[tuple[int, ...], list[int]]:
    """The subnets that hold each entry of a tensor, in order, by the definition of a slot."""
    everyone = set(range(dealt.num_subnets))
    units = {g: [set(u.tolist()) for u in deal] for g, deal in dealt.held.items()}

    def having(group: str, unit: int) -> set[int]:
        return {i for i in everyone if unit in units[group][i]}

    along = [[everyone] * length for length in layout.shape]
    for slot in layout.slots:
        for unit in range(spec.sizes[slot.group]):
            for offset in slot.map.offsets:
                for k in range(slot.map.width):
                    along[slot.dim][offset + unit * slot.map.width + k] = having(slot.group, unit)
    base = everyone if layout.owner is None else having(*layout.owner)
    return {
        e: sorted(base.intersection(*map(list.__getitem__, along, e)))
        for e in entries(layout.shape)
    }


def entries(shape: Sequence[int]) -> list[tuple[int, ...]]:
    return list(itertools.product(*map(range, shape)))


@given(cases())
def test_extract_then_merge_is_the_identity_bit_for_bit(case):
    spec, assignment, tensors = case
    parts = [extract(tensors, spec, assignment, i) for i in range(assignment.num_subnets)]
    merged = copies(tensors)
    merge(merged, spec, assignment, parts)
    for name in tensors:
        assert bits(merged[name]) == bits(tensors[name]), name


@given(cases())
def test_extract_takes_the_held_entries_in_order(case):
    spec, assignment, tensors = case
    for subnet in range(assignment.num_subnets):
        parts = extract(tensors, spec, assignment, subnet)
        for name, layout in spec.layouts.items():
            mine = [e for e, who in holders(layout, spec, assignment).items() if subnet in who]
            if name not in parts:
                assert layout.owner is not None
                assert not mine
                continue
            assert parts[name].dtype == tensors[name].dtype
            assert parts[name].reshape(-1).tolist() == [tensors[name][e].item() for e in mine]
            assert Selection(spec, assignment, subnet).numel(layout) == len(mine)


@given(cases(), st.integers(0, 999))
def test_merge_copies_averages_or_leaves_each_entry(case, seed):
    spec, assignment, tensors = case
    tensors = {n: t.double() for n, t in tensors.items()}
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for i in range(assignment.num_subnets):
        part = extract(tensors, spec, assignment, i)
        parts.append(
            {n: torch.randn(t.shape, generator=generator, dtype=t.dtype) for n, t in part.items()}
        )
    merged = copies(tensors)
    merge(merged, spec, assignment, parts)

    for name, layout in spec.layouts.items():
        values: dict[tuple[int, ...], list[float]] = {}
        held = holders(layout, spec, assignment)
        for i, part in enumerate(parts):
            mine = [e for e, who in held.items() if i in who]
            for e, value in zip(mine, part[name].reshape(-1).tolist() if mine else [], strict=True):
                values.setdefault(e, []).append(value)
        for e in entries(layout.shape):
            got, trained = merged[name][e].item(), values.get(e, [])
            if not trained:
                assert got == tensors[name][e].item(), (name, e, "idle entries do not change")
            elif len(trained) == 1:
                assert got == trained[0], (name, e, "one holder's entry is copied")
            else:
                expected = sum(trained) / len(trained)
                assert got == pytest.approx(expected, rel=1e-12, abs=1e-12), (name, e)


@given(cases())
def test_extracted_tensors_share_no_storage(case):
    spec, assignment, tensors = case
    for subnet in range(assignment.num_subnets):
        before = copies(tensors)
        for part in extract(tensors, spec, assignment, subnet).values():
            if part.dtype == torch.bool:
                part.logical_not_()
            else:
                part.add_(1)
        assert all(torch.equal(tensors[n], before[n]) for n in tensors)


@given(cases())
def test_merging_only_some_tensors_is_possible(case):
    spec, assignment, tensors = case
    some = dict(list(tensors.items())[:1])
    parts = [extract(some, spec, assignment, i) for i in range(assignment.num_subnets)]
    assert all(part.keys() <= some.keys() for part in parts)
    merged = copies(some)
    merge(merged, spec, assignment, parts)
    assert all(torch.equal(merged[n], some[n]) for n in some)


def shared(tensor: Tensor, m: int) -> tuple[PartitionSpec, Assignment]:
    """A spec with ``tensor`` held by all, and one group so that there are m subnets."""
    layouts = [
        ParamLayout(name="t", shape=tuple(tensor.shape)),
        ParamLayout(name="h", shape=(m,), slots=(Slot(dim=0, group="g"),)),
    ]
    spec = PartitionSpec(
        groups={"g": UnitGroup(name="g", size=m)}, layouts={x.name: x for x in layouts}
    )
    return spec, DisjointUniform()({"g": m}, m, seed=0, round=0)


def identity(tensor: Tensor, m: int) -> Tensor:
    spec, assignment = shared(tensor, m)
    merged = {"t": tensor.clone(), "h": torch.zeros(m)}
    merge(merged, spec, assignment, [extract(merged, spec, assignment, i) for i in range(m)])
    return merged["t"]


INF = float("inf")


@pytest.mark.parametrize("m", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor([1.0, -0.0, 0.0, 3e38, 1e-45]),
        torch.tensor([0.1, 1 / 3, 1e30, -7e-9], dtype=torch.float64),
        torch.tensor([0.1, 65504.0, -65504.0], dtype=torch.float16),
        torch.tensor([INF, -INF, 1.0]),
        torch.tensor([2**53 + 1, -(2**62) - 1, 7]),
        torch.tensor([True, False]),
        torch.tensor([250, 1], dtype=torch.uint8),
        torch.tensor([1 + 2j, -3j], dtype=torch.complex64),
        torch.tensor(5),
    ],
    ids=["float32", "float64", "float16", "inf", "int64", "bool", "uint8", "complex", "scalar"],
)
def test_equal_copies_average_to_themselves_bit_for_bit(tensor, m):
    assert bits(identity(tensor, m)) == bits(tensor)


def test_nan_stays_nan_and_spreads_nowhere():
    tensor = torch.tensor([float("nan"), 1.0])
    assert torch.equal(identity(tensor, 3).isnan(), tensor.isnan())


def test_a_shared_tensor_is_averaged_once_not_added():
    spec, assignment = shared(torch.zeros(2), 3)
    merged = {"t": torch.full((2,), 100.0), "h": torch.zeros(3)}
    parts = [{"t": torch.tensor([i, 10.0 * i]), "h": torch.tensor([float(i)])} for i in range(3)]
    merge(merged, spec, assignment, parts)
    assert merged["t"].tolist() == [1.0, 10.0]
    assert sorted(merged["h"].tolist()) == [0.0, 1.0, 2.0]


def test_integer_counters_stay_integers():
    spec, assignment = shared(torch.tensor(0), 2)
    merged = {"t": torch.tensor(0), "h": torch.zeros(2)}
    merge(merged, spec, assignment, [{"t": torch.tensor(20), "h": torch.zeros(1)}] * 2)
    assert merged["t"].dtype == torch.int64
    assert merged["t"].item() == 20


def two_groups(slots: tuple[Slot, ...], shape: tuple[int, ...]) -> PartitionSpec:
    layouts = [
        ParamLayout(name="w", shape=shape, slots=slots),
        ParamLayout(name="a", shape=(4,), slots=(Slot(dim=0, group="a"),)),
        ParamLayout(name="b", shape=(2,), slots=(Slot(dim=0, group="b"),)),
    ]
    return PartitionSpec(
        groups={n: UnitGroup(name=n, size=s) for n, s in (("a", 4), ("b", 2))},
        layouts={x.name: x for x in layouts},
    )


def test_entries_of_no_group_are_averaged_beside_a_disjoint_group():
    """Position 4 of dim 0 is held by both subnets, though group ``a`` is disjoint."""
    spec = two_groups((Slot(dim=0, group="a"),), (5,))
    assignment = DisjointUniform()(spec.sizes, 2, seed=0, round=0)
    tensors = {"w": torch.zeros(5), "a": torch.zeros(4), "b": torch.zeros(2)}
    parts = [extract(tensors, spec, assignment, i) for i in range(2)]
    for i, part in enumerate(parts):
        part["w"].fill_(1.0 + 2.0 * i)
    merge(tensors, spec, assignment, parts)
    assert tensors["w"][4].item() == 2.0


def test_an_overlapping_group_is_averaged_beside_a_disjoint_one():
    """A concatenation of two groups on one dim, of which only one is disjoint."""
    slots = (Slot(dim=0, group="a"), Slot(dim=0, group="b", map=IndexMap().shift(4)))
    spec = two_groups(slots, (6,))
    held = {
        "a": (torch.tensor([0, 1]), torch.tensor([2, 3])),
        "b": (torch.tensor([0, 1]), torch.tensor([0, 1])),
    }
    assignment = Assignment(round=0, sizes=spec.sizes, held=held)
    tensors = {"w": torch.zeros(6), "a": torch.zeros(4), "b": torch.zeros(2)}
    parts = [extract(tensors, spec, assignment, i) for i in range(2)]
    for i, part in enumerate(parts):
        part["w"].fill_(1.0 + 2.0 * i)
    merge(tensors, spec, assignment, parts)
    assert tensors["w"].tolist() == [1.0, 1.0, 3.0, 3.0, 2.0, 2.0]


def test_a_unit_that_nobody_holds_keeps_its_tensors():
    layouts = [
        ParamLayout(name="w", shape=(3,), slots=(Slot(dim=0, group="g"),)),
        ParamLayout(name="block", shape=(2, 2), owner=("g", 1)),
    ]
    spec = PartitionSpec(
        groups={"g": UnitGroup(name="g", size=3)}, layouts={x.name: x for x in layouts}
    )
    held = {"g": (torch.tensor([0]), torch.tensor([2]))}
    assignment = Assignment(round=0, sizes={"g": 3}, held=held)
    tensors = {"w": torch.ones(3), "block": torch.ones(2, 2)}
    parts = [extract(tensors, spec, assignment, i) for i in range(2)]
    assert all("block" not in part for part in parts)
    for part in parts:
        part["w"].zero_()
    merge(tensors, spec, assignment, parts)
    assert tensors["w"].tolist() == [0.0, 1.0, 0.0]
    assert tensors["block"].tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_merge_does_not_depend_on_what_the_parts_require():
    spec, assignment = shared(torch.zeros(3), 2)
    model = {"t": nn.Parameter(torch.zeros(3)), "h": nn.Parameter(torch.zeros(2))}
    parts = [extract(model, spec, assignment, i) for i in range(2)]
    assert not any(t.requires_grad for part in parts for t in part.values())
    merge(model, spec, assignment, [{n: t.requires_grad_() for n, t in p.items()} for p in parts])
    assert model["t"].is_leaf
    assert model["t"].grad_fn is None


@pytest.mark.parametrize("count", [0, 1, 3])
def test_merge_wants_every_subnet_once(count):
    spec, assignment = shared(torch.zeros(3), 2)
    with pytest.raises(PartitionError, match="every subnet once"):
        merge({"t": torch.zeros(3)}, spec, assignment, [{"t": torch.zeros(3)}] * count)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
@example(shape=[3, 4, 2, 2], data=None)
def test_gather_and_scatter_are_inverse(shape, data):
    index = []
    for n in shape:
        if data is None:  # a convolution's weight, cut along both channel dims
            index.append(torch.arange(1, n) if n > 2 else None)
            continue
        kept = data.draw(st.none() | st.lists(st.integers(0, n - 1), unique=True, min_size=1))
        index.append(None if kept is None else torch.tensor(sorted(kept)))
    whole = torch.randn(shape)
    part = gather(whole, tuple(index))
    expected = whole
    for dim, positions in enumerate(index):
        expected = expected if positions is None else expected.index_select(dim, positions)
    assert torch.equal(part, expected)
    target = torch.zeros(shape)
    scatter_(target, tuple(index), part)
    assert torch.equal(gather(target, tuple(index)), part)
    assert int((target != 0).sum()) == int((part != 0).sum()), "nothing else is written"


def trained(part: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Other values of the same shapes and kinds."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor.logical_not()
        if tensor.dtype == torch.bool
        else tensor + (torch.randn(tensor.shape, generator=generator) * 9).to(tensor.dtype)
        for name, tensor in part.items()
    }


@given(cases(), st.integers(0, 99))
def test_subnets_may_be_cut_out_while_others_are_put_back(case, seed):
    """Each is cut out when its turn comes, and finds everything as the round began."""
    spec, assignment, tensors = case
    at_once, one_by_one = copies(tensors), copies(tensors)
    parts = [extract(tensors, spec, assignment, i) for i in range(assignment.num_subnets)]
    merge(at_once, spec, assignment, [trained(part, seed + i) for i, part in enumerate(parts)])

    merging = Merge(one_by_one, spec, assignment)
    for i, part in enumerate(parts):
        found = extract(one_by_one, spec, assignment, i)
        assert all(bits(found[name]) == bits(part[name]) for name in part)
        found = trained(found, seed + i)
        merging.add(found)
        for tensor in found.values():  # its memory is used for the next subnet
            tensor.zero_()
    merging.finish()
    assert all(bits(one_by_one[name]) == bits(at_once[name]) for name in tensors)


@given(cases())
def test_what_several_hold_is_written_at_the_end(case):
    spec, assignment, tensors = case
    merged = copies(tensors)
    merging = Merge(merged, spec, assignment)
    for i in range(assignment.num_subnets):
        merging.add(trained(extract(tensors, spec, assignment, i), i))
    for name, layout in spec.layouts.items():
        for entry, who in holders(layout, spec, assignment).items():
            if len(who) != 1:
                assert bits(merged[name][entry]) == bits(tensors[name][entry])


@given(cases())
def test_entries_are_gathered_into_a_given_place_and_nowhere_else(case):
    """As into the place of one subnet among several that are stacked."""
    spec, assignment, tensors = case
    for subnet in range(assignment.num_subnets):
        selection = Selection(spec, assignment, subnet)
        for name, layout in spec.layouts.items():
            if not selection.holds(layout):
                continue
            index = selection.index(layout)
            expected = gather(tensors[name], index)
            assert tuple(expected.shape) == selection.shape(layout)
            stacked = torch.ones((3, *expected.shape), dtype=expected.dtype)
            out = gather(tensors[name], index, out=stacked[1])
            assert out.data_ptr() == stacked[1].data_ptr()
            assert bits(stacked[1]) == bits(expected)
            assert stacked[0].eq(1).all()
            assert stacked[2].eq(1).all()


@pytest.mark.parametrize("index", [(None, None), (0, None), (None, 1), (0, 1)], ids=str)
def test_tensors_in_any_order_of_memory(index):
    """Where they come from, where they go to, and what is cut out of them."""
    rows, columns = torch.tensor([0, 3, 4]), torch.tensor([1, 2, 5])
    kept = tuple(None if i is None else (rows, columns)[i] for i in index)
    values = torch.randn(6, 7)
    expected = values
    for dim, positions in enumerate(kept):
        expected = expected if positions is None else expected.index_select(dim, positions)
    for whole in (values, values.t().contiguous().t(), torch.stack([values, values], 2)[:, :, 0]):
        assert torch.equal(gather(whole, kept), expected)
        for part in (expected, expected.t().contiguous().t()):
            out = torch.zeros_like(part)
            assert torch.equal(gather(whole, kept, out=out), expected)
            target = torch.zeros_like(whole)
            scatter_(target, kept, part)
            assert torch.equal(gather(target, kept), expected)
            assert target.count_nonzero() == expected.count_nonzero()
