"""The leaderboard scripts, on tiny datasets in OGB's raw layout, scored by OGB's Evaluator."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gist import GraphShape, load_dataset
from gist.catalog import cards
from gist.catalog.cards import load_card
from gist.families.graphs import Graphs, build_model
from gist.graph import datasets
from gist.graph.generate import csbm
from tests.ogb_layout import write_cards, write_ogb_layout
from tests.workers.spawn import run_workers

OGB = Path(__file__).resolve().parents[2] / "examples" / "ogb"
TINY = ["--hidden_channels", "8", "--num_layers", "2", "--epochs", "4", "--runs", "2"]


@pytest.fixture
def scripts(monkeypatch):
    """The modules of the folder, as they see each other."""
    monkeypatch.syspath_prepend(OGB)
    import arxiv
    import leaderboard
    import products

    return SimpleNamespace(arxiv=arxiv, products=products, leaderboard=leaderboard)


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """A data folder with an ogbn-arxiv and an ogbn-products of 120 nodes, and their cards."""
    folder = tmp_path_factory.mktemp("data")
    data = csbm(num_nodes=120, num_features=6, num_classes=3, average_degree=6, homophily=0.9)
    one_way = data.edge_index[:, data.edge_index[0] < data.edge_index[1]]
    split = {"train": data.train_mask, "valid": data.val_mask, "test": data.test_mask}
    split = {name: mask.nonzero()[:, 0] for name, mask in split.items()}
    years = {"node_year": torch.full((120,), 2015)}
    write_ogb_layout(folder, "ogbn-arxiv", one_way, data.x, data.y, split, node_files=years)
    write_ogb_layout(folder, "ogbn-products", one_way, data.x, data.y, split)
    sizes = {"nodes": 120, "edges": 2 * one_way.size(1), "features": 6}
    write_cards(folder / "cards", {"ogbn-arxiv": sizes, "ogbn-products": sizes})
    return folder


@pytest.fixture
def root(layouts, monkeypatch):
    """That folder, while its cards are the ones that count."""
    monkeypatch.setattr(cards, "_PLACES", (layouts / "cards",))
    return layouts


def as_ogb_prints(results: torch.Tensor) -> str:
    """The lines of OGB's logger for ``[runs, evaluations, 3]`` scores: each run, then all."""
    percent = 100 * results
    rows = torch.stack(
        [
            torch.stack([of[:, 0].max(), of[i, 1], of[i, 0], of[i, 2]])
            for of, i in zip(percent, percent[:, :, 1].argmax(1), strict=True)
        ]
    )
    form = "{}:\nHighest Train: {}\nHighest Valid: {}\n  Final Train: {}\n   Final Test: {}\n"
    text = ""
    for number, row in enumerate(rows, start=1):
        text += form.format(f"Run {number:02d}", *(f"{value:.2f}" for value in row))
    both = (f"{column.mean():.2f} ± {column.std():.2f}" for column in rows.T)
    return text + form.format("All runs", *both)


def printed(logger, capsys) -> str:
    for run in range(len(logger.results)):
        logger.print_statistics(run)
    logger.print_statistics()
    return capsys.readouterr().out


def test_the_logger_prints_what_ogbs_does(scripts, capsys):
    for seed in range(20):
        runs, evaluations = 2 + seed % 9, 1 + seed % 4
        scores = torch.rand(runs, evaluations, 3, generator=torch.Generator().manual_seed(seed))
        scores = (scores * 30).round() / 30  # ties: the first highest counts
        logger = scripts.leaderboard.Logger(runs)
        for run in range(runs):
            for score in scores[run].tolist():
                logger.add_result(run, score)
        assert printed(logger, capsys) == as_ogb_prints(scores)


OGBS_LOG = """\
Run 01:
Highest Train: 78.59
Highest Valid: 72.91
  Final Train: 77.21
   Final Test: 71.55
Run 02:
Highest Train: 79.99
Highest Valid: 73.01
  Final Train: 75.55
   Final Test: 71.77
Run 03:
Highest Train: 77.77
Highest Valid: 72.43
  Final Train: 77.77
   Final Test: 71.21
All runs:
Highest Train: 78.78 ± 1.12
Highest Valid: 72.78 ± 0.31
  Final Train: 76.84 ± 1.15
   Final Test: 71.51 ± 0.28
"""
"""What the logger of OGB's examples printed for the scores below, copied from the screen."""


def test_the_logger_prints_what_ogbs_printed(scripts, capsys):
    runs = [
        [(0.7312, 0.7104, 0.7003), (0.7721, 0.7291, 0.7155), (0.7859, 0.7287, 0.7202)],
        [(0.7001, 0.6998, 0.6899), (0.7555, 0.7301, 0.7177), (0.7999, 0.7301, 0.7099)],
        [(0.7777, 0.7243, 0.7121), (0.7700, 0.7100, 0.7000), (0.7650, 0.7200, 0.7198)],
    ]
    logger = scripts.leaderboard.Logger(len(runs))
    for run, scores in enumerate(runs):
        for score in scores:
            logger.add_result(run, score)
    assert printed(logger, capsys) == OGBS_LOG


