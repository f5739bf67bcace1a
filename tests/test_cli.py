import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from gist import cli
from gist.catalog import cards
from gist.errors import ConfigError
from tests.ogb_layout import write_cards, write_ogb_layout

TINY = [
    "--data", "num_nodes=120", "--data", "num_features=6", "--data", "num_classes=3",
    "--hidden", "16", "--epochs", "48", "--local-steps", "4", "--threads", "1",
]  # fmt: skip

SIZES = ["--nodes", "5000", "--edges", "40000", "--features", "20", "--classes", "6"]

FIELDS = {
    "dataset", "method", "model", "executor", "hidden", "layers", "subnets", "workers",
    "local_steps", "epochs", "seed", "val_metric", "test_metric", "last_test_metric", "seconds",
    "eval_seconds", "bytes_sent", "bytes_received", "peak_memory_bytes", "num_parameters",
    "versions",
}  # fmt: skip
TEXTS = {"dataset", "method", "model", "executor", "versions"}


@pytest.fixture
def gist(monkeypatch, capsys):
    """Runs the command line in this process, as the installed command does."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gist", *arguments])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_train_writes_numbers_and_a_run(gist, tmp_path):
    out = tmp_path / "run"
    code, printed, _ = gist(
        "train", "csbm", *TINY, "--subnets", "2", "--json", str(tmp_path / "o.json"),
        "--out", str(out), "--checkpoint-every", "2",
    )  # fmt: skip
    assert code == 0
    assert "csbm, gist, m = 2: accuracy" in printed
    values = json.loads((tmp_path / "o.json").read_text())
    assert values.keys() >= FIELDS
    for field in FIELDS - TEXTS:
        assert isinstance(values[field], int | float), field
    assert values["subnets"] == 2
    assert values["hidden"] == 16
    assert values["epochs"] == 48
    names = {path.name for path in out.iterdir()}
    assert names == {
        "model.safetensors", "config.json", "history.jsonl", "result.json", "checkpoints",
    }  # fmt: skip
    assert json.loads((out / "config.json").read_text())["dataset"] == "csbm"


def test_json_to_standard_output_is_nothing_else(gist):
    code, printed, _ = gist("train", "csbm", *TINY, "--subnets", "2", "--json", "-")
    assert code == 0
    assert json.loads(printed)["dataset"] == "csbm"


def test_the_card_gives_what_is_not_given(gist):
    _, printed, _ = gist("train", "digits", "--subnets", "8", "--fast-dev-run", "--json", "-")
    values = json.loads(printed)
    from gist.catalog.cards import load_card

    card = load_card("digits").settings_for(8)
    assert (values["hidden"], values["layers"]) == (card["hidden"], card["layers"])
    assert values["local_steps"] == card["local_steps"]
    assert values["settings"]["lr"] == card["lr"]


def test_a_schedule_of_subnets(gist):
    _, printed, _ = gist("train", "csbm", *TINY, "--subnets", "0.5:4,0.5:1", "--json", "-")
    assert json.loads(printed)["subnets"] == [[0.5, 4], [0.5, 1]]


def test_the_full_model_is_one_subnet_with_its_optimizer_kept(gist):
    _, printed, _ = gist("train", "csbm", *TINY, "--method", "full", "--json", "-")
    values = json.loads(printed)
    assert values["subnets"] == 1
    assert values["settings"]["optimizer_state"] == "carry"
    assert values["parameters_per_subnet"] == [values["num_parameters"]]


def test_resume_goes_on(gist, tmp_path):
    common = ["train", "csbm", *TINY, "--subnets", "2", "--checkpoint-every", "1"]
    _, through, _ = gist(*common, "--out", str(tmp_path / "a"), "--json", "-")
    _, again, _ = gist(
        *common, "--out", str(tmp_path / "b"), "--resume", str(tmp_path / "a"), "--json", "-"
    )
    assert json.loads(again)["test_metric"] == json.loads(through)["test_metric"]
    assert (tmp_path / "b" / "history.jsonl").read_bytes() == (
        tmp_path / "a" / "history.jsonl"
    ).read_bytes()


def test_compare_prints_one_table_and_keeps_every_run(gist, tmp_path):
    out = tmp_path / "cmp"
    code, printed, progress = gist(
        "compare", "csbm", *TINY, "--epochs", "16", "--subnets", "1,2,0.5:4/0.5:1",
        "--seeds", "2", "--out", str(out),
    )  # fmt: skip
    assert code == 0
    lines = [line.split() for line in printed.splitlines()]
    assert [words[:2] for words in lines if words and words[0] in ("full", "gist")] == [
        ["full", "1"], ["gist", "1"], ["gist", "2"], ["gist", "4→1"],
    ]  # fmt: skip
    assert all(len(line) <= 80 for line in printed.splitlines())
    assert progress.count("test") == 8
    table = json.loads((out / "table.json").read_text())
    full, *rows = table["rows"]
    assert full["speedup"] == 1.0
    for row in table["rows"]:
        assert row["speedup"] == full["seconds"] / row["seconds"]
        metrics = [
            json.loads((out / run / "result.json").read_text())["test_metric"]
            for run in row["runs"]
        ]
        assert row["test_mean"] == pytest.approx(sum(metrics) / 2)
        assert row["test_std"] == pytest.approx(abs(metrics[0] - metrics[1]) / 2**0.5)
    assert rows[1]["parameters_per_subnet"] < full["parameters_per_subnet"]
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    code, printed, _ = gist("report", str(out))
    assert code == 0
    assert (out / "report.html").exists()


@pytest.mark.realdata
def test_settings_that_differ_between_methods_are_said(gist, real_data_root, monkeypatch):
    monkeypatch.setenv("GIST_DATA", str(real_data_root))
    _, printed, _ = gist(
        "compare", "cora", "--subnets", "2", "--hidden", "8", "--epochs", "4", "--threads", "1"
    )
    assert "settings that differ" in printed
    assert "full m = 1: norm None" in printed


def test_a_card_may_have_a_schedule_of_subnets(gist):
    common = ["train", "csbm", *TINY[:6], "--local-steps", "30", "--threads", "1", "--json", "-"]
    for options, subnets in (
        ([], [[0.6, 8], [0.4, 1]]),
        (["--method", "full"], 1),
        (["--epochs", "40"], 4),  # a schedule goes with the budget that it was measured with
        (["--fast-dev-run"], 4),
    ):
        _, printed, _ = gist(*common, *options)
        assert json.loads(printed)["subnets"] == subnets


@pytest.mark.slow
def test_compare_evaluates_all_methods_as_often(gist):
    common = ["compare", "csbm", *TINY, "--epochs", "16", "--local-steps", "1", "--subnets", "4"]
    _, printed, _ = gist(*common, "--json", "-")
    assert [row["evaluations"] for row in json.loads(printed)["rows"]] == [4, 4]
    _, printed, _ = gist(*common, "--eval-every", "2", "--json", "-")
    assert [row["evaluations"] for row in json.loads(printed)["rows"]] == [8, 2]
    _, printed, _ = gist(*common, "--early-stopping", "9", "--json", "-")
    assert [row["evaluations"] for row in json.loads(printed)["rows"]] == [16, 4]
    _, printed, _ = gist(*common, "--subnets", "3", "--json", "-")  # 16 rounds against 5
    assert [row["evaluations"] for row in json.loads(printed)["rows"]] == [4, 5]


def test_compare_without_the_full_model_has_no_speedup(gist):
    _, printed, _ = gist("compare", "csbm", *TINY, "--no-full", "--subnets", "2", "--json", "-")
    assert [row["speedup"] for row in json.loads(printed)["rows"]] == [None]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "digitz"], "did you mean 'digits'"),
        (["train", "csbm", *TINY, "--subnets", "17"], "17, group 'hidden.0' has 16 units"),
        (["train", "csbm", *TINY, "--subnets", "two"], "cannot read the number of subnets"),
        (["train", "csbm", *TINY, "--model", "gnc"], "unknown model; got: 'gnc'"),
        (["train", "csbm", *TINY, "--method", "igst"], "unknown method"),
        (["train", "csbm", *TINY, "--norm", "lyer"], "unknown norm"),
        (["train", "csbm", *TINY, "--dropout", "1"], r"dropout must be in [0, 1)"),
        (["train", "csbm", *TINY, "--hidden", "0"], "hidden must be at least 1"),
        (["train", "csbm", *TINY, "--model", "gat", "--heads", "3"], "multiple of heads"),
        (
            ["train", "csbm", *TINY, "--model", "gatv2"],
            "got: hidden=16, heads=8, num_subnets=4; expected: num_subnets <= hidden / heads",
        ),
        (["train", "csbm", "--data", "nodes=3"], "num_nodes"),
        (["train", "csbm", "--data", "num_nodes"], "NAME=VALUE"),
        (["train", "csbm", *TINY, "--device", "tpu"], "this device cannot be used; got: tpu"),
        (["train", "csbm", *TINY, "--resume", "nowhere"], "no usable checkpoint in nowhere"),
        (["train", "csbm", *TINY, "--heads", "2"], "only a gat has heads"),
        (["train", "csbm", *TINY, "--method", "full", "--subnets", "2"], "full model is not split"),
        (["train", "csbm", *TINY, "--out", "/proc/x"], "out is no directory"),
        (["train", "csbm", "--data", "name=x"], "options that csbm does not have"),
        (["report", "nowhere"], "nowhere"),
        (["plan"], "needs all of its sizes; got: no num_nodes, num_edges, num_features"),
        (["plan", *SIZES[:-2]], "needs all of its sizes; got: no num_classes"),
        (["plan", "coar"], "did you mean 'cora'"),
        (["plan", "csbm", "--data", "nodes=3"], "options that csbm does not have"),
        (["plan", *SIZES, "--hidden", "16", "--subnets", "17"], "17, group 'hidden.0'"),
        (["plan", *SIZES, "--model", "gnc"], "unknown model; got: 'gnc'"),
        (["plan", *SIZES, "--memory-limit", "8 GoB"], "memory_limit must be a positive number"),
        (["plan", *SIZES, "--nodes", "0"], "--nodes"),
        (["plan", *SIZES, "--resume", "run"], "No such option"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(gist, arguments, message):
    code, _, error = gist(*arguments)
    assert code == 2
    assert message in error.replace("\n", " ")
    assert "Traceback" not in error


def test_cora_that_is_not_there_says_what_to_do(gist, monkeypatch, tmp_path):
    monkeypatch.setenv("GIST_CACHE", str(tmp_path))
    monkeypatch.delenv("GIST_DATA", raising=False)
    code, _, error = gist("train", "cora")
    assert code == 2
    assert "gist prepare cora" in error


def test_the_version_is_printed(gist):
    assert gist("--version") == (0, f"gist {version('gist-subnets')}\n", "")


def test_prepare_lists_and_needs_no_network_for_generated_data(gist):
    _, printed, _ = gist("prepare", "--list")
    assert {line.split()[0] for line in printed.splitlines()} >= {"digits", "cora", "csbm"}
    _, printed, _ = gist("prepare", "digits")
    assert "nothing to download" in printed


def test_a_large_dataset_is_prepared_cut_and_trained_on(gist, monkeypatch, tmp_path):
    monkeypatch.setenv("GIST_CACHE", str(tmp_path))
    monkeypatch.delenv("GIST_DATA", raising=False)
    nodes = np.arange(30)
    split = {"train": nodes[:20], "valid": nodes[20:25], "test": nodes[25:]}
    ring = np.stack([nodes, np.roll(nodes, 1)])
    write_ogb_layout(tmp_path / "ogb", "ogbn-arxiv", ring, np.eye(30), nodes, split)
    sizes = {"ogbn-arxiv": {"nodes": 30, "edges": 60, "features": 30}}
    monkeypatch.setattr(cards, "_PLACES", (write_cards(tmp_path / "cards", sizes),))
    code, printed, _ = gist("prepare", "ogbn-arxiv", "--clusters", "3")
    assert code == 0
    assert f"ogbn-arxiv is ready in {tmp_path}/ogb/ogbn_arxiv; checksums of 8 raw files" in printed
    assert "3 clusters of" in printed
    kept = [path.name for path in (tmp_path / "processed").iterdir()]
    assert kept == ["ogbn-arxiv-symmetrize=true"]
    options = ["--epochs", "4", "--subnets", "2", "--local-steps", "1", "--hidden", "8"]
    code, printed, _ = gist("train", "ogbn-arxiv", *options, "--clusters", "3", "--json", "-")
    assert code == 0
    assert json.loads(printed)["dataset"] == "ogbn-arxiv"
    code, _, error = gist("prepare", "ogbn-arxiv", "--data", "symmetrize=no")
    assert code == 2
    assert "symmetrize is switched on or off" in error


def test_plan_says_what_a_run_on_a_dataset_takes(gist, monkeypatch, tmp_path):
    monkeypatch.setenv("GIST_CACHE", str(tmp_path))  # cora is not there, and need not be
    monkeypatch.delenv("GIST_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    code, printed, _ = gist("plan", "cora", "--subnets", "8", "--hidden", "64", "--threads", "1")
    assert code == 0
    for words in ("2,708 nodes", "m = 8", "at the peak", "the run", "exchange", "on disk"):
        assert words in printed
    assert all(len(line) <= 80 for line in printed.splitlines())
    assert list(tmp_path.iterdir()) == [], "a plan writes nothing"


def test_plan_takes_what_is_not_given_from_the_card(gist):
    from gist.catalog.cards import load_card

    card = load_card("csbm")
    _, printed, _ = gist("plan", "csbm", "--subnets", "8", "--json", "-")
    values = json.loads(printed)
    assert values["data"]["nodes"] == card.nodes
    assert values["num_subnets"] == 8
    layers, hidden = (card.settings_for(8)[name] for name in ("layers", "hidden"))
    # A gcn has one weight and one bias in each layer.
    widths = [card.features, *[hidden] * (layers - 1), card.classes]
    weights = sum(a * b for a, b in pairwise(widths))
    assert values["num_parameters"] == weights + sum(widths[1:])
    _, printed, _ = gist("plan", "csbm", "--subnets", "8", "--hidden", "512", "--json", "-")
    assert json.loads(printed)["num_parameters"] > values["num_parameters"]


def test_plan_needs_no_dataset_where_the_sizes_are_given(gist, tmp_path):
    options = ["--model", "sage", "--hidden", "64", "--subnets", "0.5:4,0.5:1", "--workers", "2"]
    code, printed, _ = gist("plan", *SIZES, *options, "--json", str(tmp_path / "plan.json"))
    assert code == 0
    assert "5,000 nodes, 40,000 edges, 20 features, 6 outputs" in printed
    values = json.loads((tmp_path / "plan.json").read_text())
    assert values["num_subnets"] == [[0.5, 4], [0.5, 1]]
    assert values["workers"] == 2
    assert f"{values['num_parameters']:,} parameters" in printed
    assert values["command"].startswith("gist plan --nodes 5000")
    assert values["memory_limit"] > values["peak_memory_bytes"] > 0


def test_plan_to_standard_output_is_nothing_but_json(gist):
    code, printed, error = gist("plan", *SIZES, "--subnets", "2", "--json", "-")
    assert code == 0
    assert json.loads(printed)["data"]["features"] == 20
    assert error == ""


def test_sizes_go_before_those_of_the_card_and_options_of_the_data_too(gist):
    options = ["--data", "num_nodes=1000", "--data", "average_degree=4"]
    _, printed, _ = gist("plan", "csbm", *options, "--classes", "3", "--json", "-")
    graph = json.loads(printed)["data"]
    assert (graph["nodes"], graph["edges"], graph["classes"]) == (1000, 4000, 3)


def test_plan_is_the_run_that_train_makes(gist):
    """The same options: as many parameters, as large subnets, and the peak within the plan."""
    _, printed, _ = gist("plan", "csbm", *TINY, "--subnets", "4", "--json", "-")
    planned = json.loads(printed)
    _, printed, _ = gist("train", "csbm", *TINY, "--subnets", "4", "--json", "-")
    trained = json.loads(printed)
    assert planned["num_parameters"] == trained["num_parameters"]
    assert planned["parameters_per_subnet"] == max(trained["parameters_per_subnet"])


def test_plan_of_the_full_model_saves_nothing(gist):
    _, printed, _ = gist("plan", *SIZES, "--method", "full", "--json", "-")
    values = json.loads(printed)
    assert values["num_subnets"] == 1
    assert values["flops_ratio"] == 1.0
    assert values["parameters_per_subnet"] == values["num_parameters"]
    assert values["memory"]["training"]["carried_state"] > 0


def test_a_plan_that_does_not_fit_is_still_a_plan(gist):
    code, printed, _ = gist("plan", *SIZES, "--hidden", "4096", "--memory-limit", "150MB")
    assert code == 0
    assert "does not fit into 150.0 MB" in printed
    assert "a narrower model" in printed.replace("\n", " ")


def test_doctor_speaks_json(gist):
    code, printed, _ = gist("doctor", "--json", "-")
    assert code == 0
    assert "torch" in printed
    assert json.loads(printed)


@pytest.mark.parametrize("command", ["train", "compare", "plan", "report", "doctor", "prepare"])
def test_every_command_has_help(command):
    result = CliRunner().invoke(cli.app, [command, "--help"])
    assert result.exit_code == 0
    assert len(result.output) > 200


@pytest.mark.parametrize("text", ["", "x", "0.5:", "1:2:3", "0.5:a"])
def test_subnets_that_cannot_be_read(text):
    with pytest.raises(ConfigError, match="cannot read the number of subnets"):
        cli.parse_subnets(text)


def test_the_module_runs_as_a_command_and_leaves_quietly():
    """Without a terminal, standard error says which executor was picked, and nothing else."""
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "gist.cli", "train", "csbm", *TINY, "--subnets", "2"],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(root)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"gist: m = 2: (serial|stacked) execution \(.*\)\n", done.stderr)
    assert "csbm" in done.stdout


def test_clusters_are_cut_kept_and_trained_on(gist, monkeypatch, tmp_path):
    monkeypatch.setenv("GIST_CACHE", str(tmp_path / "cache"))
    options = ["--data", "num_nodes=300", "--data", "num_classes=3"]
    code, printed, _ = gist(
        "prepare", "csbm", *options, "--clusters", "6", "--clusters-per-batch", "2"
    )
    assert code == 0
    assert "6 clusters of" in printed
    assert "of the edges within them; batches of 2 keep" in printed
    (kept,) = (tmp_path / "cache" / "clusters").iterdir()
    before = kept.stat().st_mtime_ns
    code, printed, _ = gist(
        "train", "csbm", *options, "--hidden", "8", "--epochs", "8", "--subnets", "2",
        "--clusters", "6", "--clusters-per-batch", "2", "--json", "-", "--out", str(tmp_path / "o"),
    )  # fmt: skip
    assert code == 0
    settings = json.loads(printed)["settings"]
    assert (settings["clusters"], settings["clusters_per_batch"]) == (6, 2)
    assert settings["inductive"] is False
    assert json.loads((tmp_path / "o" / "config.json").read_text())["batches"]["num_parts"] == 6
    assert [file.stat().st_mtime_ns for file in kept.parent.iterdir()] == [before]
    code, _, printed = gist(
        "train", "csbm", *options, "--clusters", "6", "--clusters-per-batch", "9"
    )
    assert code == 2
    assert "cannot hold more clusters than there are" in printed
    code, printed, _ = gist("prepare", "csbm", *options, "--clusters", "6", "--inductive")
    assert code == 0
    assert len(list(kept.parent.iterdir())) == 2, "the cut of another graph"


def test_cards_may_name_clusters(gist, monkeypatch):
    from gist.catalog import cards
    from gist.experiment import Experiment

    card = cards.load_card("csbm")
    defaults = replace(card.settings.defaults, clusters=5, clusters_per_batch=2, inductive=True)
    with_clusters = replace(card, settings=replace(card.settings, defaults=defaults))
    monkeypatch.setattr("gist.families.graphs.find_card", lambda *_: with_clusters)
    small = {"num_nodes": 200, "num_classes": 3}
    run = Experiment(dataset="csbm", data_options=small, settings={"hidden": 8})
    trainer = run.trainer(run.load_data())
    assert trainer.graph_config.clusters == 5
    assert trainer.graph_config.inductive
    assert trainer.objective.steps_per_epoch == 3
