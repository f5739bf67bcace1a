"""Merge rules over arbitrary specs, against loops over single entries; and what is refused."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch_geometric.nn import GIN

from gist import partition_spec, wire_filters
from gist.errors import ConfigError, PartitionError
from gist.nn import GAT, GCN, MLP, VGG, GraphSAGE, preact_resnet20
from gist.partition.assignment import Assignment
from gist.partition.merging import CohortDelta, CountMean, DataMean, MergeRule, Mix
from gist.partition.parts import Part, check_part, output_layer
from gist.partition.spec import ParamLayout, PartitionSpec, Slot, UnitGroup, model_tensors
from gist.partition.transfer import RunningMean, Selection, extract, merge
from tests.partition.test_extract_merge import bits, cases, copies, entries, holders, specs, trained

RULES: list[MergeRule] = [
    CountMean(),
    DataMean(),
    Mix(alpha=0.3, staleness_power=0.5),
    Mix(alpha=1.0),
    CohortDelta(server_lr=0.7, staleness_power=0.5),
    *(CohortDelta(server_optimizer=name) for name in ("momentum", "adagrad", "yogi", "adam")),
]
each_rule = pytest.mark.parametrize("rule", RULES, ids=repr)

Entry = tuple[int, ...]
Values = list[tuple[Part, Any, Any]]
"""What parts hold of one entry, in order: the part, the value, and what was sent."""


def as_parameters(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies, floating-point ones as parameters."""
    return {
        name: nn.Parameter(t.clone()) if t.is_floating_point() else t.clone()
        for name, t in tensors.items()
    }


@st.composite
def merges(
    draw: st.DrawFn, dtypes: Sequence[torch.dtype]
) -> tuple[PartitionSpec, dict[str, Tensor], list[Part]]:
    """Parts of units of their own, that came back with some of their tensors."""
    spec = draw(specs())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    tensors = {}
    for name, layout in spec.layouts.items():
        values = torch.randn(layout.shape, generator=generator, dtype=torch.float64) * 9
        dtype = draw(st.sampled_from(dtypes))
        tensors[name] = values > 0 if dtype == torch.bool else values.to(dtype)
    parts = []
    for number in range(draw(st.integers(1, 4))):
        held = {}
        for group, size in spec.sizes.items():
            units = draw(st.sets(st.integers(0, size - 1), min_size=1))
            held[group] = (torch.tensor(sorted(units)),)
        assignment = Assignment(round=0, sizes=spec.sizes, held=held)
        start = extract(tensors, spec, assignment, 0)
        start = trained({n: t for n, t in start.items() if draw(st.integers(0, 4))}, number)
        parts.append(
            Part(
                assignment=assignment,
                tensors=trained(start, 100 + number),
                start=start,
                weight=draw(st.sampled_from([1, 5, 0.25])),
                staleness=draw(st.integers(0, 3)),
            )
        )
    return spec, as_parameters(tensors), parts


def by_entry(
    name: str, spec: PartitionSpec, parts: Sequence[Part], tensor: Tensor
) -> dict[Entry, Values]:
    found: dict[Entry, Values] = {e: [] for e in entries(tensor.shape)}
    for part in parts:
        if name not in part.tensors:
            continue
        assert part.start is not None
        mine = [e for e, who in holders(spec.layouts[name], spec, part.assignment).items() if who]
        now, before = (t[name].reshape(-1).tolist() for t in (part.tensors, part.start))
        for e, value, sent in zip(mine, now, before, strict=True):
            found[e].append((part, value, sent))
    return found


def in_steps(values: Values, shares: Sequence[float], whole: bool) -> float:
    """A mean as it is taken: each copy moves it by its share, in whole steps of whole numbers."""
    mean = values[0][1]
    for (_, value, _), share in zip(values[1:], shares[1:], strict=True):
        step = (value - mean) * share
        mean += round(step) if whole else step
    return mean


def count_mean(rule: Any, w: Any, values: Values, cohort: int, whole: bool) -> float:
    return in_steps(values, [1 / (n + 1) for n in range(len(values))], whole)


