"""A run without room is refused before it starts; one with little room is made to fit into it."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from torch_geometric.nn import GCNConv

from gist import ConfigError, Costs, GISTTrainer, estimate_costs, load_dataset
from gist.costs.room import Room
from gist.costs.stage import Stage
from gist.nn import GAT, GCN, GraphSAGE

pytestmark = pytest.mark.xdist_group("room")  # they share plans

FEATURES, CLASSES = 8, 5


def graph(nodes: int) -> Any:
    return load_dataset(
        "csbm",
        num_nodes=nodes,
        num_features=FEATURES,
        num_classes=CLASSES,
        average_degree=6,
        degree_exponent=None,
    )


SMALL, LARGE = graph(300), graph(16_000)


def wide(width: int = 24_576) -> nn.Module:
    """A model of 2.4 GB, of which no page is touched: it is there, and takes no memory."""
    with torch.device("meta"):
        model = GCN(FEATURES, width, CLASSES, 3)
    return model.to_empty(device="cpu")


def many_columns() -> nn.Module:
    return GCN(FEATURES, 512, CLASSES, 3)


# Model, graph, settings; what then takes most; the remedy's words, and itself.
SHORT = {
    "model": (
        wide, SMALL, {"num_subnets": 4, "keep_best": False}, "model",
        "store='disk'", {"store": "disk"},
    ),
    "best model": (
        wide, SMALL, {"num_subnets": 4}, "best_model", "keep_best=False", {"keep_best": False},
    ),
    "carried state": (
        wide, SMALL, {"num_subnets": 4, "optimizer_state": "carry", "keep_best": False},
        "carried_state", "optimizer_state='reset'", {"optimizer_state": "reset"},
    ),
    "optimizer state": (
        wide, SMALL, {"num_subnets": 1, "keep_best": False}, "optimizer_state",
        "more subnets (num_subnets)", {"num_subnets": 4},
    ),
    "activations": (
        many_columns, LARGE, {"num_subnets": 1}, "activations", "clusters=...", {"clusters": 16},
    ),
    "activations of an evaluation": (
        many_columns, LARGE, {"num_subnets": 4, "evaluation": "full"}, "activations",
        "evaluation='layerwise'", {"evaluation": "layerwise"},
    ),
}  # fmt: skip
COMMON = {"executor": "serial", "rounds": 1, "local_steps": 2}


def settings_of(given: dict[str, Any], folder: Any) -> dict[str, Any]:
    return {**COMMON, **given} | ({"out": folder} if given.get("store") == "disk" else {})


def short_limit(costs: Costs, item: str) -> int:
    """A limit that the peak exceeds by half of what takes most in it."""
    return costs.peak_memory_bytes - costs.memory[costs.peak_phase][item] // 2


@cache
def shortage(case: str) -> tuple[int, Costs]:
    """A limit that is too low for a case, and its plan with that limit."""
    build, data, given, item, _, _ = SHORT[case]
    model, settings = build(), {**COMMON, **given}
    limit = short_limit(estimate_costs(model, data, **settings), item)
    return limit, estimate_costs(model, data, memory_limit=limit, **settings)


def numbers(text: str) -> list[str]:
    return re.findall(r"\d[\d.,]* [kMGT]i?B", text)


@pytest.mark.parametrize("case", SHORT)
def test_a_run_that_does_not_fit_is_refused_with_numbers_and_remedies(case):
    build, data, given, item, words, _ = SHORT[case]
    limit, costs = shortage(case)
    model = build()
    before = {name: (t.data_ptr(), t._version) for name, t in model.state_dict().items()}

    def never(trainer: Any, record: Any) -> None:
        raise AssertionError("it was trained")

    with pytest.raises(ConfigError) as raised:
        GISTTrainer(model, data, memory_limit=limit, callbacks=(never,), **COMMON, **given)
    error = raised.value
    assert "does not fit into memory" in error.what
    assert costs.peak_phase in error.got
    named = [part.strip() for part in error.got.partition(":")[2].split(", ")]
    assert item.replace("_", " ") in {re.sub(r" [\d.,]+ \w+$", "", part) for part in named}
    assert all(len(numbers(part)) == 1 for part in named), "each item with its size"
    assert len(numbers(error.expected)) == 1
    assert "memory_limit" in error.expected
    assert words in error.remedy
    assert error.remedy.endswith("a narrower model; a higher memory_limit")
    after = {name: (t.data_ptr(), t._version) for name, t in model.state_dict().items()}
    assert after == before, "nothing was written to the model"


@pytest.mark.parametrize("case", SHORT)
def test_remedies_are_for_what_takes_most_and_help(case, tmp_path):
    build, data, given, item, words, change = SHORT[case]
    limit, costs = shortage(case)
    assert not costs.fits
    sizes = costs.memory[costs.peak_phase]
    assert sizes[item] == max(size for name, size in sizes.items() if name != "process")
    if item != "best_model":  # as large as the model, which comes first
        assert words in costs.remedies[0]
    assert words in " ".join(costs.remedies)
    changed = settings_of({**given, **change}, tmp_path)
    better = estimate_costs(build(), data, memory_limit=limit, **changed)
    # A process has taken what an earlier estimate left behind: some megabytes.
    assert better.peak_memory_bytes < costs.peak_memory_bytes - sizes[item] // 4
    assert words not in " ".join(better.remedies)


def test_a_refused_run_trains_once_a_remedy_is_followed(monkeypatch, tmp_path):
    monkeypatch.setenv("GIST_CACHE", str(tmp_path))
    build, data, given, _, _, change = SHORT["activations"]
    settings, (limit, _) = {**COMMON, **given}, shortage("activations")
    with pytest.raises(ConfigError, match="does not fit into memory"):
        GISTTrainer(build(), data, memory_limit=limit, **settings)
    trainer = GISTTrainer(build(), data, memory_limit=limit, **settings, **change)
    assert trainer.room.needed <= trainer.room.limit == limit
    assert trainer.fit().peak_memory_bytes <= 1.15 * limit


def test_without_a_limit_it_is_what_is_free_that_a_run_must_fit_into(tmp_path):
    with torch.device("meta"):  # subnets of 550 GB
        model = GCN(FEATURES, 2**19, CLASSES, 3)
    with pytest.raises(ConfigError) as raised:
        GISTTrainer(
            model, SMALL, num_subnets=2, store="disk", keep_best=False, rounds=1, out=tmp_path / "r"
        )
    assert "free" in raised.value.expected
    assert "memory_limit" not in str(raised.value)
    assert "more subnets" in raised.value.remedy
    assert not (tmp_path / "r").exists(), "refused before the model's file is made"


SIDE_BY_SIDE = {"rounds": 1, "local_steps": 2, "evaluation": "layerwise"}


@cache
def peaks(m: int) -> tuple[int, int]:
    """Planned peak one at a time, and with all side by side."""
    found = [
        estimate_costs(many_columns(), LARGE, num_subnets=m, executor=executor, **SIDE_BY_SIDE)
        for executor in ("serial", "stacked")
    ]
    assert found[1].stacked_at_once == m
    one, all_of_them = (sum(costs.memory["training"].values()) for costs in found)
    return one, all_of_them


@pytest.mark.parametrize("executor", [pytest.param("stacked", marks=pytest.mark.slow), "auto"])
def test_a_limit_with_room_for_some_side_by_side_trains_that_many(executor):
    one, every = peaks(4)
    limit = (one + every) // 2
    settings = {"num_subnets": 4, "executor": executor, "memory_limit": limit, **SIDE_BY_SIDE}
    planned = estimate_costs(many_columns(), LARGE, **settings)
    assert planned.fits
    assert planned.executor == executor
    trainer = GISTTrainer(many_columns(), LARGE, progress=False, **settings)
    assert 1 < trainer.room.most < 4
    assert abs(trainer.room.most - planned.stacked_at_once) <= 1, "what is in use has changed"
    assert trainer.room.needed <= trainer.room.limit == limit
    assert trainer.executor.name == executor
    result = trainer.fit()
    assert trainer.executor.name in ("stacked", "serial")
    assert executor == "auto" or trainer.executor.name == "stacked"
    assert result.peak_memory_bytes <= 1.15 * limit


def test_fewer_side_by_side_train_the_same_model():
    def train(**settings: Any) -> torch.Tensor:
        torch.manual_seed(0)
        model = GCN(FEATURES, 512, CLASSES, 3, dropout=0.0)
        settings |= {"num_subnets": 4, "optimizer": "sgd", "lr": 0.1, **SIDE_BY_SIDE}
        trainer = GISTTrainer(model, LARGE, **settings)
        trainer.fit()
        assert trainer.executor.name == "stacked"
        return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])

    one, every = peaks(4)
    few = train(executor="stacked", memory_limit=(one + every) // 2)
    torch.testing.assert_close(few, train(executor="stacked"), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("executor", [pytest.param("stacked", marks=pytest.mark.slow), "auto"])
def test_a_limit_with_room_for_one_at_a_time_runs_serially_and_says_so(executor, capsys):
    one, every = peaks(3)
    limit = one + (every - one) // 4
    trainer = GISTTrainer(
        many_columns(),
        LARGE,
        num_subnets=3,
        executor=executor,
        memory_limit=limit,
        **SIDE_BY_SIDE,
    )
    assert trainer.room.most == 1
    assert trainer.executor.name == "serial"
    said = capsys.readouterr().err
    assert re.search(r"serial execution \(.*no room.*side by side\)", said)
    assert trainer.fit().peak_memory_bytes <= 1.15 * limit


@pytest.mark.parametrize("executor", ["serial", "stacked", "auto"])
def test_a_limit_with_room_for_all_limits_nothing(executor):
    _, every = peaks(4)
    trainer = GISTTrainer(
        many_columns(),
        LARGE,
        num_subnets=4,
        executor=executor,
        memory_limit=int(1.1 * every),
        progress=False,
        **SIDE_BY_SIDE,
    )
    assert trainer.room.most is None
    assert trainer.executor.name == executor


def test_an_evaluation_gets_what_the_rest_leaves():
    settings = {"num_subnets": 4, "executor": "serial", "rounds": 1, "local_steps": 2}
    costs = estimate_costs(many_columns(), LARGE, evaluation="full", **settings)
    training = sum(costs.memory["training"].values())
    assert training < costs.peak_memory_bytes, "one pass takes more than a subnet's step"
    limit = (training + costs.peak_memory_bytes) // 2
    trainer = GISTTrainer(many_columns(), LARGE, memory_limit=limit, **settings)
    standing = training - costs.memory["training"]["activations"]
    assert 0 < trainer.room.evaluation < limit - standing // 2
    assert trainer.objective.inference.how == "layerwise"
    assert trainer.fit().peak_memory_bytes <= 1.15 * limit


class Unexpected(Exception):
    """Raised by whatever rehearses."""


@pytest.fixture
def no_rehearsal(monkeypatch):
    def rehearse(self: Stage, device: torch.device) -> None:
        raise Unexpected

    monkeypatch.setattr(Stage, "__init__", rehearse)


@pytest.mark.usefixtures("no_rehearsal")
@pytest.mark.parametrize("limit", [None, "50GB"])
def test_small_runs_pass_without_a_rehearsal(limit):
    trainer = GISTTrainer(
        GCN(FEATURES, 16, CLASSES, 3), SMALL, rounds=1, local_steps=1, memory_limit=limit
    )
    assert isinstance(trainer.room, Room)
    assert trainer.room.most is None
    assert trainer.room.needed <= trainer.room.limit
    assert trainer.fit().history


@pytest.mark.usefixtures("no_rehearsal")
def test_others_are_rehearsed():
    with pytest.raises(Unexpected):
        GISTTrainer(many_columns(), LARGE, rounds=1, memory_limit="1GB")


ROUGHLY = {
    "gcn": lambda: GCN(FEATURES, 512, CLASSES, 3),
    "sage": lambda: GraphSAGE(FEATURES, 512, CLASSES, 6),
    "sage-concat": lambda: GraphSAGE(FEATURES, 512, CLASSES, 3, concat=True, norm="batch"),
    "gat": lambda: GAT(FEATURES, 512, CLASSES, 3, heads=4),
    "gat of many heads": lambda: GAT(FEATURES, 512, CLASSES, 3, heads=64),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n in ("gcn", "gat") else ()) for n in ROUGHLY],
)
def test_a_run_that_is_let_pass_without_a_rehearsal_has_room(name):
    data = graph(2000)
    settings: dict[str, Any] = {
        "num_subnets": [(0.5, 2), (0.5, 1)],
        "rounds": 2,
        "optimizer_state": "carry",
        "evaluation": "full",
        "memory_limit": "10TB",
    }
    trainer = GISTTrainer(ROUGHLY[name](), data, **settings)
    costs = estimate_costs(ROUGHLY[name](), data, **settings)
    assert costs.peak_memory_bytes <= 2 * trainer.room.needed, "the least limit that lets it pass"


class Picky(nn.Module):
    """Its hidden layer has as many rows as there are positive values: unknown without data."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = GCNConv(FEATURES, width)
        self.conv2 = GCNConv(width, CLASSES)

    def forward(self, x: torch.Tensor, edge_index: torch.Tensor) -> torch.Tensor:
        out = self.conv2(torch.relu(self.conv1(x, edge_index)), edge_index)
        return out * (1.0 if bool((x > 0).any()) else 0.5)


def test_a_model_that_cannot_be_rehearsed_is_trained_all_the_same():
    settings = {"num_subnets": 2, "rounds": 1, "local_steps": 1, "wiring": ["conv1", "conv2"]}
    model, limit = Picky(512), 2**31
    with pytest.raises(ConfigError, match="cannot be told without data"):
        estimate_costs(model, LARGE, **settings)
    trainer = GISTTrainer(model, LARGE, memory_limit=limit, **settings)
    assert trainer.room == Room(needed=None, limit=limit)
    assert trainer.fit().history
