import json

import pytest
from rich.console import Console

from gist.compare import compare, render
from gist.errors import ConfigError
from gist.experiment import Experiment, plan_run
from gist.families.graphs import Graphs
from gist.report import write_report

CSBM = {"num_nodes": 120, "num_features": 6, "num_classes": 3}
BASELINES = Graphs.baselines
SETTINGS = {"hidden": 16, "rounds": 2, "local_steps": 2, "progress": False}


def experiment(method="gist", **settings):
    return Experiment(
        dataset="csbm", method=method, data_options=CSBM, settings={**SETTINGS, **settings}
    )


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    out = tmp_path_factory.mktemp("cmp")
    found = compare(experiment(), [1, 2, ((0.5, 2), (0.5, 1))], baselines=list(BASELINES), out=out)
    return found, out


def test_one_row_per_baseline_and_number_of_subnets_above_1(table):
    rows = [(row["method"], row["subnets"]) for row in table[0]["rows"]]
    assert rows == [
        ("full", 1), ("gist", 1), ("gist", 2), ("gist", [[0.5, 2], [0.5, 1]]),
        *((name, 2) for name in BASELINES),
    ]  # fmt: skip


def test_every_run_has_a_folder_and_the_report_reads_them(table):
    found, out = table
    folders = [run for row in found["rows"] for run in row["runs"]]
    assert len(set(folders)) == len(folders)
    for row in found["rows"]:
        config = json.loads((out / row["runs"][0] / "config.json").read_text())
        assert config["method"] == row["method"]
    page = write_report([out]).read_text()
    assert all(f"{name}, m = 2" in page for name in BASELINES)


def test_the_table_fits_the_terminal(table):
    wide = [
        {
            **row,
            "subnets": 16,
            "seeds": 5,
            "val_std": 0.1,
            "test_std": 0.1,
            "seconds": 1234.5,
            "peak_memory_bytes": 20e9,
            "parameters_per_subnet": 10_000_000,
        }
        for row in table[0]["rows"]
    ]
    for rows in (table[0]["rows"], wide):
        console = Console(width=200)
        with console.capture() as printed:
            console.print(render({**table[0], "rows": rows}))
        lines = [line.rstrip() for line in printed.get().splitlines()]
        assert max(map(len, lines)) <= 80
        assert any("data-parallel" in line for line in lines)


def test_every_method_makes_its_summary():
    for method in ("gist", "full", *BASELINES):
        settings = {} if method == "full" else {"num_subnets": 2}
        run = experiment(method, **settings)
        trainer = run.trainer(run.load_data())
        summary = run.summary(trainer, trainer.fit())
        json.dumps(summary)
        assert summary["method"] == method
        assert summary["workers"] == 1
        assert summary["subnets"] == (1 if method == "full" else 2)


def test_baselines_take_no_schedule_from_a_card():
    card_has_one = Experiment(dataset="csbm").resolved()["num_subnets"]
    assert not isinstance(card_has_one, int)
    for name in BASELINES:
        assert Experiment(dataset="csbm", method=name).resolved()["num_subnets"] == 4


def test_what_cannot_be_done_is_refused():
    with pytest.raises(ConfigError, match="unknown baseline"):
        compare(experiment(), [2], baselines=["averaging"])
    with pytest.raises(ConfigError, match="cannot be shared out"):
        experiment("data-parallel", num_subnets=3).check_workers(2)
    for method in ("data-parallel", "ensemble"):
        with pytest.raises(ConfigError, match="cannot be planned"):
            plan_run("csbm", method=method)
    assert plan_run("csbm", method="local-sgd", settings={"num_subnets": 2}).num_parameters
