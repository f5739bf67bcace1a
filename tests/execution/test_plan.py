"""The rounds of a run: the budget rule, phases, and the learning rate over the budget."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gist.config import (
    _ELSEWHERE,
    GraphConfig,
    SampleConfig,
    TrainConfig,
    learning_rate_factor,
    split_settings,
)
from gist.errors import ConfigError
from gist.plan import plan_rounds


@st.composite
def schedules(draw: st.DrawFn) -> list[tuple[float, int]]:
    """Phases whose shares are exact in binary, so that nothing hides behind rounding."""
    parts = draw(st.lists(st.integers(1, 8), min_size=1, max_size=4))
    total = 2 ** math.ceil(math.log2(sum(parts)))
    parts[-1] += total - sum(parts)
    return [(part / total, draw(st.integers(1, 8))) for part in parts]


@given(schedules(), st.integers(256, 700), st.integers(1, 40), st.integers(1, 7))
def test_the_budget_is_split_over_phases_and_subnets(phases, epochs, local_steps, per_epoch):
    config = TrainConfig(num_subnets=phases, epochs=epochs, local_steps=local_steps)
    plans = plan_rounds(config, per_epoch)
    assert [plan.index for plan in plans] == list(range(len(plans)))
    at = 0
    spent = 0.0
    for share, m in phases:
        steps = math.floor(epochs * share * per_epoch / m)
        count = math.ceil(steps / local_steps)
        mine, at = plans[at : at + count], at + count
        assert sum(plan.local_steps for plan in mine) == steps
        assert all(plan.num_subnets == m for plan in mine)
        assert all(plan.local_steps == local_steps for plan in mine[:-1]), "only the last is short"
        assert 1 <= mine[-1].local_steps <= local_steps
        for plan in mine:
            spent += plan.local_steps * m / per_epoch
            assert plan.epochs_spent == pytest.approx(spent)
    assert at == len(plans)
    assert plans[-1].epochs_spent <= epochs + 1e-9, "the budget is never exceeded"
    assert plans[-1].epochs_spent > epochs - len(phases) * 8 / per_epoch - 1e-9


def test_the_papers_example():
    """400 epochs at m = 4 are 100 for each (GIST, section 5); full batch, ζ = 20: five rounds."""
    plans = plan_rounds(TrainConfig(num_subnets=4, epochs=400, local_steps=20), 1)
    assert [plan.local_steps for plan in plans] == [20] * 5
    assert plans[-1].epochs_spent == 400.0
    assert len(plan_rounds(TrainConfig(num_subnets=4, local_steps=20), 1)) == 5, (
        "400 is the default"
    )


@pytest.mark.parametrize(("m", "total"), [(1, 400), (2, 200), (4, 100), (8, 50)])
def test_the_rate_falls_at_half_and_three_quarters(m, total):
    plans = plan_rounds(TrainConfig(num_subnets=m, epochs=400, local_steps=7), 1)
    factors = [factor for plan in plans for factor in plan.rate_factors]
    assert len(factors) == total
    first, second = math.ceil(total / 2), math.ceil(total * 3 / 4)
    assert factors == [1.0] * first + [0.1] * (second - first) + [0.01] * (total - second)


@given(schedules(), st.integers(256, 400), st.integers(1, 20))
def test_the_rate_runs_over_all_phases(phases, epochs, local_steps):
    shares: list[float] = []
    config = TrainConfig(
        num_subnets=phases,
        epochs=epochs,
        local_steps=local_steps,
        schedule=lambda share: shares.append(share) or share,
    )
    plans = plan_rounds(config, 1)
    factors = [factor for plan in plans for factor in plan.rate_factors]
    assert factors == shares
    assert factors[0] == 0.0
    assert all(a < b for a, b in itertools.pairwise(factors))
    assert factors[-1] < 1.0
    before = at = 0
    for share, m in phases:
        assert factors[at] == pytest.approx(before), "a phase starts where its share starts"
        before, at = before + share, at + math.floor(epochs * share / m)


def test_named_schedules():
    assert [learning_rate_factor("constant", s) for s in (0.0, 0.5, 0.9)] == [1.0] * 3
    assert learning_rate_factor("cosine", 0.0) == 1.0
    assert learning_rate_factor("cosine", 0.5) == pytest.approx(0.5)
    assert [learning_rate_factor("step", s) for s in (0.4999, 0.5, 0.7499, 0.75)] == [
        1,
        0.1,
        0.1,
        0.01,
    ]
    assert learning_rate_factor(lambda share: 1 - share, 0.25) == 0.75


@given(schedules(), st.integers(8, 60))
def test_as_many_rounds_as_asked_for(phases, rounds):
    config = TrainConfig(num_subnets=phases, rounds=rounds, local_steps=3)
    try:
        plans = plan_rounds(config, 1)
    except ConfigError:
        assert min(share for share, _ in phases) * rounds < 1
        return
    assert len(plans) == rounds
    assert all(plan.local_steps == 3 for plan in plans)


@pytest.mark.parametrize("rounds", [1, 3, 5])
def test_an_odd_number_of_rounds_in_two_phases(rounds):
    config = TrainConfig(num_subnets=[(0.5, 4), (0.5, 1)], rounds=rounds)
    if rounds == 1:
        with pytest.raises(ConfigError, match="too small"):
            plan_rounds(config, 1)
    else:
        assert len(plan_rounds(config, 1)) == rounds


def test_a_budget_too_small_for_one_step_is_refused():
    with pytest.raises(ConfigError, match=r"too small for a single step.*m=8"):
        plan_rounds(TrainConfig(num_subnets=8, epochs=7), 1)
    assert len(plan_rounds(TrainConfig(num_subnets=8, epochs=8), 1)) == 1
    with pytest.raises(ConfigError, match=r"share 0\.01"):
        plan_rounds(TrainConfig(num_subnets=[(0.99, 2), (0.01, 1)], epochs=50), 1)


def test_a_smoke_run_is_two_steps():
    (plan,) = plan_rounds(TrainConfig(num_subnets=3, epochs=400, fast_dev_run=True), 10)
    assert plan.local_steps == 2
    assert plan.num_subnets == 3
    assert plan.epochs_spent == pytest.approx(2 * 3 / 10)


@pytest.mark.parametrize(
    "bad",
    [
        {"num_subnets": 0},
        {"num_subnets": 2.5},
        {"num_subnets": True},
        {"num_subnets": [(0.5, 4)]},
        {"num_subnets": [(1.5, 4), (-0.5, 1)]},
        {"num_subnets": [(1.0, 2.7)]},
        {"num_subnets": [(1.0, 0)]},
        {"num_subnets": []},
        {"num_subnets": "many"},
        {"local_steps": 0},
        {"epochs": 0},
        {"epochs": float("nan")},
        {"rounds": 0},
        {"epochs": 1, "rounds": 1},
        {"lr": -1},
        {"weight_decay": -1e-3},
        {"optimizer": "adm"},
        {"schedule": "steps"},
        {"optimizer_state": "keep"},
        {"sampler": "uniform"},
        {"seed": 1.5},
        {"checkpoint_every": 2},
    ],
    ids=str,
)
def test_unusable_settings_are_refused(bad):
    with pytest.raises(ConfigError):
        TrainConfig(**bad)


def test_unknown_settings_suggest_the_closest():
    with pytest.raises(ConfigError, match="did you mean 'local_steps'"):
        TrainConfig.from_settings({"local_step": 3})


@pytest.mark.parametrize(("name", "own"), _ELSEWHERE.items())
def test_settings_by_the_names_of_other_libraries_are_told_their_own(name, own):
    with pytest.raises(ConfigError, match=f"^unknown setting '{name}'; remedy: .* '{own}'\\?$"):
        split_settings({name: 3}, TrainConfig, GraphConfig, SampleConfig)


def test_a_setting_that_nothing_is_like_lists_all_there_are():
    with pytest.raises(ConfigError, match="unknown setting 'batch'; expected: one of backend, "):
        TrainConfig.from_settings({"batch": 3})
