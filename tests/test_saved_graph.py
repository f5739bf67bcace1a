"""Saved graphs in the place of datasets: the command line, and experiments by path."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from gist import load_dataset
from gist.catalog.cards import load_card
from gist.cli import app
from gist.config import TrainConfig
from gist.errors import ConfigError, DataError
from gist.experiment import Experiment, plan_run
from gist.families.graphs import build_model
from gist.graph.data import GraphData
from gist.graph.datasets import find_card

TINY = ["--hidden", "8", "--epochs", "4", "--local-steps", "1", "--subnets", "2", "--threads", "1"]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A directory with a graph in both forms."""
    monkeypatch.chdir(tmp_path)
    data = load_dataset("csbm", num_nodes=60, num_features=4, num_classes=3)
    data.save("graph.npz")
    data.save("graph")
    return tmp_path


def output(*arguments: str) -> dict:
    result = CliRunner().invoke(app, [*arguments, "--json", "-"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_run_by_path_is_the_run_by_name(tmp_path):
    path = load_dataset("digits").save(tmp_path / "digits.npz")
    settings = {**load_card("digits").settings_for(2), "num_subnets": 2, "hidden": 16, "epochs": 4}
    settings |= {"executor": "serial", "progress": False}
    weights, summaries = [], []
    for dataset in ("digits", str(path)):
        experiment = Experiment(dataset=dataset, settings=settings, seed=3)
        trainer = experiment.trainer(experiment.load_data())
        summaries.append(experiment.summary(trainer, trainer.fit()))
        weights.append(trainer.model.state_dict())
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name
    named, saved = summaries
    assert (named["dataset"], saved["dataset"]) == ("digits", str(path))
    for name in ("test_metric", "val_metric", "best_round", "settings", "model_settings"):
        assert named[name] == saved[name], name


def test_the_model_has_the_precision_of_the_features(here):
    data = GraphData.load("graph")
    data = replace(data, x=data.x.double())
    experiment = Experiment(dataset="graph", settings={"hidden": 8, "rounds": 1, "num_subnets": 2})
    trainer = experiment.trainer(data)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float64}


def test_train_and_compare_take_paths(here):
    run = output("train", "graph", *TINY, "--executor", "serial", "--out", "run")
    assert json.loads(Path("run/config.json").read_text())["dataset"] == run["dataset"] == "./graph"
    archive = output("train", "graph.npz", *TINY, "--executor", "serial")
    assert (archive["dataset"], archive["test_metric"]) == ("./graph.npz", run["test_metric"])
    table = output("compare", str(here / "graph"), *TINY, "--no-full")
    assert table["dataset"] == str(here / "graph")
    assert len(table["rows"]) == 1


def test_what_is_not_given_comes_from_the_defaults(here):
    settings = Experiment(dataset="graph.npz").resolved()
    parameters = inspect.signature(build_model).parameters
    for name in ("model", "hidden", "layers", "norm", "dropout"):
        assert settings.pop(name) == parameters[name].default
    assert settings == {"num_subnets": TrainConfig.num_subnets, "seed": 0}
    given = Experiment(dataset="graph.npz", method="full", settings={"rounds": 3, "layers": 2})
    assert given.resolved()["num_subnets"] == 1
    assert (given.resolved()["rounds"], given.resolved()["layers"]) == (3, 2)


def test_a_plan_is_that_of_its_sizes(here):
    sizes = {"num_nodes": 60, "num_edges": 1200, "num_features": 4, "num_classes": 3}
    by_size = plan_run(None, sizes=sizes, settings={"hidden": 8}).to_json()
    by_path = output("plan", "graph.npz", "--hidden", "8")
    for name in ("data", "num_parameters", "parameters_per_subnet"):
        assert by_path[name] == by_size[name], name


def test_a_known_name_is_no_path_and_a_path_no_name(here):
    Path("digits").mkdir()
    assert find_card("digits") == find_card("Digits") == load_card("digits")
    for path in ("graph", "graph.npz", "none.npz", "no/such", "./digits"):
        assert find_card(path) is None
    with pytest.raises(ConfigError, match="unknown dataset; got: 'grap'"):
        find_card("grap")
    with pytest.raises(DataError, match=r"there is no saved graph none\.npz"):
        load_dataset("none.npz")
    with pytest.raises(DataError, match=r"digits is not a saved graph"):
        load_dataset("./digits")


def test_options_are_refused_before_anything_is_read():
    with pytest.raises(ConfigError, match=r"a saved graph has no options; got: seed for g\.npz"):
        Experiment(dataset="g.npz", data_options={"seed": 1})
    with pytest.raises(ConfigError, match="a saved graph has no options; got: num_nodes for a/g"):
        plan_run("a/g", data_options={"num_nodes": 3})