def test_the_logger_takes_one_run_and_runs_of_unequal_length(scripts, capsys):
    logger = scripts.leaderboard.Logger(1)
    logger.add_result(0, (0.5, 0.25, 0.125))
    assert printed(logger, capsys) == (
        "Run 01:\nHighest Train: 50.00\nHighest Valid: 25.00\n"
        "  Final Train: 50.00\n   Final Test: 12.50\n"
        "All runs:\nHighest Train: 50.00 ± 0.00\nHighest Valid: 25.00 ± 0.00\n"
        "  Final Train: 50.00 ± 0.00\n   Final Test: 12.50 ± 0.00\n"
    )
    logger = scripts.leaderboard.Logger(2)
    for run, score in ((0, (0.5, 0.5, 0.5)), (1, (0.75, 0.5, 0.25)), (1, (0.25, 0.75, 1.0))):
        logger.add_result(run, score)
    assert printed(logger, capsys).endswith(
        "All runs:\nHighest Train: 62.50 ± 17.68\nHighest Valid: 62.50 ± 17.68\n"
        "  Final Train: 37.50 ± 17.68\n   Final Test: 75.00 ± 35.36\n"
    )


def test_flags_are_ogbs_in_both_spellings(scripts):
    parser = scripts.leaderboard.make_parser(scripts.products.BOARD)
    known = set(parser._option_string_actions) - {"-h", "--help"}
    for flag in known:
        name = flag.removeprefix("--")
        action = parser._option_string_actions[flag]
        assert parser._option_string_actions["--" + name.replace("_", "-")] is action
        assert parser._option_string_actions["--" + name.replace("-", "_")] is action
    ogbs = "runs epochs hidden_channels num_layers dropout lr device log_steps use_sage"
    ogbs += " num_partitions batch_size eval_steps num_workers"
    assert {f"--{name}" for name in ogbs.split()} <= known


@pytest.mark.parametrize(
    ("script", "changes", "features", "classes", "parameters"),
    [
        ("arxiv", {}, 128, 40, 110_120),
        ("arxiv", {"model": "sage"}, 128, 40, 218_664),
        ("products", {}, 100, 47, 206_895),
    ],
)
def test_the_full_model_has_the_parameters_of_ogbs(
    scripts, script, changes, features, classes, parameters
):
    settings = getattr(scripts, script).BOARD.full | changes
    shape = GraphShape(num_nodes=1, num_edges=0, num_features=features, num_classes=classes)
    model = build_model(shape, **{k: settings[k] for k in Graphs.model_settings if k in settings})
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_arxiv_trains_the_full_model_and_writes_a_submission(scripts, root, tmp_path, capsys):
    file = tmp_path / "out.json"
    given = ["--data_dir", str(root), *TINY, "--log_steps", "2", "--submission", str(file)]
    scripts.leaderboard.main(scripts.arxiv.BOARD, [*given, "--use-sage", "--contact", "A <a@b.c>"])
    lines = capsys.readouterr().out.splitlines()
    entry = json.loads(file.read_text())
    logged = [line for line in lines if line.startswith("Run: ")]
    assert [line[:18] for line in logged] == [
        f"Run: {run:02d}, Epoch: {epoch:02d}" for run in (1, 2) for epoch in (2, 4)
    ]
    for line in logged:
        assert line.split(", ")[2].startswith("Loss: ")
        assert line.count("%") == 3
    mean, std = 100 * entry["test_mean"], 100 * entry["test_std"]
    assert f"   Final Test: {mean:.2f} ± {std:.2f}" in lines
    assert entry["test_mean"] == pytest.approx(sum(entry["test"]) / 2)
    assert std == pytest.approx(100 * abs(entry["test"][0] - entry["test"][1]) / math.sqrt(2))
    assert entry["num_parameters"] == (2 * 6 * 8 + 8) + 16 + (2 * 8 * 40 + 40)  # 40 classes always
    assert (entry["method"], entry["dataset"]) == ("GraphSAGE", "ogbn-arxiv")
    assert entry["stand_in_for"] is None
    assert entry["seeds"] == [0, 1]
    assert entry["command"].startswith("python examples/ogb/arxiv.py --data_dir ")
    assert [text.split()[1] for text in entry["to_do"]] == ["--code", "--paper", "with"]
    assert {"official", "external_data", "tuned_hyperparameters", "hardware"} <= entry.keys()
    assert entry["versions"].keys() >= {"gist", "torch", "ogb"}


