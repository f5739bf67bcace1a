"""Datasets of the Open Graph Benchmark in its raw layout, and its own loaders and evaluator."""

from __future__ import annotations

import csv
import gzip
import importlib
import subprocess
import sys
from importlib.metadata import distribution
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch_geometric.utils import coalesce, to_undirected

from gist import GraphData, load_dataset
from gist.catalog import cards
from gist.catalog.cards import load_card
from gist.errors import ConfigError, DataError, MissingDependencyError
from gist.graph.ogb_files import official_score
from gist.metrics import compute_metric
from tests.ogb_layout import SPLITS, write_cards, write_ogb_layout

NAMES = ("ogbn-arxiv", "ogbn-products", "ogbn-proteins")
NODES = 23


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """No GIST_DATA, an empty GIST_CACHE."""
    monkeypatch.delenv("GIST_DATA", raising=False)
    monkeypatch.setenv("GIST_CACHE", str(tmp_path))
    use_cards(monkeypatch, tmp_path / "cards", edges=100)
    return tmp_path


def use_cards(monkeypatch, folder, edges):
    """From now on the cards say what sizes the tiny datasets have."""
    names = (*NAMES, "amazon2m")
    features = {name: 8 if name == "ogbn-proteins" else 4 for name in names}
    changes = {n: {"nodes": NODES, "edges": edges, "features": features[n]} for n in names}
    monkeypatch.setattr(cards, "_PLACES", (write_cards(folder, changes),))


