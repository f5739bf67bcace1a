"""The clock of a federated run: what happens when."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gist.errors import ConfigError
from gist.federated.fleet import FLEETS, ClientProfile, Fleet, make_fleet
from gist.federated.timeline import Cost, Protocol, Timeline, simulate


def run(
    fleet: Fleet,
    *,
    in_flight: int = 3,
    per_merge: int = 1,
    synchronous: bool = False,
    timeout: float | None = None,
    seed: int = 0,
    merges: int | None = 20,
    duration: float | None = None,
) -> Timeline:
    def cost(request):
        return Cost(seconds=fleet.profiles[request.client].step_seconds * 10, download=7, upload=5)

    return simulate(
        fleet,
        Protocol(
            in_flight=in_flight, per_merge=per_merge, synchronous=synchronous, timeout=timeout
        ),
        cost,
        capacities=[1.0] * len(fleet),
        rate=lambda share: 1 - share,
        seed=seed,
        merges=merges,
        duration=duration,
    )


def answers(line: Timeline, clients: int) -> list[int]:
    """How many answers of each client were merged."""
    merged = [line.tasks[number].request.client for each in line.merged for number in each]
    return [merged.count(client) for client in range(clients)]


fleets = st.builds(
    lambda steps, available, lost, repeated, corrupt: Fleet(
        profiles=tuple(
            ClientProfile(step_seconds=s, available=available, period=50.0) for s in steps
        ),
        lost=lost,
        repeated=repeated,
        corrupt=corrupt,
    ),
    st.lists(st.sampled_from([0.5, 1.0, 1.7, 4.0]), min_size=3, max_size=12),
    st.sampled_from([0.3, 1.0]),
    st.sampled_from([0.0, 0.3]),
    st.sampled_from([0.0, 0.2]),
    st.sampled_from([0.0, 0.2]),
)


@settings(deadline=None, max_examples=60)
@given(
    fleets,
    st.integers(1, 3),
    st.integers(1, 3),
    st.booleans(),
    st.sampled_from([None, 12.0]),
    st.integers(0, 5),
)
def test_what_every_course_keeps_true(fleet, in_flight, per_merge, synchronous, timeout, seed):
    per_merge = 1 if synchronous else per_merge
    given = {
        "in_flight": in_flight,
        "per_merge": per_merge,
        "synchronous": synchronous,
        "timeout": timeout,
        "seed": seed,
    }
    try:
        line = run(fleet, **given, merges=None, duration=400.0)
    except ConfigError:  # nobody answers in time
        assert timeout is not None or fleet.lost
        return
    assert line == run(fleet, **given, merges=None, duration=400.0)
    times = [merge.time for merge in line.merges]
    assert times == sorted(times)
    assert times[-1] <= 400.0
    for index, merge in enumerate(line.merges):
        sound = line.merged[index]
        assert 1 <= len(sound) <= in_flight if synchronous else len(sound) == per_merge
        assert set(sound) <= set(merge.tasks)
        for number in merge.tasks:
            task = line.tasks[number]
            assert task.request.merges <= index
            assert task.finish <= merge.time
    for number, task in enumerate(line.tasks):
        assert task.number == number
        assert task.start < task.finish
        if number in line.merged_at:
            assert line.staleness(number) >= 0
            assert task.fate != "lost"
    for moment in {task.start for task in line.tasks}:
        at_work = [t.request.client for t in line.tasks if t.start <= moment < t.finish]
        assert len(at_work) == len(set(at_work)) <= in_flight
    assert sum(line.staleness_counts().values()) == len(line.merged_at)
    sound = [n for n in line.merged_at if line.tasks[n].fate != "corrupt"]
    assert sorted(n for merged in line.merged for n in merged) == sorted(sound)


def test_tasks_of_a_client_are_numbered_in_order():
    line = run(Fleet.uniform(4), merges=30)
    for client in range(4):
        own = [task.request.own for task in line.tasks if task.request.client == client]
        assert own == list(range(len(own)))


def test_a_cohort_waits_for_its_slowest():
    line = run(Fleet.lognormal(10), in_flight=4, synchronous=True, merges=5)
    start = 0.0
    for index, merge in enumerate(line.merges):
        cohort = [line.tasks[n] for n in line.started[index]]
        assert len(cohort) == 4
        assert {task.start for task in cohort} == {start}
        assert merge.time == max(task.finish for task in cohort)
        assert line.staleness(merge.tasks[0]) == 0
        start = merge.time


def test_staleness_of_one_at_a_time_is_zero_and_of_equal_clients_their_number_less_one():
    assert set(run(Fleet.uniform(5), in_flight=1).staleness_counts()) == {0}
    line = run(Fleet.uniform(8), in_flight=4, merges=40)
    late = [line.staleness(merge.tasks[0]) for merge in line.merges[4:]]
    assert set(late) == {3}


def test_fast_clients_answer_more_often():
    fleet = Fleet(profiles=tuple(ClientProfile(step_seconds=s) for s in (1.0, 4.0)))
    line = run(fleet, in_flight=2, merges=None, duration=400.0)
    assert answers(line, 2) == [40, 10]


def test_a_lost_client_gives_its_place_away_and_a_repeated_answer_counts_once():
    profiles = (ClientProfile(),) * 6
    line = run(Fleet(profiles=profiles, lost=0.4, repeated=0.4), merges=60)
    ended = [number for merge in line.merges for number in merge.tasks]
    lost = [n for n in ended if line.tasks[n].fate == "lost"]
    twice = [n for n in set(ended) if ended.count(n) == 2]
    assert lost
    assert twice
    assert all(line.tasks[n].finish - line.tasks[n].start == 20.0 for n in lost)
    assert all(line.tasks[n].fate == "repeated" for n in twice)
    assert len(line.merged_at) == 60


def test_a_timeout_gives_up_those_that_are_slower():
    fleet = Fleet(profiles=tuple(ClientProfile(step_seconds=s) for s in (1.0, 1.0, 9.0)))
    line = run(fleet, synchronous=True, timeout=15.0, merges=6)
    assert {task.fate for task in line.tasks if task.request.client == 2} == {"lost"}
    assert {merge.time for merge in line.merges} == {15.0 * i for i in range(1, 7)}
    assert answers(line, 3) == [6, 6, 0]


@pytest.mark.parametrize("budget", ["merges", "duration"])
def test_a_timeout_that_nobody_keeps_is_refused(budget):
    given = {"merges": 3} if budget == "merges" else {"merges": None, "duration": 1e6}
    with pytest.raises(ConfigError, match="1,000 tasks in a row none has a sound answer in time"):
        run(Fleet.uniform(4), timeout=1.0, **given)


def test_the_rate_is_that_of_the_merges_that_were_done():
    for synchronous in (True, False):
        line = run(Fleet.uniform(1), in_flight=1, synchronous=synchronous, merges=4)
        assert [task.rate for task in line.tasks[:4]] == [1.0, 0.75, 0.5, 0.25]


@settings(deadline=None, max_examples=30)
@given(
    st.lists(
        st.builds(
            ClientProfile,
            step_seconds=st.sampled_from([0.3, 1.0]),
            available=st.sampled_from([0.2, 0.5, 1.0]),
            period=st.sampled_from([50.0, 170.0, 1000.0]),
        ),
        min_size=2,
        max_size=6,
    ),
    st.integers(0, 5),
)
def test_nobody_who_is_there_and_idle_waits_while_there_is_room(profiles, seed):
    fleet = Fleet(profiles=tuple(profiles))
    try:
        line = run(fleet, in_flight=2, seed=seed, merges=None, duration=600.0)
    except ConfigError:  # nobody was there in time
        return
    for moment in range(600):
        at_work = {t.request.client for t in line.tasks if t.start <= moment < t.finish}
        idle = set(range(len(fleet))) - at_work
        here = [c for c in idle if fleet.next_available(c, moment, seed) == moment]
        assert len(at_work) == 2 or not here


def test_clients_are_sent_work_when_they_are_there():
    fleet = Fleet(profiles=(ClientProfile(available=0.25, period=100.0),) * 5)
    line = run(fleet, in_flight=2, merges=15)
    for task in line.tasks:
        waited = fleet.next_available(task.request.client, task.start, seed=0)
        assert waited == pytest.approx(task.start)
    assert line.merges[-1].time > 75.0  # five clients at a quarter of the time: the clock waits


def test_the_rate_is_led_by_the_fastest_under_way():
    fleet = Fleet(profiles=tuple(ClientProfile(step_seconds=s) for s in (1.0, 3.3)))
    line = run(fleet, in_flight=2, merges=None, duration=100.0)
    changes = [task.start for task in line.tasks if task.rate < 1]
    for task in line.tasks:
        fast = [t.finish for t in line.tasks if t.request.client == 0 and t.finish <= task.start]
        assert task.rate == pytest.approx(1 - max(fast, default=0.0) / 100.0, abs=1e-8)
    assert changes


def test_the_budget_ends_the_run():
    assert len(run(Fleet.uniform(5), merges=7).merges) == 7
    line = run(Fleet.uniform(5), merges=None, duration=35.0)
    assert line.merges[-1].time == 30.0
    with pytest.raises(ConfigError, match="within the budget"):
        run(Fleet.uniform(5), merges=None, duration=9.0)


@pytest.mark.parametrize("name", sorted(FLEETS))
def test_fleets_by_name(name):
    fleet = make_fleet(name, 50, seed=3)
    assert fleet == make_fleet(name, 50, seed=3)
    assert sorted(fleet.ranks()) == list(range(50))
    steps = [fleet.profiles[fleet.ranks().index(rank)].step_seconds for rank in range(50)]
    assert steps == sorted(steps)


def test_the_clock_of_the_authors():
    fleet = Fleet.asyncdrop(16)
    assert [profile.step_seconds for profile in fleet.profiles[:8]] == [
        0.25 * (rank + 1) for rank in range(8)
    ]
    assert not fleet.counts_operations
    assert all(math.isinf(profile.upload) for profile in fleet.profiles)


def test_fates_come_as_often_as_they_should():
    fleet = dataclasses.replace(Fleet.uniform(1), lost=0.2, repeated=0.1, corrupt=0.3)
    fates = [fleet.fate(0, task) for task in range(2000)]
    for name, share in (("lost", 0.2), ("repeated", 0.1), ("corrupt", 0.3), ("returned", 0.4)):
        assert fates.count(name) / 2000 == pytest.approx(share, abs=0.04)


@pytest.mark.parametrize(
    "wrong",
    [
        {"step_seconds": 0.0},
        {"upload": -1.0},
        {"available": 0.0},
        {"period": 0.0},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_profiles_that_cannot_be(wrong):
    with pytest.raises(ConfigError):
        ClientProfile(**wrong)


def test_fleets_that_cannot_be():
    with pytest.raises(ConfigError, match="needs a client"):
        Fleet(profiles=())
    with pytest.raises(ConfigError, match="probabilities"):
        Fleet(profiles=(ClientProfile(),), lost=0.7, corrupt=0.7)
    with pytest.raises(ConfigError, match="another number"):
        make_fleet(Fleet.uniform(3), 4, seed=0)
    with pytest.raises(ConfigError, match="unknown fleet"):
        make_fleet("fast", 4, seed=0)
