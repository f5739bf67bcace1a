"""Any number of workers gives the same bits, and sends the bytes that the formula says."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from gist import estimate_costs
from gist.costs.exchange import Traffic
from gist.partition.spec import model_tensors
from tests.workers import equal
from tests.workers.equal import CASES, DATA, MODELS, make
from tests.workers.spawn import run_workers

Runs = dict[str, dict[str, Any]]

pytestmark = pytest.mark.xdist_group("workers")  # they share runs

SLOW = pytest.mark.slow
WORKERS = [pytest.param(1, marks=SLOW), 2, 3, pytest.param(4, marks=SLOW)]


@pytest.fixture(scope="module")
def alone() -> Runs:
    """What one process gets."""
    found: Runs = json.loads(json.dumps({name: equal.outcome(name) for name in CASES}))
    return found


@pytest.fixture(scope="module")
def on(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Runs]:
    """What so many workers get; each number is run once."""

    @cache
    def runs(workers: int) -> Runs:
        path = tmp_path_factory.mktemp("equal") / "out.json"
        run_workers("equal.py", str(path), workers=workers)
        found: Runs = json.loads(path.read_text())
        return found

    return runs


@pytest.mark.parametrize("workers", WORKERS)
def test_weights_and_history_are_those_of_one_process(
    alone: Runs, on: Callable[[int], Runs], workers: int
):
    got = on(workers)
    assert got.keys() == alone.keys()
    for key in ("weights", "rounds", "best", "scores"):
        assert [name for name in alone if got[name][key] != alone[name][key]] == []
    assert len({each["weights"] for each in got.values()}) == len(got), "cases are different runs"


@pytest.mark.parametrize("workers", WORKERS)
def test_counted_bytes_equal_the_formula(on: Callable[[int], Runs], workers: int):
    for name, found in on(workers).items():
        run = make(name)
        trained = {n: t.element_size() for n, t in run.model.named_parameters()}
        moments = 1 if run.config.optimizer == "sgd" else 2
        state = {n: moments * size + 1 for n, size in trained.items()}
        traffic = Traffic(
            run.spec,
            {n: t.element_size() for n, t in model_tensors(run.model).items()},
            workers=workers,
            state_bytes=state if run.config.optimizer_state == "carry" else None,
            counts_steps=moments == 2,
        )
        for plan in run.rounds:
            expected = traffic.round(run.assign(plan))
            got = [tuple(found["bytes"][rank][plan.index]) for rank in range(workers)]
            assert got == expected, (name, plan.index)
            sent, received = (sum(each) for each in zip(*got, strict=True))
            assert sent == received
            assert (sent > 0) == (workers > 1)


@pytest.mark.parametrize("state", ["reset", "carry"])
def test_the_plan_promises_the_bytes_of_the_second_round(on: Callable[[int], Runs], state: str):
    name = f"csbm sage m={4 if state == 'reset' else 8} {state}"
    second = [rank[1] for rank in on(2)[name]["bytes"]]
    data = DATA["csbm"]
    model = MODELS["sage"](data.num_features, 16, data.num_classes)
    promised = estimate_costs(model, data, workers=2, config=make(name).config).exchange["gist"]
    assert promised.total == sum(sent for sent, _ in second)
    assert promised.busiest == max(sent + received for sent, received in second)
