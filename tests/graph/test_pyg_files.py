"""Datasets that PyTorch Geometric parses, as tiny files in their official raw layouts."""

from __future__ import annotations

import dataclasses
import json

import networkx as nx
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch_geometric.datasets import PPI, Flickr, Reddit, Yelp
from torch_geometric.utils import coalesce

from gist import load_dataset
from gist.catalog.cards import load_card
from gist.errors import DataError
from gist.graph import datasets

NODES = 12
CLASSES = {"reddit": Reddit, "flickr": Flickr, "yelp": Yelp}


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """A data folder, from which on nothing may ask the network."""
    monkeypatch.delenv("GIST_DATA", raising=False)
    monkeypatch.setenv("GIST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a connection was tried"))
    return tmp_path


def ring():
    nodes = np.arange(NODES)
    ahead = sp.coo_matrix((np.ones(NODES), (nodes, np.roll(nodes, 1))), shape=(NODES, NODES))
    return (ahead + ahead.T).tocsr()


def write_reddit(raw):
    rng = np.random.default_rng(0)
    np.savez(
        raw / "reddit_data.npz",
        feature=rng.standard_normal((NODES, 3)),
        label=np.arange(NODES) % 4,
        node_types=np.repeat([1, 2, 3], 4),
    )
    sp.save_npz(raw / "reddit_graph.npz", ring().tocoo())


def write_saint(raw, labels):
    """The layout of GraphSAINT, of which Flickr and Yelp are."""
    matrix = ring()
    parts = {name: getattr(matrix, name) for name in ("data", "indices", "indptr", "shape")}
    np.savez(raw / "adj_full.npz", **parts)
    np.save(raw / "feats.npy", np.random.default_rng(0).standard_normal((NODES, 3)))
    (raw / "class_map.json").write_text(json.dumps({str(i): y for i, y in enumerate(labels)}))
    parts = {"tr": [0, 1, 2, 3], "va": [4, 5, 6, 7], "te": [8, 9, 10, 11]}
    (raw / "role.json").write_text(json.dumps(parts))


def write_ppi(raw):
    """Three training graphs, two for validation and one for testing, of unequal sizes."""
    rng = np.random.default_rng(0)
    for split, sizes in (("train", [3, 4, 2]), ("valid", [3, 2]), ("test", [5])):
        graph = nx.disjoint_union_all([nx.path_graph(size) for size in sizes])
        graph.add_edge(0, 0)  # self loops are left out
        links = nx.node_link_data(graph, edges="links")
        (raw / f"{split}_graph.json").write_text(json.dumps(links))
        count = sum(sizes)
        np.save(raw / f"{split}_feats.npy", rng.standard_normal((count, 3)))
        np.save(raw / f"{split}_labels.npy", rng.integers(2, size=(count, 4)))
        np.save(raw / f"{split}_graph_id.npy", np.repeat(np.arange(1, len(sizes) + 1), sizes))


WRITERS = {
    "reddit": write_reddit,
    "flickr": lambda raw: write_saint(raw, [i % 4 for i in range(NODES)]),
    "yelp": lambda raw: write_saint(raw, [[i % 2, i % 3 // 2, 1, 0] for i in range(NODES)]),
    "ppi": write_ppi,
}


@pytest.fixture(params=WRITERS)
def name(request, monkeypatch, offline):
    """The name of a dataset whose tiny raw files are in the cache, with a card that fits them."""
    raw = offline / "cache" / request.param / "raw"
    raw.mkdir(parents=True)
    WRITERS[request.param](raw)
    nodes, edges = (19, 26) if request.param == "ppi" else (NODES, 2 * NODES)
    card = load_card(request.param)
    card = dataclasses.replace(card, nodes=nodes, edges=edges, features=3, classes=4)
    monkeypatch.setattr(datasets, "load_card", lambda name: card)
    return request.param


def test_the_graph_is_what_pyg_makes_of_the_files(name, offline):
    data = load_dataset(name)
    card = load_card(name)
    assert (data.task, data.metric, data.name) == (card.task, card.metric, name)
    if name == "ppi":
        return
    place = offline / "theirs"
    place.mkdir()
    (place / "raw").symlink_to(offline / "cache" / name / "raw")
    theirs = CLASSES[name](str(place))[0]
    assert torch.equal(data.edge_index, coalesce(theirs.edge_index))
    for key in ("x", "train_mask", "val_mask", "test_mask"):
        assert torch.equal(getattr(data, key), theirs[key]), key
    assert torch.equal(data.y, theirs.y.to(data.y.dtype))


@pytest.mark.parametrize("name", ["ppi"], indirect=True)
def test_ppi_is_a_disjoint_union_split_by_graphs(name, offline):
    data = load_dataset(name)
    root = offline / "theirs"
    root.mkdir()
    (root / "raw").symlink_to(offline / "cache" / "ppi" / "raw")
    start = 0
    for split in ("train", "val", "test"):
        for graph in PPI(str(root), split=split):
            nodes = torch.arange(start, start + graph.num_nodes)
            assert torch.equal(data.x[nodes], graph.x)
            assert torch.equal(data.y[nodes], graph.y)
            assert bool(data.mask(split)[nodes].all())
            part = data.adjacency.subgraph(nodes)
            assert torch.equal(coalesce(part.edge_index), coalesce(graph.edge_index))
            start += graph.num_nodes
    assert start == data.num_nodes
    assert data.num_edges == 26, "none from one graph to another"


def test_only_our_own_files_are_kept(name, offline, capfd):
    raw = offline / "cache" / name
    before = sorted(raw.rglob("*"))
    first = load_dataset(name)
    assert sorted(raw.rglob("*")) == before
    assert sorted(path.name for path in (offline / "cache").iterdir()) == sorted(
        [name, "processed"]
    )
    for file in (raw / "raw").iterdir():
        file.unlink()
    assert load_dataset(name).fingerprint() == first.fingerprint()
    assert capfd.readouterr() == ("", "")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # PyG left it open
@pytest.mark.parametrize("content", [b"", b"no such format"])
def test_damaged_files_are_refused(name, offline, content):
    raw = offline / "cache" / name / "raw"
    for file in raw.iterdir():
        good = file.read_bytes()
        file.write_bytes(content or good[: len(good) // 2])
        with pytest.raises(DataError, match=rf"cannot read the raw files in .*{name}/raw.*prepare"):
            load_dataset(name)
        file.write_bytes(good)
    assert not any((offline / "cache" / "processed").iterdir())


@pytest.mark.parametrize("name", ["flickr"], indirect=True)
def test_a_split_of_nodes_that_are_not_there_is_refused(name, offline):
    role = offline / "cache" / "flickr" / "raw" / "role.json"
    role.write_text(json.dumps({"tr": [0], "va": [1], "te": [NODES]}))
    with pytest.raises(DataError, match=r"cannot read the raw files.*IndexError.*out of bounds"):
        load_dataset("flickr")


def test_files_of_another_dataset_are_refused(name, monkeypatch):
    monkeypatch.setattr(datasets, "load_card", load_card)
    with pytest.raises(DataError, match=rf"are not those of {name}; got: 1[29] nodes"):
        load_dataset(name)


def test_missing_files_are_named(name, offline):
    file = next((offline / "cache" / name / "raw").iterdir())
    file.unlink()
    with pytest.raises(DataError, match=rf"{name} lacks raw/{file.name}; .*gist prepare {name}"):
        load_dataset(name)
