"""Where the loss ends: floors against p, m, η, κ, τ and delay (THEORY, tests 11, 12, 13, 15)."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from gist.errors import ConfigError
from gist.theory import (
    Floor,
    MaskedTraining,
    Network,
    Problem,
    Scheme,
    categorical_order,
    default_lr,
    floors,
)

PROBLEM = Problem.sphere()
LR, KAPPA = default_lr(PROBLEM), PROBLEM.num_samples**-0.5


def measured(records: list[Floor]) -> list[float]:
    return [record.measured for record in records]


def rises(values: list[float]) -> bool:
    return all(before < after for before, after in itertools.pairwise(values))


def slope(records: list[Floor], name: str = "measured") -> float:
    """Of the least-squares line through logarithms."""
    x = torch.tensor([[math.log(record.value), 1.0] for record in records])
    y = torch.tensor([math.log(getattr(record, name)) for record in records])
    return float(torch.linalg.lstsq(x, y[:, None]).solution[0])


def test_11_the_floor_of_bernoulli_masks_falls_with_subnets():
    records = floors("num_subnets", (1, 4, 16), problem=PROBLEM, width=500)
    assert rises(measured(records)[::-1])
    for record in records:
        assert record.predicted / 2 < record.measured < 2 * record.predicted


@pytest.mark.slow
@pytest.mark.parametrize("keep", [0.5, 0.8, 0.9])
def test_11_the_floor_of_bernoulli_masks_falls_as_one_over_subnets(keep):
    scheme = Scheme.dropout(keep)
    series = (1, 2, 4, 8, 16)
    records = floors("num_subnets", series, problem=PROBLEM, scheme=scheme, averaged=1000)
    assert rises(measured(records)[::-1])
    if keep >= 0.8:
        assert slope(records) == pytest.approx(-1, abs=0.3)
        assert slope(records, "predicted") == pytest.approx(-1, abs=0.3)


@pytest.mark.parametrize(
    ("vary", "values"),
    [
        ("width", (1000, 250)),
        ("lr", (0.5 * LR, LR, 2 * LR)),
        ("scale", (KAPPA, 2 * KAPPA, 4 * KAPPA)),
        ("local_steps", (1, 2, 5)),
    ],
    ids=["width", "lr", "scale", "local_steps"],
)
def test_12_the_floor_of_bernoulli_masks_rises(vary, values):
    records = floors(vary, values, problem=PROBLEM, width=250)
    assert rises(measured(records))
    assert rises([record.predicted for record in records])


@pytest.mark.slow
def test_12_the_floor_of_bernoulli_masks_falls_with_width():
    records = floors("width", (4000, 1000, 250), problem=PROBLEM)
    assert rises(measured(records))
    for record in records:
        assert record.measured == pytest.approx(record.predicted, rel=0.35)


def test_13_the_floor_of_categorical_masks_rises_with_subnets():
    ist = Scheme.ist(1, 10)
    records = floors("num_subnets", (1, 2, 4), problem=PROBLEM, scheme=ist, width=250)
    none, *others = measured(records)
    assert none < 1e-5
    assert rises([none, *others])


@pytest.mark.slow
def test_13_the_floor_of_categorical_masks():
    case = {"problem": PROBLEM, "scheme": Scheme.ist(1, 10), "averaged": 60}
    narrow = measured(floors("num_subnets", (2, 4, 8), width=1000, **case))
    wide = measured(floors("num_subnets", (2, 4), width=4000, **case))
    for found, other_samples in zip(narrow, (0.0014, 0.0103, 0.065), strict=True):
        assert other_samples / 2.5 < found < 2.5 * other_samples
    assert rises(narrow)
    assert rises(wide)
    assert all(many < few / 4 for many, few in zip(wide, narrow[:2], strict=True))


def test_15_the_floor_rises_with_the_delay():
    """The largest mode loses 0.25 in a round, which is almost too much for a delay of 5."""
    lr = 0.25 / 0.5 * LR / 0.8
    records = floors("delay", (0, 2, 5), problem=PROBLEM, lr=lr, width=500)
    assert rises(measured(records))
    assert rises([record.predicted for record in records])


@pytest.mark.slow
def test_15_the_floor_rises_with_delays_up_to_ten():
    lr = 0.14 / 0.5 * LR / 0.8
    records = floors("delay", (0, 2, 5, 10), problem=PROBLEM, lr=lr, averaged=1000)
    assert rises(measured(records))
    for record in records[:3]:
        assert record.measured == pytest.approx(record.predicted, rel=0.3)
    assert records[3].measured > 2 * records[0].measured


def test_15_without_a_delay_it_is_masked_training():
    net = Network.draw(100, PROBLEM.dim, scale=KAPPA)
    scheme = Scheme.multi_sample_dropout(0.5, 3)
    runs = [
        MaskedTraining(PROBLEM, net, scheme, lr=LR, **some).fit(5) for some in ({}, {"delay": 0})
    ]
    assert torch.equal(*runs)


def test_15_changes_are_those_of_the_network_some_rounds_ago():
    net = Network.draw(100, PROBLEM.dim, scale=KAPPA)
    scheme = Scheme.multi_sample_dropout(0.5, 3)
    training = MaskedTraining(PROBLEM, net, scheme, lr=LR, delay=2)
    past = [net, net, net]
    for round in range(5):
        training.round()
        masks = scheme.masks(100, seed=0, round=round)
        old = past[-3].weight
        hidden = (old @ PROBLEM.x.T).relu()
        outputs = (masks * net.signs) @ hidden / 10
        held = masks.double() / masks.sum(dim=0).clamp(min=1)
        pull = held.T @ (PROBLEM.y - outputs)
        step = net.signs[:, None] / 10 * ((hidden > 0) * pull) @ PROBLEM.x
        past.append(Network(weight=past[-1].weight + LR * step, signs=net.signs))
        torch.testing.assert_close(training.network.weight, past[-1].weight, rtol=0, atol=1e-14)


def test_15_whole_networks_have_no_floor_however_late():
    records = floors(
        "delay", (0, 3), problem=PROBLEM, scheme=Scheme.dropout(1.0), lr=0.4 * LR, width=500
    )
    assert all(record.measured < 1e-5 for record in records)
    assert all(record.predicted == 0.0 for record in records)


def test_the_order_of_categorical_masks_is_the_papers():
    settings = {"width": 100, "num_samples": 10, "dim": 3, "scale": 0.5, "smallest": 0.1}
    order = categorical_order(Scheme.ist(3, 7), **settings)
    assert order == pytest.approx(7 * 4 * 0.25 * 1000 * 3 / (0.01 * 100))
    assert categorical_order(Scheme.whole(), **settings) == 0.0
    assert categorical_order(Scheme.ist(3, 7), **settings | {"smallest": 0.0}) == math.inf


@pytest.mark.parametrize(
    ("vary", "values", "said"),
    [
        ("depth", (1, 2), "cannot be varied; got: 'depth'; expected: one of num_subnets"),
        ("keep", (0.5,), "Bernoulli masks alone; got: scheme: IST, p = 2"),
        ("width", ("a",), r"values of width must be finite numbers.* got: \('a',\)"),
        ("width", "12", "values of width must be finite numbers"),
        ("width", 50, "values of width must be finite numbers.* got: 50; expected: a sequence"),
        ("width", (), "values of width must be finite numbers, at least one"),
        ("lr", (0.1, math.nan), "values of lr must be finite numbers"),
        ("lr", np.array([[0.1]]), "values of lr must be finite numbers"),
        ("width", (50, True), "values of width must be finite numbers"),
        ("width", (50, 30.5), "width must be a whole number; got: 30.5"),
        ("width", (50, 0), "a network needs neurons"),
        ("num_subnets", (1, 0), "num_subnets must be a whole number of at least 1"),
        ("delay", (0, -1), "delay a whole number from 0 on"),
        ("lr", (0.1, -0.1), "lr must be a positive number"),
    ],
    ids=[
        "thing",
        "mask",
        "word",
        "text",
        "bare number",
        "none",
        "not finite",
        "table",
        "truth",
        "half a neuron",
        "no neuron",
        "no subnet",
        "early",
        "backwards",
    ],
)
def test_series_that_cannot_be_are_refused_before_any_training(vary, values, said, monkeypatch):
    monkeypatch.setattr(MaskedTraining, "fit", lambda *_: pytest.fail("it trains"))
    with pytest.raises(ConfigError, match=said):
        floors(vary, values, problem=PROBLEM, scheme=Scheme.ist(2, 1))


def test_only_where_the_scheme_matters_it_is_named():
    with pytest.raises(ConfigError) as refused:
        floors("depth", (1, 2), scheme=Scheme.ist(2, 1))
    assert "IST" not in str(refused.value)


def test_arrays_of_values_are_taken():
    case = {"problem": PROBLEM, "width": 100, "averaged": 5}
    assert floors("lr", np.array([LR]), **case) == floors("lr", [LR], **case)
    (record,) = floors("num_subnets", np.array([2]), **case)
    assert type(record.value) is int


def test_series_that_do_not_settle_are_refused():
    with pytest.raises(ConfigError, match="another lr"):
        floors("delay", (30,), problem=PROBLEM, width=100)
    parallel = Problem(x=PROBLEM.x[[0, 0, 1]], y=PROBLEM.y[:3])
    with pytest.raises(ConfigError, match="parallel"):
        floors("width", (50,), problem=parallel)
