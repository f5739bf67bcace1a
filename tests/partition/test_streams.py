"""Random streams of stacked subnets: each as it is on its own, nothing of the caller's touched."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gist.partition.streams import each_generator, seeded, seeded_each

CPU = torch.device("cpu")
KEYS = st.lists(
    st.tuples(st.sampled_from(["train", "other"]), st.integers(0, 2**40), st.integers(0, 9)),
    min_size=1,
    max_size=4,
)


def draws(count: int = 5) -> Tensor:
    return torch.stack([torch.rand(3) for _ in range(count)])


def draws_of(generator: torch.Generator, count: int = 5) -> Tensor:
    return torch.stack([torch.rand(3, generator=generator) for _ in range(count)])


@given(keys=KEYS)
def test_every_subnet_draws_what_it_draws_on_its_own(keys):
    with seeded_each(*keys, device=CPU):
        generators = each_generator()
        assert len(generators) == len(keys)
        drawn = [draws_of(generator) for generator in generators]
    for key, stacked in zip(keys, drawn, strict=True):
        with seeded(*key):
            assert torch.equal(stacked, draws())


@given(keys=KEYS)
def test_the_callers_random_state_is_left_alone(keys):
    state = torch.get_rng_state()
    with seeded_each(*keys, device=CPU):
        draws()
        draws_of(each_generator()[0])
    assert torch.equal(torch.get_rng_state(), state)
    assert each_generator() is None


def test_what_draws_from_the_global_generator_has_a_stream_by_all_keys():
    drawn = []
    for keys in ([("a", 1), ("a", 2)], [("a", 1), ("a", 2)], [("a", 1), ("a", 3)], [("a", 1)]):
        torch.rand(3)  # whatever happened before
        with seeded_each(*keys, device=CPU):
            draws_of(each_generator()[0])  # what the subnets drew plays no part
            drawn.append(draws())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[3])


def test_no_subnet_draws_what_the_global_generator_does():
    with seeded_each(("a", 1), ("a", 2), device=CPU):
        one, two, rest = *map(draws_of, each_generator()), draws()
    assert not torch.equal(one, two)
    assert not torch.equal(one, rest)


def test_streams_nest():
    with seeded_each(("outer", 0), ("outer", 1), device=CPU):
        outer, start = each_generator(), draws(1)
        with seeded_each(("inner", 0), device=CPU):
            assert len(each_generator()) == 1
            draws()
        with seeded("inner"):
            assert each_generator() is outer, "a plain stream changes the global generator only"
            draws()
        assert each_generator() is outer
        rest = draws(1)
    assert each_generator() is None
    with seeded_each(("outer", 0), ("outer", 1), device=CPU):
        assert torch.equal(torch.cat([draws(1), draws(1)]), torch.cat([start, rest]))


def test_an_error_leaves_nothing_behind():
    state = torch.get_rng_state()

    def fail() -> None:
        with seeded_each(("a", 1), device=CPU):
            draws()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert each_generator() is None
    assert torch.equal(torch.get_rng_state(), state)


def test_outside_of_stacked_training_there_are_none():
    assert each_generator() is None
    with seeded("train", 0):
        assert each_generator() is None