def test_the_default_seeds_and_all_links_leave_nothing_to_do(scripts):
    parsed = scripts.leaderboard.make_parser(scripts.arxiv.BOARD).parse_args([])
    seeds = list(range(parsed.seed, parsed.seed + parsed.runs))
    entry = {"contact": "A", "code": "https://x", "paper": "https://y", "stand_in_for": None}
    assert scripts.leaderboard.to_do({**entry, "seeds": seeds}) == []
    assert len(scripts.leaderboard.to_do({**entry, "seeds": seeds[1:]})) == 1


def test_products_trains_on_clusters(scripts, root, capsys):
    given = ["--data_dir", str(root), *TINY, "--runs", "1", "--eval_steps", "2"]
    given += ["--num_partitions", "6", "--batch_size", "2"]

    def rounds(*more: str) -> list[tuple[str, int]]:
        """What each line says of epochs, and how many scores it has."""
        scripts.leaderboard.main(scripts.products.BOARD, [*given, *more])
        lines = [s for s in capsys.readouterr().out.splitlines() if s.startswith("Run: ")]
        return [(line.split(", ")[1], line.count("%")) for line in lines]

    whole = rounds()  # a round is an epoch, of three batches
    assert whole == [(f"Epoch: {n:02d}", 0 if n % 2 else 3) for n in (1, 2, 3, 4)]
    parts = rounds("--subnets", "0.5:2,0.5:1", "--local_steps", "3")
    assert parts == [("Epoch: 02", 0), ("Epoch: 03", 3), ("Epoch: 04", 3)]


def test_two_workers_print_what_one_process_does(scripts, root, capsys):
    given = ["--data_dir", str(root), *TINY, "--subnets", "2", "--local_steps", "2"]
    scripts.leaderboard.main(scripts.arxiv.BOARD, given)
    alone = capsys.readouterr().out
    started = ("other_cards.py", str(root / "cards"), str(OGB / "arxiv.py"))
    main, _ = run_workers(*started, *given, workers=2)
    assert main.stdout.splitlines()[:-1] == alone.splitlines()[:-1], "all but times and memory"


def test_results_on_a_stand_in_say_so(scripts, tmp_path, monkeypatch, capsys):
    small = csbm(num_nodes=90, num_features=6, num_classes=3, average_degree=6)
    small = dataclasses.replace(small, name="arxiv-like")
    monkeypatch.setitem(datasets._LOADERS, "arxiv-like", lambda: small)
    file = tmp_path / "out.json"
    given = ["--dataset", "arxiv-like", *TINY, "--subnets", "2", "--submission", str(file)]
    scripts.leaderboard.main(scripts.arxiv.BOARD, given)
    lines = capsys.readouterr().out.splitlines()
    for line in (lines[0], lines[lines.index("All runs:") - 1], lines[-1]):
        assert "a generated stand-in for ogbn-arxiv" in line
    entry = json.loads(file.read_text())
    assert (entry["method"], entry["paper"]) == ("GIST (GCN, m = 2)", scripts.leaderboard.PAPER)
    assert entry["stand_in_for"] == "ogbn-arxiv"
    assert any("stand-in" in text for text in entry["to_do"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--submission", "no/such/folder/out.json"], "the submission cannot be written there"),
        (["--data_dir", "no/such/folder"], "the raw files of ogbn-arxiv are not there"),
        (["--subnets", "many"], "cannot read the number of subnets"),
        (["--runs", "0"], "0 is less than 1"),
        (["--hidden", "8"], "unrecognized arguments"),
    ],
)
def test_what_cannot_be_run_is_refused(scripts, given, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as raised:
        scripts.leaderboard.main(scripts.arxiv.BOARD, given)
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


def test_a_score_that_ogbs_evaluator_does_not_find_is_refused(scripts, root, monkeypatch, capsys):
    monkeypatch.setattr(scripts.leaderboard, "official_score", lambda *_: -1.0)
    with pytest.raises(SystemExit):
        scripts.leaderboard.main(scripts.arxiv.BOARD, ["--data_dir", str(root), *TINY])
    assert "OGB's Evaluator finds another score" in capsys.readouterr().err


@pytest.mark.slow
def test_arxiv_like_has_the_shape_of_ogbn_arxiv():
    data, card, theirs = (
        load_dataset("arxiv-like"),
        load_card("arxiv-like"),
        load_card("ogbn-arxiv"),
    )
    sizes = [data.num_nodes, data.num_edges, data.num_features, data.num_classes]
    sizes += [int(data.mask(split).sum()) for split in ("train", "val", "test")]
    for known in (card, theirs):
        split = dataclasses.astuple(known.split)
        assert sizes == [known.nodes, known.edges, known.features, known.classes, *split]
    assert data.name == card.name
    assert torch.bincount(data.y).unique().tolist() == [4233, 4234]