def data_mean(rule: Any, w: Any, values: Values, cohort: int, whole: bool) -> float:
    weights = [part.weight for part, _, _ in values]
    if not whole:
        return sum(n * v for n, (_, v, _) in zip(weights, values, strict=True)) / sum(weights)
    totals = itertools.accumulate(weights)
    return in_steps(values, [n / total for n, total in zip(weights, totals, strict=True)], whole)


def mix(rule: Any, w: Any, values: Values, cohort: int, whole: bool) -> float:
    for part, value, _ in values:
        step = (value - w) * rule.alpha * (1 + part.staleness) ** -rule.staleness_power
        w = w + (round(step) if whole else step)
    return w


def cohort_delta(rule: Any, w: Any, values: Values, cohort: int, whole: bool) -> float:
    if whole:
        return count_mean(rule, w, values, cohort, whole)
    change = 0.0
    for part, value, sent in values:
        change += (value - sent) / (1 + part.staleness) ** rule.staleness_power
    return w + rule.server_lr * change / cohort


ORACLES = {
    CountMean(): count_mean,
    DataMean(): data_mean,
    Mix(alpha=0.3): mix,
    Mix(alpha=0.6, staleness_power=0.5): mix,
    CohortDelta(): cohort_delta,
    CohortDelta(server_lr=0.5, staleness_power=0.5): cohort_delta,
}


@pytest.mark.parametrize("rule", ORACLES, ids=repr)
@given(case=merges([torch.float64, torch.int64, torch.bool]))
def test_every_entry_becomes_what_the_rule_says(rule, case):
    spec, tensors, parts = case
    before = copies(tensors)
    rule.merge(tensors, spec, parts, {})
    for name, tensor in tensors.items():
        whole = not tensor.is_floating_point()
        for entry, values in by_entry(name, spec, parts, tensor).items():
            got, w = tensor[entry].item(), before[name][entry].item()
            expected = ORACLES[rule](rule, w, values, len(parts), whole) if values else w
            assert got == pytest.approx(expected, rel=1e-11, abs=1e-11), (name, entry, values)


@each_rule
@settings(max_examples=15)
@given(case=merges([torch.float64, torch.float32, torch.bfloat16, torch.int32, torch.bool]))
def test_what_no_part_holds_keeps_its_bits(rule, case):
    spec, tensors, parts = case
    idle = {}
    for name, tensor in tensors.items():
        held = by_entry(name, spec, parts, tensor)
        idle[name] = torch.tensor([not v for v in held.values()]).view(tensor.shape)
    before = copies(tensors)
    state: dict[str, Tensor] = {}
    for _ in range(2):
        moments = copies(state)
        rule.merge(tensors, spec, parts, state)
        for name, none in idle.items():
            assert bits(tensors[name][none]) == bits(before[name][none])
            for key in {f"m/{name}", f"v/{name}"} & moments.keys():
                assert bits(state[key][none]) == bits(moments[key][none])


@given(cases(), st.integers(0, 99))
def test_the_mean_over_all_subnets_is_the_engines_merge(case, seed):
    spec, assignment, tensors = case
    one, other = copies(tensors), copies(tensors)
    parts, single = [], []
    for i in range(assignment.num_subnets):
        parts.append(trained(extract(tensors, spec, assignment, i), seed + i))
        held = {group: (deal[i],) for group, deal in assignment.held.items()}
        alone = Assignment(round=0, sizes=spec.sizes, held=held)
        single.append(Part(assignment=alone, tensors=parts[i]))
    merge(one, spec, assignment, parts)
    CountMean().merge(other, spec, single, {})
    assert all(bits(one[name]) == bits(other[name]) for name in tensors)


