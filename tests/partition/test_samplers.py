"""Samplers: what every deal keeps true, and that it depends on (seed, round) alone."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gist.errors import ConfigError, PartitionError
from gist.partition.assignment import Assignment
from gist.partition.samplers import (
    Bernoulli,
    Categorical,
    DisjointUniform,
    Overlapping,
    Proportional,
    Whole,
)
from gist.partition.streams import stream, stream_seed

SAMPLERS = [
    DisjointUniform(),
    Overlapping(min_units=3),
    Bernoulli(keep=0.4),
    Bernoulli(keep=1.0),
    Categorical(),
    Proportional((1.0, 0.3)),
    Whole(),
]
DISJOINT = [DisjointUniform(), Categorical(), Proportional((1.0, 0.3))]
each = pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)


@st.composite
def deals(draw: st.DrawFn) -> tuple[dict[str, int], int, int, int]:
    m = draw(st.integers(1, 6))
    sizes = draw(
        st.dictionaries(st.sampled_from("abcd"), st.integers(m, 23), min_size=1, max_size=4)
    )
    return sizes, m, draw(st.integers(0, 2**40)), draw(st.integers(0, 1000))


def same(one: Assignment, other: Assignment, group: str) -> bool:
    pairs = zip(one.held[group], other.held[group], strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@each
@given(case=deals())
def test_every_subnet_holds_units_of_every_group(sampler, case):
    sizes, m, seed, round = case
    dealt = sampler(sizes, m, seed=seed, round=round)
    assert dealt.num_subnets == m
    assert dealt.round == round
    assert dict(dealt.sizes) == sizes
    for group, size in sizes.items():
        assert len(dealt.held[group]) == m
        for units in dealt.held[group]:
            assert units.dtype == torch.int64
            assert units.tolist() == sorted(set(units.tolist()))
            assert 0 < len(units) <= size
            assert 0 <= units[0] <= units[-1] < size


@pytest.mark.parametrize("sampler", DISJOINT, ids=repr)
@given(case=deals())
def test_disjoint_deals_cover_each_unit_exactly_once(sampler, case):
    sizes, m, seed, round = case
    dealt = sampler(sizes, m, seed=seed, round=round)
    assert dealt.disjoint_groups == set(sizes)
    for group, size in sizes.items():
        assert torch.cat(dealt.held[group]).sort().values.tolist() == list(range(size))
        assert dealt.coverage(group).tolist() == [1] * size


@given(case=deals())
def test_uniform_blocks_differ_by_at_most_one_unit(case):
    sizes, m, seed, round = case
    dealt = DisjointUniform()(sizes, m, seed=seed, round=round)
    for group, size in sizes.items():
        widths = [dealt.widths(i)[group] for i in range(m)]
        assert sum(widths) == size
        assert max(widths) - min(widths) <= 1


@given(case=deals(), at_least=st.integers(1, 30))
def test_overlapping_tops_up_a_partition(case, at_least):
    sizes, m, seed, round = case
    dealt = Overlapping(min_units=at_least)(sizes, m, seed=seed, round=round)
    for group, size in sizes.items():
        blocks = [len(b) for b in torch.arange(size).tensor_split(m)]
        widths = [len(units) for units in dealt.held[group]]
        assert widths == [max(block, min(at_least, size)) for block in blocks]
        assert int(dealt.coverage(group).min()) >= 1


@each
@given(case=deals())
def test_a_deal_depends_on_seed_and_round_alone(sampler, case):
    sizes, m, seed, round = case
    first = sampler(sizes, m, seed=seed, round=round)
    sampler(sizes, m, seed=seed + 1, round=round + 1)  # another call in between
    torch.manual_seed(seed % 7)
    again = sampler(dict(reversed(sizes.items())), m, seed=seed, round=round)
    assert all(same(first, again, group) for group in sizes)
    group = next(iter(sizes))
    alone = sampler({group: sizes[group]}, m, seed=seed, round=round)
    assert same(first, alone, group), "other groups must not matter"


@each
def test_global_random_state_is_left_alone(sampler):
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    sampler({"a": 12, "b": 9}, 3, seed=0, round=0)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002
    assert random.getstate() == before[2]


@pytest.mark.parametrize(
    "sampler", [s for s in SAMPLERS if s not in (Bernoulli(keep=1.0), Whole())], ids=repr
)
def test_rounds_seeds_and_groups_are_dealt_differently(sampler):
    sizes = {"a": 64, "b": 64}
    base = sampler(sizes, 4, seed=0, round=0)
    assert not same(base, sampler(sizes, 4, seed=0, round=1), "a")
    assert not same(base, sampler(sizes, 4, seed=1, round=0), "a")
    assert any(
        not torch.equal(x, y) for x, y in zip(base.held["a"], base.held["b"], strict=True)
    ), "groups must not share a stream"


@pytest.mark.parametrize("keep", [0.2, 0.7])
def test_bernoulli_keeps_the_stated_share(keep):
    size, m, rounds = 500, 4, 10
    kept = sum(
        len(units)
        for round in range(rounds)
        for units in Bernoulli(keep=keep)({"a": size}, m, seed=1, round=round).held["a"]
    )
    trials = size * m * rounds
    assert abs(kept / trials - keep) < 5 * (keep * (1 - keep) / trials) ** 0.5


def test_bernoulli_masks_of_subnets_are_independent():
    dealt = Bernoulli(keep=0.5)({"a": 4000}, 2, seed=0, round=0)
    both = int((dealt.coverage("a") == 2).sum()) / 4000
    assert abs(both - 0.25) < 0.04


@pytest.mark.parametrize("p", [None, (0.5, 0.3, 0.2), (0.1, 0.1, 0.8)])
def test_categorical_follows_its_probabilities(p):
    dealt = Categorical(p=p)({"a": 6000}, 3, seed=2, round=0)
    shares = [len(units) / 6000 for units in dealt.held["a"]]
    assert shares == pytest.approx(p or [1 / 3] * 3, abs=0.03)


@given(st.integers(1, 9), st.integers(0, 50))
def test_categorical_leaves_no_subnet_empty(m, round):
    p = (1.0, *[0.0] * (m - 1))
    dealt = Categorical(p=p)({"a": m, "b": m + 3}, m, seed=0, round=round)
    assert all(len(units) >= 1 for deal in dealt.held.values() for units in deal)
    assert dealt.disjoint_groups == {"a", "b"}


def test_every_unit_meets_every_subnet_alike():
    counts = torch.zeros(7, 3)
    for round in range(600):
        dealt = DisjointUniform()({"a": 7}, 3, seed=0, round=round)
        for subnet, units in enumerate(dealt.held["a"]):
            counts[units, subnet] += 1
    expected = torch.tensor([3.0, 2.0, 2.0]) / 7 * 600
    assert ((counts - expected).abs() < 60).all(), counts


@each
def test_too_many_subnets_name_the_smallest_group(sampler):
    if sampler.may_share:
        dealt = sampler({"large": 10, "small": 3}, 4, seed=0, round=0)
        assert all(min(dealt.widths(i).values()) >= 1 for i in range(4))
        return
    with pytest.raises(PartitionError, match=r"'small' has 3 units.*num_subnets <= 3"):
        sampler({"large": 10, "small": 3}, 4, seed=0, round=0)


@each
@pytest.mark.parametrize("m", [0, -1])
def test_at_least_one_subnet(sampler, m):
    with pytest.raises(PartitionError, match="at least one subnet"):
        sampler({"a": 10}, m, seed=0, round=0)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Overlapping(min_units=0),
        lambda: Overlapping(warmup_rounds=-1),
        lambda: Bernoulli(keep=0.0),
        lambda: Bernoulli(keep=1.5),
        lambda: Bernoulli(keep=float("nan")),
        lambda: Categorical(p=(0.5, 0.6)),
        lambda: Categorical(p=(1.5, -0.5)),
        lambda: Categorical(p=(float("nan"), 1.0)),
        lambda: Categorical(p=()),
    ],
)
def test_unusable_settings_are_refused(build):
    with pytest.raises(ConfigError):
        build()


def test_categorical_needs_one_probability_per_subnet():
    with pytest.raises(PartitionError, match="one probability per subnet"):
        Categorical(p=(0.5, 0.5))({"a": 10}, 3, seed=0, round=0)


def assignment(*deal: list[int], size: int = 4) -> Assignment:
    held = {"a": tuple(torch.tensor(units, dtype=torch.int64) for units in deal)}
    return Assignment(round=0, sizes={"a": size}, held=held)


@pytest.mark.parametrize(
    "deal", [([0, 1], []), ([0, 4],), ([-1, 0],), ([1, 0],), ([1, 1],), ([0], [3, 2])]
)
def test_bad_assignments_are_refused(deal):
    with pytest.raises(PartitionError, match="'a'"):
        assignment(*deal)


def test_assignments_deal_every_group_to_as_many_subnets():
    one = torch.tensor([0])
    with pytest.raises(PartitionError, match="every group"):
        Assignment(round=0, sizes={"a": 1, "b": 1}, held={"a": (one,)})
    with pytest.raises(PartitionError, match="same number of subnets"):
        Assignment(round=0, sizes={"a": 2, "b": 1}, held={"a": (one, one), "b": (one,)})


def test_assignment_queries():
    dealt = assignment([0, 2], [2, 3])
    assert dealt.coverage("a").tolist() == [1, 0, 2, 1]
    assert dealt.holders("a", 2) == [0, 1]
    assert dealt.holders("a", 1) == []
    assert dealt.widths(1) == {"a": 2}
    assert dealt.disjoint_groups == frozenset()
    assert assignment([0], [3]).disjoint_groups == {"a"}


@given(
    st.lists(
        st.tuples(st.sampled_from(["", "a", "ab", "é"]), st.integers(-5, 5), st.integers(0, 9)),
        min_size=2,
        max_size=6,
        unique=True,
    )
)
def test_streams_of_different_keys_differ(keys):
    seeds = {stream_seed(*key) for key in keys}
    assert len(seeds) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_streams_are_pinned():
    # Checkpoints of one version are resumed by the next: these numbers may never change.
    assert stream_seed("train", 0, 0, 0) == 5805705269791713237
    assert stream_seed("assignment", 7, 3, "hidden.0") == 1454341960447198524
    assert stream_seed("1") != stream_seed(1)
    assert stream_seed("a", "b") != stream_seed("ab")
    one, two = (torch.randperm(50, generator=stream("x", 1)) for _ in range(2))
    assert torch.equal(one, two)


@given(
    size=st.integers(1, 60),
    weights=st.lists(st.floats(0.01, 100.0), min_size=1, max_size=5),
    data=st.data(),
)
def test_proportional_blocks_are_as_large_as_their_weights(size, weights, data):
    m = data.draw(st.integers(1, size))
    deal = Proportional(tuple(weights))({"h": size}, m, seed=1, round=2)
    assert torch.equal(torch.cat(deal.held["h"]).sort().values, torch.arange(size))
    counts = [units.numel() for units in deal.held["h"]]
    cycled = [weights[i % len(weights)] for i in range(m)]
    for count, weight in zip(counts, cycled, strict=True):
        assert abs(count - 1 - (size - m) * weight / sum(cycled)) < 1


def test_equal_weights_are_equal_sizes():
    deal = Proportional((2.0,))({"h": 12}, 4, seed=0, round=0)
    assert [units.numel() for units in deal.held["h"]] == [3, 3, 3, 3]


def test_four_times_the_speed_is_twice_the_width():
    deal = Proportional.to_speed((1.0, 0.25))({"h": 302}, 2, seed=0, round=0)
    assert [units.numel() for units in deal.held["h"]] == [201, 101]


@pytest.mark.parametrize("weights", [(), (1.0, 0.0), (1.0, -1.0), (float("inf"),), (float("nan"),)])
def test_weights_must_be_positive_numbers(weights):
    with pytest.raises(ConfigError, match="weights must be positive"):
        Proportional(weights)


def test_resist_warms_up_with_whole_models():
    sampler = Overlapping(min_units=2, warmup_rounds=3)
    for round in range(5):
        dealt = sampler({"blocks": 9}, 4, seed=0, round=round)
        widths = [dealt.widths(i)["blocks"] for i in range(4)]
        assert widths == ([9, 9, 9, 9] if round < 3 else [3, 2, 2, 2])


@given(size=st.integers(1, 4), m=st.integers(5, 9), least=st.integers(1, 6))
def test_there_may_be_fewer_blocks_than_subnets(size, m, least):
    dealt = Overlapping(min_units=least)({"blocks": size}, m, seed=0, round=1)
    assert {dealt.widths(i)["blocks"] for i in range(m)} == {min(least, size)}
    assert int(dealt.coverage("blocks").min()) >= 1
