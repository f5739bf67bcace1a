"""Records of experiments, and their figures."""

from __future__ import annotations

import json
from dataclasses import asdict

import matplotlib
import pytest
import torch

from gist.errors import ConfigError
from gist.plots import png
from gist.theory import (
    SCHEMES,
    VARIED,
    MaskedTraining,
    Network,
    Problem,
    Scheme,
    contraction,
    default_lr,
    floors,
)
from gist.theory.plots import contraction_plot, floor_plot, sawtooth_plot

PROBLEM = Problem.sphere(6, 12)
RECORDS = contraction(PROBLEM, width=200, rounds=2, repeats=2)


def test_there_is_a_record_for_every_case():
    assert [record.scheme for record in RECORDS] == list(SCHEMES)
    for record in RECORDS:
        assert len(record.eigenvalues) == len(record.predicted) == len(record.measured) == 6
        assert list(record.eigenvalues) == sorted(record.eigenvalues)
        assert 0 < record.bound < 1


def test_every_mode_has_the_same_share_at_the_start():
    """So gradient descent, which has no noise, is measured in all modes alike."""
    problem, schemes = Problem.sphere(8, 5), [Scheme.whole()]
    (record,) = contraction(problem, schemes, width=20_000, rounds=1, repeats=1)
    errors = torch.tensor(record.measured) - torch.tensor(record.predicted)
    assert errors.abs().max() < 0.02


def test_one_scheme_is_a_series_of_one():
    case = {"width": 100, "rounds": 1, "repeats": 1}
    scheme = Scheme.ist(2, 2)
    assert contraction(PROBLEM, scheme, **case) == contraction(PROBLEM, [scheme], **case)


@pytest.mark.parametrize("schemes", ["ist", 3, ["ist"]], ids=["word", "number", "words"])
def test_other_schemes_are_not_measured(schemes):
    with pytest.raises(ConfigError, match="schemes must be a Scheme, or a sequence of them"):
        contraction(PROBLEM, schemes)


def test_records_are_json():
    series = floors("num_subnets", (1, 2.0), problem=PROBLEM, width=50, averaged=5)
    for record in (*RECORDS, *series):
        again = json.loads(json.dumps(asdict(record)))
        assert again["name"] == str(record.scheme)
    assert [record.value for record in series] == [1, 2]
    assert series[0].rounds > 5


@pytest.mark.parametrize(
    ("vary", "value"),
    list(zip(VARIED, (2, 0.9, 2, 60, 0.1, 0.2, 1), strict=True)),
    ids=VARIED,
)
def test_everything_can_be_varied(vary, value):
    (record,) = floors(vary, [value], problem=PROBLEM, width=50, averaged=5)
    changed = record.scheme if hasattr(record.scheme, vary) else record
    assert getattr(changed, vary) == value == record.value
    others = {"width": 50, "delay": 0, "lr": default_lr(PROBLEM)}
    others.pop(vary, None)
    assert {name: getattr(record, name) for name in others} == others


def test_figures_are_of_the_records():
    series = [
        record
        for vary, values in (("num_subnets", (1, 8)), ("delay", (0, 1)))
        for record in floors(vary, values, problem=PROBLEM, width=50, averaged=5)
    ]
    scheme = Scheme.ist(2, 3)
    net = Network.draw(50, 12, scale=0.3)
    training = MaskedTraining(PROBLEM, net, scheme, lr=default_lr(PROBLEM))
    traces = [training.traced_round() for _ in range(4)]
    with matplotlib.rc_context({"backend": "agg"}):
        points = contraction_plot(RECORDS)
        (ax,) = points.axes
        names = [text.get_text() for text in ax.get_legend().get_texts()]
        assert names == [record.name for record in RECORDS]
        assert ax.lines[1].get_ydata().tolist() == list(RECORDS[0].measured)
        ends = floor_plot(series)
        assert [ax.get_xlabel() for ax in ends.axes] == ["subnets p", "delay E (rounds)"]
        predicted, found = (line.get_ydata() for line in ends.axes[0].lines)
        assert list(predicted) == [record.predicted for record in series[:2]]
        assert list(found) == [record.measured for record in series[:2]]
        saw = sawtooth_plot(traces)
        assert saw.axes[0].lines[-1].get_ydata()[0] == traces[0].before
        for figure in (points, ends, saw):
            assert png(figure).startswith(b"\x89PNG")


def test_floors_of_categorical_masks_have_no_predicted_line():
    series = floors(
        "num_subnets", (2, 4), problem=PROBLEM, scheme=Scheme.ist(1, 2), width=50, averaged=5
    )
    (line,) = floor_plot(series).axes[0].lines
    assert list(line.get_ydata()) == [record.measured for record in series]
