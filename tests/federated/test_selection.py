"""Selections: what each keeps true whatever the request, and what makes it the one that it is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gist import partition_spec
from gist.errors import ConfigError, PartitionError
from gist.federated.selection import (
    SELECTIONS,
    AdaptiveDropout,
    FederatedPruning,
    FedSelect,
    Helios,
    HeteroDrop,
    NestedPrefix,
    PartialTensors,
    Prefix,
    PruneFL,
    Request,
    Rolling,
    Selection,
    UniformDrop,
)
from gist.nn import MLP
from gist.partition.assignment import Assignment
from gist.partition.parts import Part
from gist.partition.scores import ranked, unit_changes, unit_norms
from gist.partition.spec import PartitionSpec, model_tensors
from gist.partition.transfer import extract

VARIANTS: list[Selection] = [
    *(kind() for kind in SELECTIONS.values()),
    Rolling(by="turns", step=None),
    FedSelect(shared=True),
    AdaptiveDropout(per_client=False),
    FederatedPruning(sparsity=0.9, until=1.0),
    PruneFL(every=2),
]
each_selection = pytest.mark.parametrize("selection", VARIANTS, ids=repr)


@dataclass
class Server:
    """The global model of a server, and as it was at the start."""

    spec: PartitionSpec
    now: dict[str, Tensor]
    first: dict[str, Tensor]

    @classmethod
    def of(cls, *widths: int, seed: int = 0) -> Server:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = MLP(4, list(widths), 3, num_layers=len(widths) + 1, norm=None)
        first = {name: t.detach().clone() for name, t in model_tensors(model).items()}
        generator = torch.Generator().manual_seed(seed)
        now = {n: t + torch.randn(t.shape, generator=generator) for n, t in first.items()}
        return cls(partition_spec(model), now, first)

    def tensors_now(self) -> Mapping[str, Tensor]:
        return self.now

    def initial(self) -> Mapping[str, Tensor]:
        return self.first


@dataclass
class Report:
    part: Part
    losses: tuple[float, float] = (1.0, 0.5)


def request(**known: Any) -> Request:
    base = {"client": 3, "task": 0, "own": 0, "merges": 0, "capacity": 0.5, "rank": 0}
    return Request(**{**base, "num_ranks": 10, "progress": 0.0, "seed": 0, **known})


def answer(
    server: Server,
    units: Mapping[str, Tensor],
    *,
    moves: Mapping[str, Tensor] | None = None,
    losses: tuple[float, float] = (1.0, 0.5),
) -> Report:
    """What comes back of these units: each weight of a unit of ``hidden.0`` moved by its number."""
    held = {group: (mine,) for group, mine in units.items()}
    deal = Assignment(round=0, sizes=server.spec.sizes, held=held)
    start = extract(server.now, server.spec, deal, 0)
    end = {name: tensor.clone() for name, tensor in start.items()}
    if moves is not None:
        end["linears.0.weight"] += moves["hidden.0"][units["hidden.0"], None]
    return Report(Part(assignment=deal, tensors=end, start=start), losses)


@st.composite
def requests(draw: st.DrawFn) -> Request:
    ranks = draw(st.integers(1, 200))
    return request(
        client=draw(st.integers(0, 99)),
        task=draw(st.integers(0, 10**6)),
        own=draw(st.integers(0, 10**4)),
        merges=draw(st.integers(0, 10**6)),
        capacity=draw(st.sampled_from([0.0625, 0.1, 0.25, 0.3, 0.5, 0.7, 0.75, 0.9, 1.0])),
        rank=draw(st.integers(0, ranks - 1)),
        num_ranks=ranks,
        progress=draw(st.floats(0, 1)),
        seed=draw(st.integers(0, 2**40)),
    )


@each_selection
@settings(max_examples=10)
@given(asked=requests(), widths=st.lists(st.integers(1, 33), min_size=1, max_size=2))
def test_units_are_ascending_in_range_and_as_many_as_counted(selection, asked, widths):
    server, state = Server.of(*widths), {}
    sizes = server.spec.sizes
    for turn in range(3):
        now = replace(
            asked, task=asked.task + turn, own=asked.own + turn, merges=asked.merges + turn
        )
        units = selection.select(sizes, now, server, state)
        again = selection.select(sizes, now, server, state)
        assert list(units) == list(sizes)
        for group, size in sizes.items():
            mine = units[group]
            assert mine.dtype == torch.int64
            assert torch.equal(mine, again[group]), "the same request, view and state"
            assert 1 <= mine.numel() == selection.count(size, now) <= size
            assert bool((mine[1:] > mine[:-1]).all())
            assert int(mine[0]) >= 0
            assert int(mine[-1]) < size
            if isinstance(selection, Prefix):
                assert torch.equal(mine, torch.arange(mine.numel()))
        random = torch.Generator().manual_seed(turn)
        moves = {"hidden.0": torch.rand(sizes["hidden.0"], generator=random)}
        losses = (1.0, 0.5 + 0.1 * int(torch.randint(9, (), generator=random)))
        selection.observe(now, answer(server, units, moves=moves, losses=losses), server, state)
    assert all(isinstance(key, str) and isinstance(t, Tensor) for key, t in state.items())


@each_selection
@settings(max_examples=10)
@given(asked=requests())
def test_the_global_random_state_plays_no_role(selection, asked):
    server, found = Server.of(20), []
    with torch.random.fork_rng():
        for seed in range(2):
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            found.append(selection.select(server.spec.sizes, asked, server, {})["hidden.0"])
            assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*found)


@each_selection
@settings(max_examples=10)
@given(asked=requests())
def test_a_client_of_full_capacity_is_sent_everything(selection, asked):
    server = Server.of(7, 12)
    units = selection.select(server.spec.sizes, replace(asked, capacity=1.0), server, {})
    if not isinstance(selection, NestedPrefix | FederatedPruning):  # narrow by themselves
        assert all(torch.equal(units[g], torch.arange(n)) for g, n in server.spec.sizes.items())


@each_selection
@settings(max_examples=10)
@given(asked=requests(), size=st.integers(1, 10**6))
def test_counts_and_uploads_are_functions_of_the_request(selection, asked, size):
    count = selection.count(size, asked)
    assert 1 <= count <= size
    if not isinstance(selection, PartialTensors):
        assert count <= max(1, math.ceil(asked.capacity * size))
    assert 0 < selection.uploaded(asked) <= 1


@pytest.mark.parametrize(
    ("size", "capacity", "up", "nearest"),
    [
        (100, 0.07, 7, 7),  # 0.07 * 100 is a little more than 7
        (10, 0.9, 9, 9),  # (1 - 0.9) * 10 a little less than 1
        (10, 0.25, 3, 3),
        (9, 0.25, 3, 2),
        (16, 0.75, 12, 12),
        (5, 0.01, 1, 1),
        (1, 1.0, 1, 1),
    ],
)
def test_shares_are_rounded_as_their_decimals(size, capacity, up, nearest):
    asked = request(capacity=capacity)
    assert Prefix().count(size, asked) == up
    assert HeteroDrop().count(size, asked) == size - math.floor((1 - capacity) * size + 1e-9)
    assert FedSelect().count(size, asked) == nearest


@given(st.integers(2, 40), st.integers(1, 60), st.sampled_from([0.25, 0.5, 0.75, 0.9]), st.data())
def test_fast_clients_drop_what_moved_most_and_slow_ones_train_it(size, ranks, capacity, data):
    server = Server.of(size, seed=data.draw(st.integers(0, 99)))
    order = ranked(unit_changes(server.now, server.first, server.spec)["hidden.0"]).tolist()
    first_dropped = []
    for rank in range(ranks):
        asked = request(rank=rank, num_ranks=ranks, capacity=capacity)
        held = HeteroDrop().select(server.spec.sizes, asked, server, {})["hidden.0"].tolist()
        places = [place for place, unit in enumerate(order) if unit not in held]
        assert len(places) == size - HeteroDrop().count(size, asked)
        if places:
            assert places == list(range(places[0], places[-1] + 1)), "one window"
            first_dropped.append(places[0])
    if first_dropped:
        dropped = size - HeteroDrop().count(size, request(capacity=capacity))
        expected = [min(rank * size // ranks, size - dropped) for rank in range(ranks)]
        assert first_dropped == expected
        assert first_dropped[0] == 0, "the fastest drops what moved most"


def test_the_slowest_of_many_drops_what_moved_least():
    server = Server.of(16)
    order = ranked(unit_changes(server.now, server.first, server.spec)["hidden.0"])
    for rank, dropped in ((0, order[:4]), (103, order[-4:])):
        asked = request(rank=rank, num_ranks=104, capacity=0.75)
        held = HeteroDrop().select(server.spec.sizes, asked, server, {})["hidden.0"]
        assert set(held.tolist()).isdisjoint(dropped.tolist())


def test_more_clients_than_units_do_not_all_drop_the_same():
    """Places that are ``rank * int(n / R)`` would all be 0."""
    server, kept = Server.of(16), set()
    for rank in range(104):
        asked = request(rank=rank, num_ranks=104, capacity=0.75)
        held = HeteroDrop().select(server.spec.sizes, asked, server, {})["hidden.0"]
        kept.add(tuple(held.tolist()))
    assert len(kept) == 13  # windows of 4 out of 16


def test_random_units_are_uniform_and_anew_for_every_task():
    server, counts = Server.of(10), torch.zeros(10)
    tasks = 2000
    for task in range(tasks):
        asked = request(task=task, capacity=0.3)
        counts[UniformDrop().select(server.spec.sizes, asked, server, {})["hidden.0"]] += 1
    share = counts / tasks
    assert (share - 0.3).abs().max() < 5 * math.sqrt(0.3 * 0.7 / tasks)


def test_keys_may_be_shared_by_a_cohort_and_are_then_nested():
    sizes, server = {"hidden.0": 20}, Server.of(20)

    def keys(selection: Selection, **known: Any) -> set[int]:
        return set(selection.select(sizes, request(**known), server, {})["hidden.0"].tolist())

    cohort = [
        keys(FedSelect(shared=True), task=t, merges=7, capacity=(t + 1) / 5) for t in range(5)
    ]
    assert all(a < b for a, b in itertools.pairwise(cohort))
    assert keys(FedSelect(shared=True), merges=8) != keys(FedSelect(shared=True), merges=7)
    assert keys(FedSelect(), task=1) != keys(FedSelect(), task=2)


@given(requests(), requests())
def test_prefixes_are_nested(one, other):
    for selection in (Prefix(), NestedPrefix()):
        server = Server.of(30)
        units = [
            set(selection.select(server.spec.sizes, asked, server, {})["hidden.0"].tolist())
            for asked in (one, other)
        ]
        assert units[0] <= units[1] or units[1] <= units[0]


def test_nested_widths_are_uniform_over_levels_up_to_the_clients():
    selection, drawn = NestedPrefix(levels=(0.2, 0.4, 0.6, 0.8, 1.0)), []
    for task in range(2000):
        asked = request(task=task, capacity=0.6)
        drawn.append(selection.width(asked))
        assert selection.count(10, asked) == round(10 * drawn[-1])
        assert selection.count(50, asked) == round(50 * drawn[-1]), "all groups have one width"
    for level in (0.2, 0.4, 0.6):
        assert abs(drawn.count(level) / 2000 - 1 / 3) < 0.06
    assert set(drawn) == {0.2, 0.4, 0.6}
    assert selection.width(request(capacity=0.1)) == 0.1


@given(st.integers(1, 40), st.sampled_from([0.1, 0.25, 0.3, 0.5, 0.75]), st.integers(0, 500))
def test_windows_roll_over_every_unit(size, capacity, begin):
    server, known = Server.of(size), {"capacity": capacity}
    width = Rolling().count(size, request(capacity=capacity))

    def covered(selection: Rolling, turns: int) -> Tensor:
        found = torch.zeros(size, dtype=torch.int64)
        for turn in range(begin, begin + turns):
            known[{"merges": "merges", "turns": "own"}[selection.by]] = turn
            found[
                selection.select(server.spec.sizes, request(**known), server, {})["hidden.0"]
            ] += 1
        return found

    turns = math.ceil(size / width)
    assert covered(Rolling(by="turns", step=None), turns).min() >= 1
    assert covered(Rolling(by="turns"), size - width + 1).min() >= 1
    assert covered(Rolling(), size).unique().tolist() == [width], "all equally often"


def test_a_window_is_that_of_the_paper():
    server = Server.of(5)
    asked = request(merges=4, own=99, capacity=0.6)
    assert Rolling().select(server.spec.sizes, asked, server, {})["hidden.0"].tolist() == [0, 1, 4]


def run(selection: Selection, server: Server, losses: Iterable[float], **known: Any) -> list[list]:
    """Units of ``hidden.0``, task by task of one client, and what it remembers."""
    state: dict[str, Tensor] = {}
    out = []
    for turn, loss in enumerate(losses):
        asked = request(task=turn, own=turn, merges=turn, **known)
        units = selection.select(server.spec.sizes, asked, server, state)
        selection.observe(asked, answer(server, units, losses=(loss, loss)), server, state)
        out.append([units["hidden.0"].tolist(), {k: t.clone() for k, t in state.items()}])
    return out


def test_units_are_kept_while_the_loss_falls():
    (one, _), (two, _), (three, scores), (four, _), (five, last) = run(
        AdaptiveDropout(), Server.of(40), [2.0, 1.0, 0.5, 0.7, 0.8]
    )
    assert one != two, "a first loss is none that fell"
    assert two == three == four
    assert five != four
    expected = torch.ones(40, dtype=torch.float64)
    expected[two] += 0.5 + 0.5
    torch.testing.assert_close(scores["3.scores/hidden.0"], expected)
    assert last["3.loss"].item() == 0.8


def test_losses_from_zero_down_do_not_break_the_scores():
    *_, (units, state) = run(AdaptiveDropout(), Server.of(40), [0.5, 0.0, -1.0, -1e300])
    scores = state["3.scores/hidden.0"]
    assert scores[units].tolist() == [4.0] * len(units), "each fall counts 1 at most"


def test_units_are_drawn_by_their_scores():
    server, count = Server.of(10), torch.zeros(10)
    scores = torch.ones(10, dtype=torch.float64)
    scores[7] = 9.0
    for task in range(600):
        asked = request(task=task, capacity=0.1)
        state = {"3.scores/hidden.0": scores}
        count[AdaptiveDropout().select(server.spec.sizes, asked, server, state)["hidden.0"]] += 1
    assert abs(float(count[7]) / 600 - 0.5) < 0.11


def test_clients_do_not_share_what_they_learnt_unless_they_are_to():
    server, losses = Server.of(40), [2.0, 1.0]
    for per_client in (True, False):
        selection = AdaptiveDropout(per_client=per_client)
        *_, (units, state) = run(selection, server, losses, client=3)
        asked = request(client=4, task=9)
        other = selection.select(server.spec.sizes, asked, server, state)["hidden.0"].tolist()
        assert (other == units) is not per_client


def test_helios_trains_what_moved_most_and_leaves_out_nothing_for_long():
    server, size, state = Server.of(20), 20, {}
    selection, moves = Helios(core=0.5, patience=2.0), {"hidden.0": torch.arange(20.0)}
    last_trained = torch.zeros(size, dtype=torch.int64)
    times = torch.zeros(size, dtype=torch.int64)
    for turn in range(60):
        asked = request(task=turn, own=turn, capacity=0.25)
        units = selection.select(server.spec.sizes, asked, server, state)
        times[units["hidden.0"]] += 1
        last_trained[units["hidden.0"]] = turn
        assert (turn - last_trained).max() <= 2 * 4 + 4, "2/p turns, and a few for the queue"
        selection.observe(asked, answer(server, units, moves=moves), server, state)
        if turn >= 20:  # by then each was trained once
            assert torch.equal(state["3.idle/hidden.0"], turn - last_trained)
    assert times[-2:].min() > times[:10].max(), "the core"
    moved = state["3.moved/hidden.0"]
    torch.testing.assert_close(
        moved, 4.0 * torch.arange(20, dtype=torch.float64), rtol=1e-5, atol=1e-5
    )


def test_helios_begins_at_random():
    server = Server.of(40)
    firsts = {
        tuple(Helios().select(server.spec.sizes, request(task=t), server, {})["hidden.0"].tolist())
        for t in range(5)
    }
    assert len(firsts) == 5


@pytest.mark.parametrize("selection", [Helios(), PruneFL()], ids=repr)
def test_learning_from_updates_needs_what_was_sent(selection):
    server = Server.of(10)
    units = selection.select(server.spec.sizes, request(), server, {})
    report = answer(server, units)
    report.part = replace(report.part, start=None)
    assert selection.needs_start
    with pytest.raises(PartitionError, match="needs what was sent"):
        selection.observe(request(), report, server, {})


def test_pruning_keeps_the_largest_norms_ever_fewer_of_them():
    server, selection = Server.of(32), FederatedPruning(sparsity=0.75, until=0.5)
    order = ranked(unit_norms(server.now, server.spec)["hidden.0"]).tolist()
    counts = []
    for progress in (0.0, 0.1, 0.25, 0.5, 0.9):
        asked = request(progress=progress, capacity=1.0)
        units = selection.select(server.spec.sizes, asked, server, {})["hidden.0"].tolist()
        assert units == sorted(order[: len(units)])
        counts.append(len(units))
    assert counts[0] == 32
    assert counts[3:] == [8, 8]
    assert counts == sorted(counts, reverse=True)
    assert selection.count(32, request(capacity=0.1, progress=0.0)) == 4, (
        "a client's capacity holds"
    )


def test_the_set_of_prunefl_is_one_and_made_anew_by_squared_gradients():
    server, selection, state = Server.of(12), PruneFL(every=4), {}
    moves = {"hidden.0": torch.tensor([1.0, 5, 2, 9, 3, 8, 4, 7, 6, 0.5, 10, 0.1])}
    sets = []
    for merge in range(16):
        asked = [request(client=c, task=2 * merge + c, merges=merge, own=merge) for c in range(2)]
        units = [selection.select(server.spec.sizes, one, server, state) for one in asked]
        assert torch.equal(units[0]["hidden.0"], units[1]["hidden.0"]), "one for all"
        sets.append(set(units[0]["hidden.0"].tolist()))
        for one, mine in zip(asked, units, strict=True):
            selection.observe(one, answer(server, mine, moves=moves), server, state)
    changes = [n for n in range(1, 16) if sets[n] != sets[n - 1]]
    assert set(changes) <= {5, 9, 13}, "a set stays until updates of the next period come"
    assert sets[5].isdisjoint(sets[0]), "what was never seen comes first"
    assert sets[13] == set(ranked(moves["hidden.0"])[:6].tolist())
    best = selection.select(server.spec.sizes, request(capacity=0.1), server, state)["hidden.0"]
    assert best.tolist() == [3, 10], "a smaller client holds the first of the same"


def test_prunefl_keeps_what_it_knew_of_units_that_nobody_held():
    server, selection, state = Server.of(6), PruneFL(every=1), {}
    moves, inf = {"hidden.0": torch.arange(1.0, 7.0)}, math.inf
    expected = torch.full((6,), inf, dtype=torch.float64)
    for merge, held in enumerate([[0, 1], [1, 3], [4]]):
        report = answer(server, {"hidden.0": torch.tensor(held)}, moves=moves)
        selection.observe(request(merges=merge), report, server, state)
        if merge:
            torch.testing.assert_close(state["scores/hidden.0"], expected, rtol=1e-5, atol=1e-5)
        for unit in held:
            expected[unit] = 4 * (unit + 1) ** 2  # four weights of each moved by its number
    assert state["scores/hidden.0"].isinf().tolist() == [False, False, True, False, True, True]


@given(requests(), st.integers(1, 60))
def test_some_tensors_are_trained_and_all_units_sent(asked, number):
    names, selection = [f"layer.{i}" for i in range(number)], PartialTensors()
    chosen = selection.trained(names, asked)
    assert chosen <= set(names)
    assert len(chosen) == max(1, math.floor(asked.capacity * number + 0.5))
    assert chosen == selection.trained(reversed(names), asked), "in whatever order"
    server = Server.of(6)
    assert selection.select(server.spec.sizes, asked, server, {})["hidden.0"].numel() == 6
    assert Prefix().trained(names, asked) == set(names)


def test_tensors_are_drawn_uniformly():
    names, times = [f"w{i}" for i in range(8)], dict.fromkeys([f"w{i}" for i in range(8)], 0)
    for task in range(2000):
        for name in PartialTensors().trained(names, request(task=task, capacity=0.25)):
            times[name] += 1
    assert all(abs(count / 2000 - 0.25) < 0.05 for count in times.values())


@dataclass(frozen=True)
class Wrong(Selection):
    """Gives other units than it counted."""

    units: list[int] = field(default_factory=list)

    def choose(self, widths, request, view, state):
        return {group: torch.tensor(self.units) for group in widths}


@pytest.mark.parametrize("units", [[0, 1], [0, 1, 1], [0, 1, 2, 3]], ids=str)
def test_a_selection_must_choose_as_many_as_it_counts(units):
    server = Server.of(6)
    with pytest.raises(PartitionError, match=r"Wrong\.choose must give as many"):
        Wrong(units).select(server.spec.sizes, request(), server, {})


def test_names_are_short_and_every_class_has_one():
    assert all(name == name.lower() and " " not in name for name in SELECTIONS)
    assert len(set(SELECTIONS.values())) == len(SELECTIONS) == 11


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (NestedPrefix, {"levels": ()}),
        (NestedPrefix, {"levels": (0.5, 1.5)}),
        (Rolling, {"by": "rounds"}),
        (Rolling, {"step": 0}),
        (Helios, {"core": 1.5}),
        (Helios, {"patience": 0.5}),
        (Helios, {"patience": math.nan}),
        (FederatedPruning, {"sparsity": 1.0}),
        (FederatedPruning, {"until": 0.0}),
        (FederatedPruning, {"p": 0.5}),
        (PruneFL, {"every": 0}),
        (request, {"capacity": 0.0}),
        (request, {"capacity": math.nan}),
        (request, {"rank": 10}),
        (request, {"progress": 1.5}),
        (request, {"client": -1}),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else value.__name__,
)
def test_what_is_out_of_range_is_refused(kind, settings):
    with pytest.raises(ConfigError):
        kind(**settings)