def whole_parts(tensors: Mapping[str, Tensor], count: int) -> tuple[PartitionSpec, list[Part]]:
    """A spec in which each of these is held by all, with parts that come back as they were sent."""
    layouts = [ParamLayout(name=name, shape=tuple(t.shape)) for name, t in tensors.items()]
    layouts.append(ParamLayout(name="h", shape=(2,), slots=(Slot(dim=0, group="g"),)))
    spec = PartitionSpec(
        groups={"g": UnitGroup(name="g", size=2)}, layouts={x.name: x for x in layouts}
    )
    assignment = Assignment(round=0, sizes={"g": 2}, held={"g": (torch.tensor([0]),)})
    parts = [
        Part(assignment=assignment, tensors=copies(tensors), start=copies(tensors), weight=3 + n)
        for n in range(count)
    ]
    return spec, parts


@each_rule
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_equal_copies_stay_bit_for_bit(rule, count):
    inf = math.inf
    tensors = {
        "single": torch.tensor([1.0, -0.0, 0.0, 1e38, 1e-45, 0.1]),
        "double": torch.tensor([0.1, 1 / 3, 1e30, -7e-9], dtype=torch.float64),
        "half": torch.tensor([0.1, 65504.0, -65504.0], dtype=torch.float16),
        "long": torch.tensor([2**53 + 1, -(2**62) - 1, 7]),
        "bool": torch.tensor([True, False]),
        "complex": torch.tensor([1 + 2j, -3j]),
    }
    if not isinstance(rule, CohortDelta):  # of infinity there is no change
        tensors["infinite"] = torch.tensor([inf, -inf, 1.0])
    spec, parts = whole_parts(tensors, count)
    merged = as_parameters({**tensors, "h": torch.zeros(2)})
    rule.merge(merged, spec, parts, {})
    for name, tensor in tensors.items():
        assert bits(merged[name]) == bits(tensor), name


@pytest.mark.parametrize(
    "rule", [CountMean(), DataMean(), CohortDelta(server_optimizer="adam")], ids=repr
)
@given(case=merges([torch.float64]), seed=st.integers(0, 99))
def test_the_order_of_parts_plays_no_role(rule, case, seed):
    spec, tensors, parts = case
    other = as_parameters(tensors)
    order = torch.randperm(len(parts), generator=torch.Generator().manual_seed(seed))
    rule.merge(tensors, spec, parts, {})
    rule.merge(other, spec, [parts[i] for i in order.tolist()], {})
    for name, tensor in tensors.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-11, atol=1e-11)


def test_mixing_takes_one_part_after_the_other():
    spec, (one, other) = whole_parts({"t": torch.tensor([0.0])}, 2)
    one, other = (replace(p, tensors={"t": torch.tensor([v])}) for p, v in ((one, 8), (other, 16)))
    mixed = {"t": torch.tensor([0.0]), "h": torch.zeros(2)}
    Mix(alpha=0.5).merge(mixed, spec, [one, other], {})
    assert mixed["t"].item() == 0.5 * (0.5 * 8) + 0.5 * 16


@pytest.mark.parametrize("weight", [1, 49, 0.1])
def test_the_first_copy_takes_the_place_of_what_was_there(weight):
    spec, parts = whole_parts({"t": torch.zeros(4)}, 3)
    parts = [replace(p, weight=weight, tensors={"t": torch.randn(4)}) for p in parts]
    one, other = ({"t": torch.tensor([math.nan, math.inf, 1e38, 0.0])} for _ in range(2))
    CountMean().merge(one, spec, parts, {})
    DataMean().merge(other, spec, parts, {})
    torch.testing.assert_close(other["t"], one["t"])
    assert one["t"].isfinite().all()


def second_moment(name: str, v: float, change: float) -> float:
    """Reddi et al. 2021, algorithm 2."""
    if name == "adagrad":
        return v + change**2
    if name == "adam":
        return 0.99 * v + 0.01 * change**2
    return v - 0.01 * change**2 * ((v > change**2) - (v < change**2))


