"""Federated runs by name and on the command line."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from gist import ConfigError
from gist.cli import app
from gist.compare import compare
from gist.experiment import Experiment, plan_run

COMMON = ["--clients", "12", "--in-flight", "3", "--rounds", "4", "--local-steps", "3"]


def run(*arguments: str):
    return CliRunner().invoke(app, [*arguments])


@pytest.mark.parametrize(
    ("arguments", "model"),
    [
        (["digits-images", "--method", "asyncdrop", "--hidden", "16"], "mlp"),
        (["digits-images", "--method", "federated", "--strategy", "fedbuff"], "mlp"),
        (["digits", "--method", "asyncdrop", "--hidden", "16", "--split", "iid"], "gcn"),
    ],
    ids=["asyncdrop", "fedbuff", "graph"],
)
def test_train(arguments, model, tmp_path):
    out = tmp_path / "run"
    outcome = run("train", *arguments, *COMMON, "--json", "-", "--out", str(out))
    assert outcome.exit_code == 0, outcome.output
    summary = json.loads(outcome.stdout)
    assert summary["model"] == model
    assert summary["rounds"] == 4
    assert summary["executor"] == "federated"
    federated = summary["federated"]
    assert federated["clock"] > 0
    assert federated == json.loads((out / "federated.json").read_text())
    lines = (out / "events.jsonl").read_text().splitlines()
    assert len(lines) == sum(federated["events"].values())


def test_a_line_about_the_run_names_the_clock():
    outcome = run("train", "digits-images", "--method", "asyncdrop", "--hidden", "8", *COMMON)
    assert outcome.exit_code == 0, outcome.output
    assert "4 merges in" in outcome.stdout


def test_levels_of_capacity_are_read():
    experiment = ["digits-images", "--method", "federated", "--strategy", "heterofl"]
    outcome = run("train", *experiment, *COMMON, "--capacity", "1,0.5", "--json", "-")
    assert json.loads(outcome.stdout)["settings"]["capacity"] == [1.0, 0.5]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["digits-images", "--method", "ist", "--clients", "4"], "'asyncdrop' or 'federated'"),
        (["digits-images", "--method", "asyncdrop", "--strategy", "fedavg"], "not AsyncDrop"),
        (["digits-images", "--method", "asyncdrop", "--subnets", "4"], "in_flight"),
        (["digits-images", "--method", "federated"], "needs a strategy"),
        (["digits-images", "--method", "federated", "--strategy", "fedBuf"], "mean 'fedbuff'?"),
        (["digits-images", "--method", "asyncdrop", "--fleet", "fast"], "unknown fleet"),
        (["digits-images", "--method", "asyncdrop", "--workers", "2"], "one process"),
    ],
    ids=["other-method", "other-strategy", "subnets", "none", "strategy", "fleet", "workers"],
)
def test_what_cannot_be_is_said(arguments, said):
    error = run("train", *arguments).exception
    assert isinstance(error, ConfigError)
    assert said in str(error)


def test_there_is_no_plan_and_no_comparison():
    with pytest.raises(ConfigError, match="not planned"):
        plan_run("digits-images", method="asyncdrop")
    with pytest.raises(ConfigError, match="numbers of subnets"):
        compare(Experiment(dataset="digits-images", method="federated"), [2])
