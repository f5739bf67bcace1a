"""Batches of every subnet: whole passes, fixed shards, and the same whatever was asked before."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gist.errors import ConfigError
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