def write(folder, name, seed=0):
    """A tiny dataset of that name below ``folder``, and what was written."""
    rng = np.random.default_rng(seed)
    one = rng.permutation(NODES * (NODES - 1) // 2)[:50]
    edges = np.stack(np.triu_indices(NODES, 1))[:, one]
    edges[:, ::3] = edges[::-1, ::3]  # either direction
    proteins = name == "ogbn-proteins"
    card = load_card(name)
    given = SimpleNamespace(
        edges=edges,
        x=None if proteins else rng.standard_normal((NODES, 4)).astype(np.float32),
        attr=rng.random((50, 8)).astype(np.float32).round(3) if proteins else None,
        y=rng.integers(2 if proteins else card.classes, size=(NODES, 112 if proteins else 1)),
        split=dict(
            zip(("train", "valid", "test"), np.split(rng.permutation(NODES), (9, 15)), strict=True)
        ),
    )
    extra = {"ogbn-arxiv": "node_year", "ogbn-proteins": "node_species"}
    files = {extra[name]: np.full(NODES, 2017)} if name in extra else None
    parts = (given.edges, given.x, given.y, given.split)
    given.folder = write_ogb_layout(folder, name, *parts, edge_feat=given.attr, node_files=files)
    return given


def table(file, rows):
    """Replaces a file by these lines."""
    with gzip.open(file, "wt") as stream:
        stream.write("".join(f"{row}\n" for row in rows))


# --- reading ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_dataset_is_what_its_files_say(cache, name):
    given = write(cache / "ogb", name)
    data = load_dataset(name)
    card = load_card(name)
    assert (data.task, data.metric, data.num_classes) == (card.task, card.metric, card.classes)
    assert torch.equal(data.edge_index, coalesce(to_undirected(torch.tensor(given.edges))))
    assert torch.equal(data.y, torch.tensor(given.y).squeeze(1).to(data.y.dtype))
    for split, part in (("train", "train"), ("val", "valid"), ("test", "test")):
        assert data.mask(split).nonzero()[:, 0].tolist() == sorted(given.split[part])
    if given.x is not None:
        assert torch.equal(data.x, torch.from_numpy(given.x))


def test_proteins_carry_the_features_of_their_edges(cache):
    given = write(cache / "ogb", "ogbn-proteins")
    data = load_dataset("ogbn-proteins")
    of = {
        frozenset(pair): row for pair, row in zip(given.edges.T.tolist(), given.attr, strict=True)
    }
    expected = np.stack([of[frozenset(pair)] for pair in data.edge_index.T.tolist()])
    assert torch.equal(data.edge_attr, torch.from_numpy(expected))
    for node in range(NODES):
        rows = expected[(data.edge_index[1] == node).numpy()]
        mean = rows.mean(axis=0, dtype=np.float64) if len(rows) else np.zeros(8)
        assert torch.equal(data.x[node], torch.from_numpy(mean.astype(np.float32)))
    without = load_dataset("ogbn-proteins", edge_features=False)
    assert without.edge_attr is None
    assert torch.equal(without.x, data.x)


def test_arxiv_may_stay_directed(cache):
    given = write(cache / "ogb", "ogbn-arxiv")
    data = load_dataset("ogbn-arxiv", symmetrize=False)
    assert data.directed
    assert torch.equal(data.edge_index, coalesce(torch.tensor(given.edges)))


def test_products_count_self_loops_twice_as_ogb_does(cache, monkeypatch):
    use_cards(monkeypatch, cache / "others", edges=4)
    folder = write(cache / "ogb", "ogbn-products").folder
    table(folder / "raw" / "edge.csv.gz", ["3,3", "0,1"])
    table(folder / "raw" / "num-edge-list.csv.gz", [2])
    assert load_dataset("ogbn-products").edge_index.tolist() == [[0, 1, 3, 3], [1, 0, 3, 3]]


@pytest.mark.parametrize("place", ["ogb/arxiv", "ogbn_arxiv", "arxiv"])
def test_the_folder_may_have_any_of_the_usual_names(cache, place):
    given = write(cache / "elsewhere", "ogbn-arxiv")
    (cache / place).parent.mkdir(exist_ok=True)
    given.folder.rename(cache / place)
    assert load_dataset("ogbn-arxiv").num_nodes == NODES


def test_a_missing_release_file_asks_nothing(cache, monkeypatch):
    given = write(cache / "ogb", "ogbn-arxiv")
    (given.folder / "RELEASE_v1.txt").unlink()
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    assert load_dataset("ogbn-arxiv").num_nodes == NODES


def test_amazon2m_is_another_split_of_products(cache):
    write(cache / "ogb", "ogbn-products")
    data, products = load_dataset("amazon2m"), load_dataset("ogbn-products")
    assert torch.equal(data.edge_index, products.edge_index)
    train, val, test = (data.mask(split) for split in ("train", "val", "test"))
    order = np.random.default_rng(0).permutation(NODES)
    assert train.nonzero()[:, 0].tolist() == sorted(order[:16])  # 23 * 1,709,997 / 2,449,029
    assert bool((train ^ val ^ test).all())
    assert data.fingerprint() == load_dataset("amazon2m").fingerprint()


def test_options_are_switched_on_or_off(cache):
    write(cache / "ogb", "ogbn-arxiv")
    with pytest.raises(ConfigError, match="symmetrize is switched on or off; got: 'False'"):
        load_dataset("ogbn-arxiv", symmetrize="False")


# --- bad files -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "rows", "message"),
    [
        ("raw/edge", ["1,x"], "could not convert string to float"),
        ("raw/edge", ["1"] * 50, "got: 1 columns; expected: 2"),
        ("raw/edge", ["1,2", "1"], "got: nan in row 2; expected: as many finite numbers in each"),
        ("raw/edge", ["1,2", "1,2,3"], "Expected 2 fields in line 2, saw 3"),
        ("raw/edge", ["1,2", "1,23"], "got: 23 in row 2; expected: 0 to 22, since there are 23"),
        ("raw/edge", ["1,2", "1,-1"], "got: -1 in row 2"),
        ("raw/edge", ["1,2"], "got: 1 rows; expected: 50"),
        ("raw/edge", [], "No columns to parse"),
        ("raw/node-feat", ["1,2"] * 22, "got: 22 rows; expected: 23"),
        ("raw/node-feat", ["1,2"] * 22 + ["1,nan"], "got: nan in row 23"),
        ("raw/node-label", ["1"] * 22 + ["1.5"], "got: 1.5 in row 23; expected: whole numbers"),
        ("raw/node-label", ["1"] * 22 + ["40"], "labels out of range.*got: 40 .*expected: 0 to 39"),
        ("raw/num-node-list", ["24"], "node-feat.csv.gz is damaged; got: 23 rows; expected: 24"),
        ("raw/num-edge-list", ["50", "1"], "num-edge-list.csv.gz is damaged; got: 2 rows"),
        ("split/time/train", ["1", "23"], "got: 23 in row 2; expected: 0 to 22"),
        ("split/time/valid", ["0"] * 2, "names a node more than once"),
    ],
)
def test_bad_files_are_refused_and_nothing_is_kept(cache, file, rows, message):
    folder = write(cache / "ogb", "ogbn-arxiv").folder
    table(folder / f"{file}.csv.gz", rows)
    with pytest.raises(DataError, match=message) as raised:
        load_dataset("ogbn-arxiv")
    assert str(folder) in str(raised.value)
    assert "gist prepare" in str(raised.value)
    assert not any((cache / "processed").iterdir())


