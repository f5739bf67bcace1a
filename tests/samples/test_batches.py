"""Batches of every subnet: whole passes, fixed shards, and the same whatever was asked before."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gist.errors import ConfigError, DataError
from gist.samples.batches import TensorSource
from gist.samples.data import SampleData
from gist.samples.passes import Passes
from gist.samples.transforms import ImageTransform


def series(passes: Passes, rounds: int, **where) -> list[list[int]]:
    """The batches of a subnet in its first rounds of ζ steps, one after the other."""
    return [
        batch.tolist()
        for round in range(rounds)
        for batch in passes.batches(**where, round=round, steps=passes.local_steps)
    ]


@given(
    count=st.integers(1, 30),
    size=st.integers(1, 12),
    local_steps=st.integers(1, 9),
    seed=st.integers(0, 99),
    subnet=st.integers(0, 3),
)
def test_every_pass_sees_each_sample_at_most_once_in_full_batches(
    count, size, local_steps, seed, subnet
):
    samples = torch.arange(count) * 7 + 3
    passes = Passes(samples, size, local_steps=local_steps)
    steps = passes.steps_per_epoch
    assert steps == max(count // size, 1)
    batches = series(passes, -(-3 * steps // local_steps), seed=seed, subnet=subnet)
    assert {len(batch) for batch in batches} == {min(size, count)}
    for first in range(0, 3 * steps, steps):
        seen = list(chain(*batches[first : first + steps]))
        assert len(set(seen)) == len(seen) == min(steps * size, count)
        assert set(seen) <= set(samples.tolist())


def test_what_a_pass_leaves_out_differs_from_pass_to_pass():
    passes = Passes(torch.arange(11), 5, local_steps=2)
    batches = series(passes, 40, seed=0, subnet=0)
    left = [set(range(11)) - set(a + b) for a, b in zip(batches[::2], batches[1::2], strict=True)]
    assert set.union(*left) == set(range(11))


@given(
    count=st.integers(2, 40),
    shards=st.integers(1, 6),
    seed=st.integers(0, 99),
    size=st.integers(1, 8),
)
def test_shards_are_disjoint_and_even_and_cover_all(count, shards, seed, size):
    samples = torch.arange(count) + 100
    if shards > count:
        with pytest.raises(ConfigError, match="more shards than training samples"):
            Passes(samples, size, local_steps=3, shards=shards)
        return
    passes = Passes(samples, size, local_steps=3, shards=shards)
    assert passes.steps_per_epoch == Passes(samples, size, local_steps=3).steps_per_epoch
    parts = [passes.seen_by(i, seed=seed) for i in range(shards)]
    assert passes.smallest_batch == min(size, *map(len, parts))
    assert sorted(torch.cat(parts).tolist()) == samples.tolist()
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert torch.equal(passes.seen_by(shards + 1, seed=seed), parts[(shards + 1) % shards])
    for subnet, part in enumerate(parts):
        own = max(len(part) // size, 1)
        batches = series(passes, -(-own // 3), seed=seed, subnet=subnet)[:own]
        seen = list(chain(*batches))
        assert len(set(seen)) == len(seen) == min(own * size, len(part))
        assert set(seen) <= set(part.tolist())


def images() -> SampleData:
    x = torch.randint(256, (50, 1, 4, 4)).to(torch.uint8)
    return SampleData.of((x, torch.arange(50) % 5), transform=ImageTransform(pad=2, flip=True))


@pytest.mark.parametrize("shards", [None, 3])
def test_batches_are_equal_whatever_was_asked_before(shards):
    data = images()

    def source() -> TensorSource:
        return TensorSource(data, 8, shards=shards, local_steps=4)

    keys = [{"seed": s, "round": r, "subnet": i} for s in (0, 1) for r in (0, 3) for i in (0, 1, 2)]
    one, two = source(), source()
    first = [list(one.batches(**key, steps=4)) for key in keys]
    second = [list(two.batches(**key, steps=4)) for key in reversed(keys)][::-1]
    again = [list(one.batches(**key, steps=2)) for key in keys]  # a shorter last round
    for a, b, c in zip(first, second, again, strict=True):
        for p, q in [*zip(a, b, strict=True), *zip(a[:2], c, strict=True)]:
            assert torch.equal(p.x, q.x)
            assert torch.equal(p.y, q.y)
    orders = {tuple(torch.cat([b.x for b in run]).flatten().tolist()) for run in first}
    assert len(orders) == len(keys)


def test_batches_touch_no_global_state_and_know_their_samples():
    data = images()
    source = TensorSource(data, 8, shards=None, local_steps=5)
    before = torch.get_rng_state()
    (batch,) = source.batches(seed=0, round=0, subnet=0, steps=1)
    assert torch.equal(torch.get_rng_state(), before)
    (index,) = source.passes.batches(seed=0, round=0, subnet=0, steps=1)
    assert torch.equal(batch.y, data.y[index])
    assert batch.x.shape == (8, 1, 4, 4)
    assert set(index.tolist()) <= set(data.train.tolist())
    assert source.describe() == {"name": "TensorSource", "batch_size": 8, "shards": None}
    assert source.steps_per_epoch == 5


# --- parts of clients ---


@st.composite
def parts_of(draw: st.DrawFn, count: int) -> list[torch.Tensor]:
    """Positions of some clients: none is left without, and they may share some."""
    place = st.integers(0, count - 1)
    parts = draw(st.lists(st.sets(place, min_size=1, max_size=12), min_size=1, max_size=6))
    return [torch.tensor(sorted(part)) for part in parts]


@given(data=st.data(), size=st.integers(1, 5), ζ=st.integers(1, 4), seed=st.integers(0, 99))
def test_a_pass_of_a_client_sees_its_part_once(data, size, ζ, seed):
    samples = torch.arange(30) * 3 + 1
    parts = data.draw(parts_of(30))
    passes = Passes(samples, size, local_steps=ζ, parts=parts)
    assert passes.client_samples.tolist() == [len(part) for part in parts]
    for client, part in enumerate(parts):
        own = set(samples[part].tolist())
        assert set(passes.seen_by(client, seed=seed).tolist()) == own
        steps = max(len(part) // size, 1)
        batches = series(passes, -(-3 * steps // ζ), seed=seed, subnet=client)
        # fewer samples than a batch are one batch of them all
        assert {len(batch) for batch in batches} == {min(size, len(part))}
        for first in range(0, 3 * steps, steps):
            seen = list(chain(*batches[first : first + steps]))
            assert len(set(seen)) == len(seen) == min(steps * size, len(part))
            assert set(seen) <= own


@given(data=st.data(), client=st.integers(0, 5), own=st.integers(0, 3))
def test_batches_of_a_client_do_not_depend_on_the_others(data, client, own):
    samples = torch.arange(40)
    parts = data.draw(parts_of(40))
    client %= len(parts)
    others = [torch.tensor([i]) if i != client else part for i, part in enumerate(parts)]
    where = {"seed": 4, "round": own, "subnet": client, "steps": 3}
    one, two = (
        list(Passes(samples, 4, local_steps=3, parts=some).batches(**where))
        for some in (parts, others)
    )
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_shards_given_as_parts_are_the_shards():
    samples = torch.arange(50) + 7
    shards = Passes(samples, 4, local_steps=3, shards=6)
    parts = [shards.seen_by(i, seed=2) - 7 for i in range(6)]
    given_ = Passes(samples, 4, local_steps=3, parts=parts)
    for subnet in range(7):  # the seventh has the part of the first, in an order of its own
        where = {"seed": 2, "subnet": subnet}
        assert series(shards, 5, **where) == series(given_, 5, **where)


def test_many_clients_cost_one_index():
    count = 10_000
    parts = torch.split(torch.randperm(3 * count), 3)
    passes = Passes(torch.arange(3 * count), 2, local_steps=2, parts=parts)
    held = [value for value in vars(passes).values() if not isinstance(value, int | None)]
    assert all(isinstance(value, torch.Tensor) for value in held)
    assert sum(value.numel() for value in held) <= 2 * 3 * count + 2 * (count + 1)
    places = {passes.seen_by(i, seed=0).untyped_storage().data_ptr() for i in range(0, count, 99)}
    assert len(places) == 1


@pytest.mark.parametrize(
    ("parts", "match"),
    [
        ([], "without samples"),
        ([[0, 1], []], "1 of 2 clients"),
        ([[0], [10]], "between 0 and 10"),
        ([[0], [-1]], "between -1 and 0"),
    ],
    ids=["none", "empty", "beyond", "negative"],
)
def test_parts_without_samples_are_refused(parts, match):
    parts = [torch.tensor(part, dtype=torch.int64) for part in parts]
    with pytest.raises(DataError, match=match):
        Passes(torch.arange(10), 2, local_steps=2, parts=parts)


def test_a_source_of_parts_gives_each_client_its_own_samples():
    data = images()
    parts = [torch.arange(0, 5), torch.arange(5, 40)]

    def source(parts) -> TensorSource:
        return TensorSource(data, 8, shards=None, local_steps=4, parts=parts)

    for client, part in enumerate(parts):
        asked = {"seed": 0, "round": 1, "subnet": client, "steps": 4}
        one, two = (list(source(parts).batches(**asked)) for _ in range(2))
        assert all(torch.equal(a.x, b.x) for a, b in zip(one, two, strict=True))
        labels = data.y[data.train[part]].tolist()
        assert len(one[0].y) == min(8, len(part))
        assert set(one[0].y.tolist()) <= set(labels)
    described = source(parts).describe()
    assert described == source([part.clone() for part in parts]).describe()
    others = (parts[::-1], [torch.arange(0, 6), torch.arange(6, 40)])
    assert all(described != source(other).describe() for other in others)
