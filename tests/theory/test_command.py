"""The theory lab on the command line."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from gist import ConfigError
from gist.cli import app


def run(*arguments: str):
    return CliRunner().invoke(app, ["theory", *arguments])


def test_contraction(tmp_path):
    plot = tmp_path / "rates.png"
    small = ["--width", "200", "--rounds", "1", "--repeats", "1"]
    outcome = run("contraction", *small, "--json", "-", "--plot", str(plot))
    assert outcome.exit_code == 0, outcome.output
    records = json.loads(outcome.stdout)["contraction"]
    assert {record["width"] for record in records} == {200}
    assert all(len(r["predicted"]) == len(r["measured"]) == 50 for r in records)
    assert plot.stat().st_size > 1000


def test_floors_and_their_table(tmp_path):
    file = tmp_path / "floors.json"
    asked = ["floors", "--vary", "width", "--values", "100,400"]
    outcome = run(*asked, "--json", str(file))
    assert outcome.exit_code == 0, outcome.output
    first, second = json.loads(file.read_text())["floors"]
    assert (first["value"], second["value"]) == (100, 400)
    assert first["measured"] > second["measured"]
    assert "predicted" in outcome.stdout


def test_a_graph():
    outcome = run("graph", "digits", "--subnets", "4", "--json", "-")
    assert outcome.exit_code == 0, outcome.output
    report = json.loads(outcome.stdout)
    assert report["num_subnets"] == 4
    assert report["num_kept"] == 1797
    assert "GIST-K on digits" in run("graph", "digits").stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["magic"], "unknown experiment"),
        (["graph"], "is on a dataset"),
        (["floors", "digits"], "is on a dataset"),
        (["graph", "digits-images"], "no graph"),
        (["contraction", "--vary", "width"], "does not have"),
        (["floors", "--vary", "luck"], "cannot be varied"),
        (["graph", "digits", "--plot", "x.png"], "no figure"),
    ],
    ids=["name", "no-dataset", "dataset", "images", "settings", "vary", "plot"],
)
def test_what_cannot_be_is_said(arguments, said):
    error = run(*arguments).exception
    assert isinstance(error, ConfigError)
    assert said in str(error)