def test_a_cut_off_file_is_refused(cache):
    file = write(cache / "ogb", "ogbn-arxiv").folder / "raw" / "node-feat.csv.gz"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"node-feat\.csv\.gz is damaged; got: .*end"):
        load_dataset("ogbn-arxiv")
    file.write_bytes(b"<html>")
    with pytest.raises(DataError, match=r"node-feat\.csv\.gz is damaged; got: Not a gzip"):
        load_dataset("ogbn-arxiv")


def test_without_pandas_the_extra_is_named(cache, monkeypatch):
    write(cache / "ogb", "ogbn-arxiv")
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingDependencyError, match=r"pandas.* is not installed.*\[ogb\]"):
        load_dataset("ogbn-arxiv")


# --- OGB itself ------------------------------------------------------------------------------


def test_the_layouts_are_those_of_ogbs_list():
    file = distribution("ogb").locate_file("ogb/nodeproppred/master.csv")
    with open(file, newline="", encoding="utf-8") as stream:
        rows = {row[""]: row for row in csv.DictReader(stream)}
    for name in NAMES:
        card, of = load_card(name), {key: row[name] for key, row in rows.items()}
        assert list(card.urls.values()) == [of["url"].replace("http:", "https:")]
        assert of["split"] == SPLITS[name]
        assert f"split/{of['split']}/train.csv.gz" in card.checksums
        for files, kind in (("node-feat", "has_node_attr"), ("edge-feat", "has_edge_attr")):
            assert (of[kind] == "True") == (f"raw/{files}.csv.gz" in card.checksums)
        assert of["add_inverse_edge"] == str(name != "ogbn-arxiv")
        assert card.metric == {"acc": "accuracy", "rocauc": "roc_auc"}[of["eval metric"]]
        assert card.classes == int(of["num tasks" if card.task == "multilabel" else "num classes"])
        assert of["binary"] == of["is hetero"] == "False"