@pytest.mark.parametrize("name", ["momentum", "adagrad", "yogi", "adam"])
def test_server_optimisers_are_those_of_the_paper(name):
    rule = CohortDelta(server_lr=0.2, server_optimizer=name, epsilon=0.01)
    w, m, v, state = 0.3, 0.0, 0.01**2, {}
    tensors = {"t": nn.Parameter(torch.tensor([w], dtype=torch.float64))}
    for changes in ([1.0, -0.2], [0.5, 0.3], [-2.0, 0.1]):
        spec, parts = whole_parts(copies(tensors), 2)
        moved = (p.start["t"] + c for p, c in zip(parts, changes, strict=True))
        parts = [replace(p, tensors={"t": t}) for p, t in zip(parts, moved, strict=True)]
        rule.merge(tensors, spec, parts, state)
        change = sum(changes) / 2
        if name == "momentum":
            m = 0.9 * m + change
            w += 0.2 * m
        else:
            m, v = 0.9 * m + 0.1 * change, second_moment(name, v, change)
            w += 0.2 * m / (math.sqrt(v) + 0.01)
        assert tensors["t"].item() == pytest.approx(w, rel=1e-12)
    assert state.keys() == ({"m/t"} if name == "momentum" else {"m/t", "v/t"})


@each_rule
def test_entries_between_two_parts_are_idle(rule):
    """Of a matrix each holds a block on the diagonal; what lies beside these has its moments."""
    model = MLP(4, 6, 3, num_layers=3, norm=None)
    spec, tensors, state = partition_spec(model), as_parameters(model_tensors(model)), {}

    def part(*units: int) -> Part:
        held = {group: (torch.tensor(units),) for group in spec.groups}
        assignment = Assignment(round=0, sizes=spec.sizes, held=held)
        start = extract(tensors, spec, assignment, 0)
        return Part(assignment=assignment, tensors=trained(start, len(units)), start=start)

    rule.merge(tensors, spec, [part(*range(6))], state)
    before, moments = copies(tensors), copies(state)
    rule.merge(tensors, spec, [part(0, 2), part(3, 4, 5)], state)
    name, idle = "linears.1.weight", torch.ones(6, 6, dtype=torch.bool)
    for units in ([0, 2], [3, 4, 5]):
        idle[torch.tensor(units)[:, None], torch.tensor(units)] = False
    assert bits(tensors[name][idle]) == bits(before[name][idle])
    assert not torch.any(tensors[name][~idle] == before[name][~idle])
    for key in {f"m/{name}", f"v/{name}"} & state.keys():
        assert bits(state[key][idle]) == bits(moments[key][idle])
        assert not torch.any(state[key][~idle] == moments[key][~idle])


def test_statistics_are_averaged_where_parameters_are_stepped():
    """A change that is added to a variance that has fallen since would take it below zero."""
    tensors = {"w": torch.tensor([1.0]), "running_var": torch.tensor([0.1])}
    spec, (part,) = whole_parts(tensors, 1)
    part = replace(
        part,
        start={"w": torch.tensor([2.0]), "running_var": torch.tensor([1.0])},
        tensors={"w": torch.tensor([1.5]), "running_var": torch.tensor([0.5])},
    )
    merged = {"w": nn.Parameter(tensors["w"]), "running_var": tensors["running_var"]}
    CohortDelta(server_lr=0.5).merge(merged, spec, [part], {})
    assert merged["w"].item() == 0.75
    assert merged["running_var"].item() == 0.5


