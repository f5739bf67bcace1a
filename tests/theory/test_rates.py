"""Contraction per round: bounds, and the lazy prediction mode by mode (THEORY, test 9)."""

from __future__ import annotations

import pytest
import torch

from gist.errors import ConfigError
from gist.theory import (
    SCHEMES,
    Problem,
    Scheme,
    Spectrum,
    contraction,
    delayed_gain,
    delayed_rates,
    loss_bound,
    mode_rates,
)

PROBLEM = Problem.sphere()
SPECTRUM = Spectrum.of(PROBLEM.kernel())


def middle(values: tuple[float, ...]) -> list[float]:
    quarter = len(values) // 4
    return list(values[quarter:-quarter])


def errors_in_the_middle(record) -> list[float]:
    pairs = zip(middle(record.measured), middle(record.predicted), strict=True)
    return [measured - predicted for measured, predicted in pairs]


def test_09_modes_shrink_as_predicted_at_moderate_width():
    schemes = (Scheme.whole(), Scheme.multi_sample_dropout(0.5, 4), Scheme.ist(4, 5))
    lr = 0.4 / SPECTRUM.largest
    for record in contraction(PROBLEM, schemes, width=4000, scale=1.0, lr=lr, repeats=3):
        errors = errors_in_the_middle(record)
        assert abs(sum(errors) / len(errors)) < 0.01, record.name


@pytest.mark.slow
def test_09_modes_shrink_as_predicted():
    lr = 0.4 / SPECTRUM.largest
    for record in contraction(PROBLEM, width=16_000, scale=1.0, lr=lr, rounds=4, repeats=8):
        errors = errors_in_the_middle(record)
        assert abs(sum(errors) / len(errors)) < 0.005, record.name
        assert abs(record.measured[25] - record.predicted[25]) < 0.005, record.name
        assert record.loss_ratio <= record.bound


def test_one_measured_case_by_hand():
    """A mode of 0.176 of the largest eigenvalue, as in THEORY."""
    half, quarter = 0.5 * 0.4 * 0.17625, 0.25 * 0.4 * 0.17625
    for scheme, value, expected in (
        (Scheme.whole(), 2 * half, 0.9295),
        (Scheme.multi_sample_dropout(0.5, 4), half, 1 - 0.9375 * half),
        (Scheme.bernoulli(0.5, 4, 3), half, 1 - 0.9375 * (1 - (1 - half) ** 3)),
        (Scheme.ist(4, 5), quarter, (1 - quarter) ** 5),
    ):
        rate = mode_rates(scheme, lr=1.0, eigenvalues=torch.tensor([value], dtype=torch.float64))
        assert float(rate) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_lazy_prediction_keeps_every_bound(scheme):
    values = scheme.keep * SPECTRUM.values
    lr = 0.1 / SPECTRUM.largest
    bound = loss_bound(scheme, lr=lr, smallest=float(values[0]))
    slowest = float(mode_rates(scheme, lr=lr, eigenvalues=values).max())
    assert slowest**2 < bound < 1


@pytest.mark.parametrize(
    ("scheme", "bound"),
    [
        (Scheme.dropout(0.5), 1 - 0.5 * 0.1 / 4),
        (Scheme.multi_sample_dropout(0.5, 2), 1 - 0.75 * 0.1 / 4),
        (Scheme.bernoulli(0.5, 2, 3), 1 - 0.75 * 3 * 0.1 / 4),
        (Scheme.ist(2, 3), 0.5 + 0.5 * 0.95**3),
    ],
    ids=str,
)
def test_the_bounds_are_those_of_the_paper(scheme, bound):
    assert loss_bound(scheme, lr=0.5, smallest=0.2) == pytest.approx(bound)
    assert loss_bound(scheme, lr=0.5, smallest=0.0) == 1.0


@pytest.mark.parametrize("scheme", [Scheme.dropout(0.5), Scheme.ist(2, 3)], ids=str)
def test_no_bound_holds_for_steps_that_are_too_large(scheme):
    with pytest.raises(ConfigError, match="lower lr"):
        loss_bound(scheme, lr=100.0, smallest=0.2)


def test_a_bound_that_rounds_to_one_is_vacuous():
    assert loss_bound(Scheme.ist(2, 3), lr=1e-9, smallest=1e-9) == 1.0


def test_without_a_delay_there_is_one_root():
    shares = torch.tensor([0.1, 0.9]).double()
    torch.testing.assert_close(delayed_rates(shares, 0), 1 - shares)
    torch.testing.assert_close(delayed_gain(shares, 0), shares / (2 - shares))


@pytest.mark.parametrize("delay", [1, 2, 5, 10])
def test_delayed_noise_is_that_of_the_recursion(delay):
    shares = torch.tensor([0.02, 0.1]).double()
    response = torch.zeros(4000, 2).double()
    response[0] = shares
    for k in range(1, 4000):
        past = response[k - 1 - delay] if k > delay else 0.0
        response[k] = response[k - 1] - shares * past
    torch.testing.assert_close(delayed_gain(shares, delay), response.square().sum(dim=0))


@pytest.mark.parametrize("delay", [0, 1, 5, 10])
def test_delays_limit_the_step(delay):
    limit = 2 * torch.sin(torch.tensor(torch.pi / (4 * delay + 2)).double())
    shares = limit * torch.tensor([0.99, 1.01]).double()
    assert (delayed_rates(shares, delay) < 1).tolist() == [True, False]
    assert torch.isfinite(delayed_gain(shares, delay)).tolist() == [True, False]