@pytest.fixture
def ogb(monkeypatch):
    """OGB's loaders, which unpickle what they wrote."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.setenv("OUTDATED_IGNORE", "1")  # OGB sets it, for good
    monkeypatch.setitem(sys.modules, "outdated", None)  # else it asks the network
    return importlib.import_module("ogb.nodeproppred")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["", "Pyg", "Dgl"])
@pytest.mark.parametrize("name", NAMES)
def test_datasets_of_ogb_are_the_same_graphs(cache, ogb, name, kind):
    write(cache / "ogb", name)
    theirs = getattr(ogb, f"{kind}NodePropPredDataset")(name, root=str(cache / "ogb"))
    data = GraphData.from_ogb(theirs)
    assert data.name == name
    assert data.fingerprint() == load_dataset(name).fingerprint()


@pytest.mark.filterwarnings("ignore")
def test_an_edge_that_ogbs_files_name_twice_is_one(cache, ogb, monkeypatch):
    folder = write(cache / "ogb", "ogbn-arxiv").folder
    table(folder / "raw" / "edge.csv.gz", ["0,1", "0,1", "2,0", "0,2"])
    table(folder / "raw" / "num-edge-list.csv.gz", [4])
    use_cards(monkeypatch, cache / "others", edges=4)
    theirs = ogb.NodePropPredDataset("ogbn-arxiv", root=str(cache / "ogb"))
    data = GraphData.from_ogb(theirs)
    assert data.edge_index.tolist() == [[0, 0, 1, 2], [1, 2, 0, 0]]
    assert data.fingerprint() == load_dataset("ogbn-arxiv").fingerprint()


@pytest.mark.filterwarnings("ignore")
def test_a_dataset_of_ones_own_goes_through_ogbs_loader(cache, ogb):
    folder = write(cache, "ogbn-arxiv").folder
    meta = {
        "dir_path": str(folder), "version": 1, "download_name": "mine", "num tasks": 1,
        "task type": "multiclass classification", "eval metric": "acc", "num classes": 40,
        "is hetero": "False", "binary": "False", "add_inverse_edge": "False", "split": "time",
        "additional node files": "None", "additional edge files": "None", "url": "",
    }  # fmt: skip
    dataset = ogb.NodePropPredDataset("mine", meta_dict=meta)
    assert GraphData.from_ogb(dataset, directed=True, name="yours").name == "yours"
    assert GraphData.from_ogb(dataset, directed=True).num_edges == 50
    assert GraphData.from_ogb(dataset).num_edges == 100
    dataset.__class__ = type("Mine", (ogb.NodePropPredDataset,), {"__module__": "mine"})
    assert GraphData.of(dataset).num_edges == 100


def test_from_ogb_refuses_what_is_no_dataset_of_ogb():
    with pytest.raises(DataError, match=r"from_ogb reads a dataset.*got: list.*NodePropPred"):
        GraphData.from_ogb([1])
    mag = type("Mag", (), {"get_idx_split": dict, "__getitem__": lambda *_: ({}, {})})()
    with pytest.raises(DataError, match="one graph of one type"):
        GraphData.from_ogb(mag)


# --- the official score ----------------------------------------------------------------------


def test_the_official_accuracy_is_ours():
    generator = torch.Generator().manual_seed(0)
    scores, y = torch.randn(50, 40, generator=generator), torch.arange(50) % 40
    scores[torch.arange(25), y[:25]] += 5
    nodes = torch.arange(10, 40)
    assert official_score("ogbn-arxiv", scores, y, nodes) == compute_metric(
        "accuracy", scores, y, nodes
    )


def test_the_official_roc_auc_is_ours():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(30, 112, generator=generator)
    y = (torch.rand(30, 112, generator=generator) > 0.5).float()
    nodes = torch.arange(5, 25)
    assert official_score("ogbn-proteins", scores, y, nodes) == pytest.approx(
        compute_metric("roc_auc", scores, y, nodes), abs=1e-12
    )
    with pytest.raises(
        DataError, match=r"evaluator of ogbn-proteins refuses; got: .*should be 112"
    ):
        official_score("ogbn-proteins", scores[:, :3], y[:, :3], nodes)


def test_unknown_names_have_no_official_score():
    with pytest.raises(ConfigError, match="OGB does not know this dataset; got: 'cora'"):
        official_score("cora", torch.zeros(1, 2), torch.zeros(1).long(), torch.zeros(1).long())


_OFFLINE = """
import os, socket, sys, threading

def refuse(*_):
    sys.exit("a connection was tried")

socket.socket.connect = socket.getaddrinfo = refuse
before = dict(os.environ)
import torch
from gist.graph.ogb_files import official_score

assert official_score("ogbn-arxiv", torch.eye(2, 40), torch.arange(2), torch.arange(2)) == 1
assert threading.active_count() == 1, "no thread asks for a newer version"
assert not {"ogb", "outdated", "dgl"} & sys.modules.keys()
assert dict(os.environ) == before
"""


@pytest.mark.slow
def test_the_evaluator_makes_no_connection_and_changes_nothing():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _OFFLINE],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