class Largest(TorchDispatchMode):
    """Entries of the largest tensor that was made, views of what was there left out."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.known, self.entries = {t.untyped_storage().data_ptr() for t in known}, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            new = isinstance(tensor, Tensor) and tensor.numel()
            if new and tensor.untyped_storage().data_ptr() not in self.known:
                self.entries = max(self.entries, tensor.untyped_storage().nbytes() // 4)
        return out


@pytest.mark.parametrize("rule", [Mix(), CountMean(), DataMean(), CohortDelta()], ids=repr)
@pytest.mark.parametrize("count", [1, 3])
def test_nothing_is_made_that_is_larger_than_what_is_held(rule, count):
    model = MLP(200, 300, 4, num_layers=3, norm=None)
    spec, tensors = partition_spec(model), model_tensors(model)
    held = {group: (torch.arange(30),) for group in spec.groups}
    assignment = Assignment(round=0, sizes=spec.sizes, held=held)
    start = extract(tensors, spec, assignment, 0)
    part = Part(assignment=assignment, tensors=trained(start, 0), start=start)
    known = [*tensors.values(), *part.tensors.values(), *start.values()]
    with Largest(known) as made:
        rule.merge(tensors, spec, [part] * count, {})
    largest = max(tensor.numel() for tensor in start.values())
    assert 0 < made.entries <= largest * (2 if isinstance(rule, DataMean) else 1)  # float64 weights


def part_of(model: nn.Module, **more: Any) -> tuple[PartitionSpec, dict[str, Tensor], Part]:
    """The first half of the units of every group."""
    spec, tensors = partition_spec(model), copies(model_tensors(model))
    held = {group: (torch.arange((size + 1) // 2),) for group, size in spec.sizes.items()}
    assignment = Assignment(round=0, sizes=spec.sizes, held=held)
    start = extract(tensors, spec, assignment, 0)
    return (
        spec,
        tensors,
        Part(assignment=assignment, tensors=trained(start, 0), start=start, **more),
    )


def test_rows_of_classes_that_a_client_does_not_have_do_not_count():
    spec, tensors, part = part_of(MLP(5, 6, 4, num_layers=2), classes=torch.tensor([0, 2]))
    before = copies(tensors)
    other = replace(part, tensors=trained(part.tensors, 1), classes=torch.tensor([2, 3]))
    CountMean().merge(tensors, spec, [part, other], {})
    for name in ("linears.1.weight", "linears.1.bias"):
        index = (slice(None), slice(3)) if "weight" in name else (slice(None),)
        one, two, now = part.tensors[name], other.tensors[name], tensors[name][index]
        torch.testing.assert_close(now[0], one[0])
        assert torch.equal(now[1], before[name][index][1])
        torch.testing.assert_close(now[2], (one[2] + two[2]) / 2)
        torch.testing.assert_close(now[3], two[3])
    both = (part.tensors["linears.0.weight"] + other.tensors["linears.0.weight"]) / 2
    torch.testing.assert_close(tensors["linears.0.weight"][:3], both)


def test_a_client_without_classes_leaves_the_output_layer_alone():
    none = torch.empty(0, dtype=torch.int64)
    spec, tensors, part = part_of(MLP(5, 6, 4, num_layers=2), classes=none)
    before = copies(tensors)
    Mix().merge(tensors, spec, [part], {})
    assert bits(tensors["linears.1.weight"]) == bits(before["linears.1.weight"])
    assert bits(tensors["linears.0.weight"]) != bits(before["linears.0.weight"])


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (MLP(5, 7, 3, num_layers=3), {"linears.2.weight", "linears.2.bias"}),
        (VGG(((4,), (8,)), num_classes=3), {"head.weight", "head.bias"}),
        (GCN(4, 6, 3, num_layers=2), {"convs.1.lin.weight", "convs.1.bias"}),
        (
            GraphSAGE(4, 6, 3, num_layers=2),
            {"convs.1.lin_l.weight", "convs.1.lin_l.bias", "convs.1.lin_r.weight"},
        ),
        (GIN(4, 6, 2, 3), {"convs.1.nn.lins.1.weight", "convs.1.nn.lins.1.bias"}),
    ],
    ids=["mlp", "vgg", "gcn", "sage", "gin"],
)
def test_the_output_layer_is_found(model, expected):
    assert set(output_layer(partition_spec(model))) == expected


def test_the_output_layer_of_a_residual_network_is_its_head():
    model = preact_resnet20(width=8)
    assert set(output_layer(partition_spec(model, wire_filters))) == {"head.weight", "head.bias"}


def test_what_has_no_row_for_every_output_is_refused():
    averaged = GAT(4, 12, 2, num_layers=2, heads=3)  # six rows for two classes
    with pytest.raises(PartitionError, match="a row for every output"):
        output_layer(partition_spec(averaged))


BAD_NAMES = {
    "unknown": lambda t: {**t, "linears.9.weight": torch.zeros(1)},
    "number": lambda t: {**t, 3: torch.zeros(1)},
    "shape": lambda t: {**t, "linears.0.bias": t["linears.0.bias"][:-1]},
    "transposed": lambda t: {**t, "linears.0.weight": t["linears.0.weight"].t()},
    "scalar": lambda t: {**t, "linears.0.bias": torch.tensor(1.0)},
    "list": lambda t: {**t, "linears.0.bias": [1.0, 2.0]},
    "none": lambda t: {**t, "linears.0.bias": None},
    "sparse": lambda t: {**t, "linears.0.weight": t["linears.0.weight"].to_sparse()},
    "meta": lambda t: {**t, "linears.0.weight": t["linears.0.weight"].to("meta")},
    "bytes": lambda t: {**t, "linears.0.bias": t["linears.0.bias"].to(torch.float8_e4m3fn)},
    "huge": lambda t: {**t, "linears.0.weight": torch.zeros(1).expand(2**40, 5)},
    "no mapping": lambda t: list(t),
}
BAD_VALUES = {
    "missing": lambda t: {n: v for n, v in t.items() if n != "linears.0.bias"},
    "empty": lambda t: {},
    "nan": lambda t: {**t, "linears.0.bias": t["linears.0.bias"] * math.nan},
    "infinite": lambda t: {**t, "linears.0.bias": t["linears.0.bias"] - math.inf},
    "large": lambda t: {**t, "linears.0.bias": t["linears.0.bias"].sign() * 1e30},
    "double": lambda t: {**t, "linears.0.bias": t["linears.0.bias"].double()},
    "complex": lambda t: {**t, "linears.0.bias": t["linears.0.bias"] * 1j},
    "counter": lambda t: {**t, "norms.0.num_batches_tracked": torch.tensor(-(2**63))},
    "bool": lambda t: {**t, "linears.0.bias": t["linears.0.bias"] > 0},
}


@pytest.mark.parametrize(
    "bad", [*BAD_NAMES.values(), *BAD_VALUES.values()], ids=[*BAD_NAMES, *BAD_VALUES]
)
def test_garbage_is_refused(bad):
    spec, tensors, part = part_of(MLP(5, 7, 3, num_layers=2))
    check_part(part, spec, like=tensors)
    check_part(part, spec)
    garbage = replace(part, tensors=bad(part.tensors))
    with pytest.raises(PartitionError, match="an update cannot be taken") as one:
        check_part(garbage, spec, like=tensors)
    assert len(str(one.value)) < 3000
    with pytest.raises(PartitionError, match="an update cannot be taken"):
        check_part(garbage, spec)  # what was sent says the dtypes


def test_units_of_other_groups_are_refused():
    spec, tensors, part = part_of(MLP(5, 7, 3, num_layers=2))
    elsewhere = Assignment(round=0, sizes={"g": 4}, held={"g": (torch.arange(2),)})
    for check in (
        lambda bad: check_part(bad, spec),
        lambda bad: CountMean().merge(tensors, spec, [bad], {}),
    ):
        with pytest.raises(PartitionError, match="other groups"):
            check(replace(part, assignment=elsewhere))


def test_some_tensors_can_be_asked_for():
    spec, _, part = part_of(MLP(5, 7, 3, num_layers=2))
    one = replace(part, tensors={"linears.0.bias": part.tensors["linears.0.bias"]})
    check_part(one, spec, names=["linears.0.bias"])
    with pytest.raises(PartitionError, match=r"linears\.0\.weight: is missing"):
        check_part(one, spec, names=["linears.0.bias", "linears.0.weight"])
    with pytest.raises(PartitionError, match=r"linears\.0\.bias: was not asked for"):
        check_part(one, spec, names=[])


def test_a_great_many_findings_are_cut_short():
    spec, _, part = part_of(MLP(5, 7, 3, num_layers=2))
    junk = {"x" * 1000 + str(i): torch.zeros(1) for i in range(1000)}
    with pytest.raises(PartitionError, match="and 990 more") as error:
        check_part(replace(part, tensors=junk), spec)
    assert len(str(error.value)) < 3000


@each_rule
@pytest.mark.parametrize("bad", BAD_NAMES.values(), ids=list(BAD_NAMES))
def test_nothing_is_merged_where_one_part_does_not_fit(rule, bad):
    spec, tensors, part = part_of(MLP(5, 7, 3, num_layers=2))
    tensors = as_parameters(tensors)
    before = copies(tensors)
    with pytest.raises(PartitionError, match="part 1: "):
        rule.merge(tensors, spec, [part, replace(part, tensors=bad(part.tensors))], {})
    assert all(bits(tensors[name]) == bits(before[name]) for name in before)


def test_changes_need_what_was_sent_and_parameters():
    spec, tensors, part = part_of(MLP(5, 7, 3, num_layers=2))
    with pytest.raises(PartitionError, match=r"no nn\.Parameter"):
        CohortDelta().merge(tensors, spec, [part], {})
    with pytest.raises(PartitionError, match="start: is missing"):
        CohortDelta().merge(as_parameters(tensors), spec, [replace(part, start=None)], {})
    less = {n: t for n, t in part.tensors.items() if n != "linears.0.bias"}
    with pytest.raises(PartitionError, match=r"start of linears\.0\.bias: is missing"):
        CohortDelta().merge(as_parameters(tensors), spec, [replace(part, start=less)], {})


@pytest.mark.parametrize(
    "classes", [[1, 0], [0, 0], [-1], [3], [0.0]], ids=["order", "twice", "low", "high", "float"]
)
def test_classes_are_rows_of_the_output_layer(classes):
    spec, tensors, part = part_of(MLP(5, 7, 3, num_layers=2), classes=torch.tensor(classes))
    with pytest.raises(PartitionError, match="classes must be ascending rows out of 0 to 2"):
        CountMean().merge(tensors, spec, [part], {})


@pytest.mark.parametrize(
    "setting",
    [
        {"weight": 0},
        {"weight": math.nan},
        {"weight": math.inf},
        {"weight": "3"},
        {"staleness": -1},
        {"staleness": 0.5},
        {"staleness": True},
        {"assignment": None},
    ],
    ids=str,
)
def test_a_part_out_of_range_is_refused(setting):
    _, _, part = part_of(MLP(5, 7, 3, num_layers=2))
    with pytest.raises(PartitionError):
        replace(part, **setting)


@pytest.mark.parametrize(
    ("rule", "settings"),
    [
        (Mix, {"alpha": 0}),
        (Mix, {"alpha": 1.5}),
        (Mix, {"alpha": math.nan}),
        (Mix, {"staleness_power": -1}),
        (CohortDelta, {"server_lr": 0.0}),
        (CohortDelta, {"server_lr": math.inf}),
        (CohortDelta, {"staleness_power": math.nan}),
        (CohortDelta, {"server_optimizer": "lion"}),
        (CohortDelta, {"betas": (0.9, 1.0)}),
        (CohortDelta, {"epsilon": 0}),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(rule, settings):
    with pytest.raises(ConfigError):
        rule(**settings)


def test_parts_may_require_gradients():
    spec, tensors, part = part_of(MLP(5, 7, 3, num_layers=2))
    tensors = as_parameters(tensors)
    grown = {n: t.requires_grad_(t.is_floating_point()) for n, t in part.tensors.items()}
    for rule in RULES:
        rule.merge(tensors, spec, [replace(part, tensors=grown)] * 2, {})
    assert all(t.is_leaf and t.grad_fn is None for t in tensors.values())
    selection = Selection(spec, part.assignment, 0)
    assert all(selection.shape(spec.layouts[n]) == tuple(t.shape) for n, t in grown.items())


def test_a_running_mean_of_bytes_does_not_wrap():
    mean = RunningMean(torch.tensor([0, 7], dtype=torch.uint8))
    for part in (10, 4):
        mean.add((torch.tensor([0]),), torch.tensor([part], dtype=torch.uint8))
    assert mean.value.to(torch.uint8).tolist() == [7, 7]
