"""Generated graphs, and graphs by name."""

from __future__ import annotations

import dataclasses
import hashlib
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_geometric.datasets import Planetoid
from torch_geometric.utils import coalesce

from gist.catalog import download
from gist.catalog.cards import list_cards, load_card
from gist.catalog.records import GraphCard
from gist.errors import ConfigError, DataError
from gist.graph import datasets
from gist.graph.adjacency import Adjacency
from gist.graph.datasets import load_dataset, prepare_dataset
from gist.graph.generate import csbm, digits

PLANETOID = ("cora", "citeseer", "pubmed")


@pytest.fixture
def places(monkeypatch, tmp_path):
    """An empty GIST_DATA and an empty GIST_CACHE."""
    folders = {name: tmp_path / name.lower() for name in ("GIST_DATA", "GIST_CACHE")}
    for name, folder in folders.items():
        folder.mkdir()
        monkeypatch.setenv(name, str(folder))
    return folders["GIST_DATA"], folders["GIST_CACHE"]


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A data folder with a small "pubmed" in the official raw layout, and a card that fits it.

    The public split is 500 validation nodes after the training nodes, and the listed test nodes.
    """
    root, rng = tmp_path / "tiny", np.random.default_rng(0)
    raw = root / "planetoid" / "PubMed" / "raw"
    raw.mkdir(parents=True)
    train, labelled, test = 6, 506, 4
    x = sp.random_array((labelled + test, 5), density=0.5, rng=rng, format="csr")
    y = np.eye(3, dtype=np.int32)[np.arange(labelled + test) % 3]
    ring = {i: [(i + 1) % len(y), (i - 1) % len(y)] for i in range(len(y))}
    parts = {"x": x[:train], "allx": x[:labelled], "tx": x[labelled:], "graph": ring}
    parts |= {"y": y[:train], "ally": y[:labelled], "ty": y[labelled:]}
    for name, part in parts.items():
        (raw / f"ind.pubmed.{name}").write_bytes(pickle.dumps(part, protocol=2))
    (raw / "ind.pubmed.test.index").write_text("\n".join(map(str, range(labelled, len(y)))) + "\n")
    card = dataclasses.replace(load_card("pubmed"), nodes=len(y), edges=2 * len(y), features=5)
    card = dataclasses.replace(card, urls={"raw/": f"{raw.as_uri()}/"})
    monkeypatch.setattr(datasets, "load_card", lambda name: card)
    monkeypatch.setattr(download, "_TRIES", 1)
    return root


def from_nowhere(monkeypatch):
    """From now on a download of the tiny "pubmed" fails."""
    card = dataclasses.replace(datasets.load_card("pubmed"), urls={"raw/": "file:///nowhere/"})
    monkeypatch.setattr(datasets, "load_card", lambda name: card)


def state_of(folder):
    """Paths below a folder and when they changed, to see that nothing was written."""
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


# --- generated -------------------------------------------------------------------------------


def test_digits_is_the_same_everywhere():
    data = digits()
    assert data.fingerprint() == digits().fingerprint()
    counts = torch.bincount(data.y[data.train_mask], minlength=10)
    assert counts.tolist() == [5] * 10
    assert float(data.x.min()) >= 0
    assert float(data.x.max()) == 1.0
    degree = torch.bincount(data.edge_index[0])
    assert int(degree.min()) >= 10  # each chooses ten, and is chosen by others
    assert not bool((data.edge_index[0] == data.edge_index[1]).any())


def test_digits_neighbours_are_the_nearest():
    data = digits(neighbours=1)
    distance = torch.cdist(data.x.double(), data.x.double()).fill_diagonal_(torch.inf)
    found = distance[data.edge_index[0], data.edge_index[1]]
    nearest = distance.min(1).values
    either = torch.minimum(nearest[data.edge_index[0]], nearest[data.edge_index[1]])
    mutual = torch.isclose(found, nearest[data.edge_index[0]])
    assert bool((mutual | torch.isclose(found, nearest[data.edge_index[1]])).all())
    assert bool((found >= either).all())


def test_digits_refuses_settings_out_of_range():
    with pytest.raises(ConfigError, match="neighbours is out of range; got: 0; expected: a whole"):
        digits(neighbours=0)
    with pytest.raises(ConfigError, match=r"train_per_class is out of range; got: 5.0"):
        digits(train_per_class=5.0)


@settings(deadline=None, max_examples=30)
@given(
    st.integers(20, 200),
    st.integers(2, 5),
    st.floats(0, 1),
    st.floats(1, 4),
    st.sampled_from([None, 2.1, 3.0]),
    st.integers(0, 100),
)
def test_csbm_is_a_simple_graph_of_the_asked_size(n, c, homophily, degree, exponent, seed):
    options = {
        "num_nodes": n,
        "num_classes": c,
        "num_features": 3,
        "homophily": homophily,
        "average_degree": degree / 2,
        "degree_exponent": exponent,
        "seed": seed,
    }
    data = csbm(**options)
    undirected = max(round(n * degree / 4), 1)
    source, target = data.edge_index
    assert data.num_edges == 2 * undirected
    assert not bool((source == target).any())
    assert len(torch.unique(source * n + target)) == data.num_edges
    assert data.adjacency.is_symmetric
    assert int((data.y[source] == data.y[target]).sum()) == 2 * round(undirected * homophily)
    sizes = torch.bincount(data.y, minlength=c)
    assert int(sizes.max() - sizes.min()) <= 1
    assert data.fingerprint() == csbm(**options).fingerprint()
    assert data.fingerprint() != csbm(**(options | {"seed": seed + 1})).fingerprint()


def test_csbm_degrees_follow_a_power_law_only_where_asked():
    flat, heavy = (
        torch.bincount(csbm(num_nodes=5000, degree_exponent=e, seed=1).edge_index[0]).double()
        for e in (None, 2.5)
    )
    assert float(flat.mean()) == pytest.approx(20, rel=0.01)
    assert float(flat.var()) == pytest.approx(20, rel=0.15)  # Poisson
    assert float(heavy.max()) > 4 * float(flat.max())


def test_csbm_features_lie_around_class_centres():
    data = csbm(num_nodes=20_000, num_classes=2, num_features=50, feature_signal=3.0)
    for label in (0, 1):
        x = data.x[data.y == label]
        assert float(x.mean(0).norm()) == pytest.approx(3.0, rel=0.03)
        assert float(x.std(0).mean()) == pytest.approx(1.0, rel=0.03)


def test_csbm_shares():
    data = csbm(num_nodes=1000, num_classes=4, train_share=0.1, val_share=0.3)
    assert [int(data.mask(s).sum()) for s in ("train", "val", "test")] == [100, 300, 600]


@pytest.mark.parametrize(
    ("match", "options"),
    [
        (
            "num_classes is out of range; got: 1; expected: a whole number of at least 2",
            {"num_classes": 1},
        ),
        ("num_nodes is out of range; got: 7; expected: .* at least 8", {"num_nodes": 7}),
        ("num_nodes is out of range; got: 100.5", {"num_nodes": 100.5}),
        ("num_features is out of range; got: 0", {"num_features": 0}),
        ("average_degree is out of range; got: 0", {"average_degree": 0}),
        ("average_degree is out of range; got: nan", {"average_degree": float("nan")}),
        ("average_degree is out of range; got: 100", {"average_degree": 100}),
        ("homophily is out of range; got: 1.1; expected: a number from 0 to 1", {"homophily": 1.1}),
        ("feature_signal is out of range; got: -1", {"feature_signal": -1}),
        ("degree_exponent is out of range; got: 2", {"degree_exponent": 2}),
        ("seed is out of range; got: -1", {"seed": -1}),
        ("seed is out of range; got: True", {"seed": True}),
        ("train_share and val_share must leave", {"train_share": 0.5, "val_share": 0.5}),
        ("train_share and val_share must leave", {"train_share": 0.0}),
        (
            "too dense: no .* within a class were found.*lower average_degree",
            {"average_degree": 40, "homophily": 1.0},
        ),
    ],
)
def test_csbm_refuses(match, options):
    with pytest.raises(ConfigError, match=match):
        csbm(**({"num_nodes": 100, "num_classes": 4, "num_features": 2} | options))


@pytest.mark.slow
def test_csbm_with_200_000_nodes_takes_seconds():
    start = time.perf_counter()
    data = csbm(num_nodes=200_000)
    assert data.num_edges == 4_000_000
    assert time.perf_counter() - start < 60


# --- by name ---------------------------------------------------------------------------------


def test_every_graph_has_a_card():
    names = [name for name in list_cards() if isinstance(load_card(name), GraphCard)]
    assert set(names) == datasets._LOADERS.keys()


def test_samples_are_no_graph():
    for action in (load_dataset, prepare_dataset, datasets.find_card):
        with pytest.raises(ConfigError, match=r"is no graph; got: mnist; .*reads both"):
            action("mnist")


def agrees(data, card):
    """Whether the data is as the card says."""
    counts = (data.num_nodes, data.num_edges, data.num_features, data.num_classes)
    assert counts == (card.nodes, card.edges, card.features, card.classes)
    assert (data.task, data.metric, data.name) == (card.task, card.metric, card.name)
    split = {name: int(data.mask(name).sum()) for name in ("train", "val", "test")}
    assert split == dataclasses.asdict(card.split)


@pytest.mark.parametrize("name", ["digits", "csbm"])
def test_generated_datasets_are_as_their_cards_say(name):
    agrees(load_dataset(name), load_card(name))


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["cora", "citeseer"])
def test_real_datasets_are_as_their_cards_say(real_data_root, capfd, name):
    before = state_of(real_data_root / "planetoid")
    data = load_dataset(name, root=real_data_root)
    agrees(data, load_card(name))
    rows = data.x.sum(1)
    assert torch.allclose(rows[rows > 0], torch.ones(()))
    raw = load_dataset(name, root=real_data_root, normalize_features=False)
    assert raw.x.unique().tolist() == [0.0, 1.0]
    assert state_of(real_data_root / "planetoid") == before
    assert capfd.readouterr() == ("", "")


@pytest.mark.realdata
def test_cora_equals_what_pyg_makes_of_it(real_data_root, tmp_path):
    (tmp_path / "Cora").mkdir()
    (tmp_path / "Cora" / "raw").symlink_to(real_data_root / "planetoid" / "Cora" / "raw")
    theirs = Planetoid(str(tmp_path), "Cora")[0]
    ours = load_dataset("cora", root=real_data_root, normalize_features=False)
    assert torch.equal(ours.edge_index, coalesce(theirs.edge_index))
    for name in ("x", "y", "train_mask", "val_mask", "test_mask"):
        assert torch.equal(getattr(ours, name), theirs[name]), name


@pytest.mark.realdata
def test_damaged_raw_files_are_named(real_data_root, tmp_path):
    for file in load_card("cora").files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes((real_data_root / file).read_bytes())
    with (tmp_path / "planetoid/Cora/raw/ind.cora.tx").open("ab") as stream:
        stream.write(b"x")
    for action in (load_dataset, prepare_dataset):
        with pytest.raises(DataError, match=r"ind\.cora\.tx is damaged.*b9afbaa4.*'cora', root="):
            action("cora", root=tmp_path)


def test_generators_take_options_and_a_seed():
    data = load_dataset("csbm", num_nodes=300, num_features=7, num_classes=3, seed=5)
    assert (data.num_nodes, data.num_features, data.num_classes) == (300, 7, 3)
    same = csbm(num_nodes=300, num_features=7, num_classes=3, seed=5)
    assert data.fingerprint() == same.fingerprint()
    assert load_dataset("digits", seed=1).fingerprint() == load_dataset("digits").fingerprint()


@pytest.mark.parametrize(
    ("name", "option", "expected"),
    [
        ("digits", "num_nodes", "neighbours or train_per_class$"),
        ("csbm", "nodes", "average_degree or .*val_share$"),
        ("cora", "split", "normalize_features$"),
        ("cora", "card", "normalize_features$"),
        ("cora", "folder", "normalize_features$"),
    ],
)
def test_unknown_options_list_the_known_ones(name, option, expected):
    match = f"options that {name} does not have; got: {option}; expected: {expected}"
    with pytest.raises(ConfigError, match=match):
        load_dataset(name, **{option: 1})


@pytest.mark.parametrize("name", PLANETOID)
def test_missing_raw_files_say_which_go_where(places, name):
    with pytest.raises(DataError) as raised:
        load_dataset(name)
    message = str(raised.value)
    for place in places:
        assert f"{place} lacks planetoid/" in message
    assert f"raw/ind.{name}.allx and 5 more" in message
    assert f"gist prepare {name}" in message
    assert "GIST_DATA" in message


def test_a_saved_graph_may_be_named_by_a_path_object(tmp_path, monkeypatch):
    data = csbm(num_nodes=20, num_classes=2, num_features=2, average_degree=4)
    monkeypatch.chdir(tmp_path)
    data.save("mine")
    for path in (Path("mine"), tmp_path / "mine", "mine"):
        assert load_dataset(path).fingerprint() == data.fingerprint()
    assert load_dataset(Path("digits")).name == "digits"


def test_a_root_replaces_the_places(places, tmp_path):
    root = tmp_path / "mine"
    with pytest.raises(DataError, match=f"{root} does not exist") as raised:
        load_dataset("cora", root=root)
    message = str(raised.value)
    assert str(places[0]) not in message
    assert f"gist.prepare_dataset('cora', root='{root}')" in message
    assert "GIST_DATA" not in message
    assert "gist prepare" not in message


def test_the_folder_that_has_some_of_the_files_is_named(tmp_path):
    raw = tmp_path / "ogb" / "arxiv" / "raw"
    raw.mkdir(parents=True)
    (tmp_path / "arxiv").mkdir()
    (raw / "edge.csv.gz").touch()
    lacks = f"got: {raw.parent} lacks raw/node-feat.csv.gz, raw/node-label.csv.gz, "
    with pytest.raises(DataError, match=f"{lacks}raw/num-node-list.csv.gz and 4 more;"):
        load_dataset("ogbn-arxiv", root=tmp_path)


def test_the_cache_is_below_home_by_default(monkeypatch, tmp_path):
    monkeypatch.delenv("GIST_DATA", raising=False)
    monkeypatch.delenv("GIST_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(DataError, match=f"{tmp_path}/.cache/gist does not exist"):
        load_dataset("cora")


def test_the_official_layout_is_read(tiny):
    data = load_dataset("pubmed", root=tiny)
    assert [int(data.mask(s).sum()) for s in ("train", "val", "test")] == [6, 500, 4]
    assert data.num_edges == 1020


def test_statistics_guard_where_checksums_are_unknown(tiny, monkeypatch):
    monkeypatch.setattr(datasets, "load_card", load_card)
    with pytest.raises(DataError, match=r"not those of pubmed; got: 510 nodes.*19,717"):
        load_dataset("pubmed", root=tiny)


@pytest.mark.parametrize("content", [b"", b"not a pickle", pickle.dumps(sp.eye_array(2))[:-20]])
def test_unreadable_raw_files_are_refused(tiny, content):
    (tiny / "planetoid/PubMed/raw/ind.pubmed.tx").write_bytes(content)
    with pytest.raises(DataError, match=r"cannot read the raw files in .*PubMed/raw.*prepare"):
        load_dataset("pubmed", root=tiny)


# --- preparing -------------------------------------------------------------------------------


def test_generated_datasets_need_no_preparing():
    assert prepare_dataset("digits") is None
    assert prepare_dataset("csbm") is None


def test_preparing_downloads_into_the_cache_once(tiny, places, monkeypatch):
    data, cache = places
    assert prepare_dataset("pubmed") == cache / "planetoid" / "PubMed"
    assert not any(data.iterdir())
    assert [path.name for path in cache.iterdir()] == ["planetoid"]
    assert load_dataset("pubmed").num_nodes == 510
    from_nowhere(monkeypatch)
    assert prepare_dataset("pubmed") == cache / "planetoid" / "PubMed"


def test_preparing_takes_what_is_in_the_data_folder(tiny, places, monkeypatch):
    monkeypatch.setenv("GIST_DATA", str(tiny))
    from_nowhere(monkeypatch)
    assert prepare_dataset("pubmed") == tiny / "planetoid" / "PubMed"
    assert not any(places[1].iterdir())


def test_files_that_were_put_there_are_not_downloaded(tiny, places):
    graph = tiny / "planetoid/PubMed/raw/ind.pubmed.graph"
    there = places[1] / "planetoid/PubMed/raw" / graph.name
    there.parent.mkdir(parents=True)
    graph.rename(there)
    with pytest.raises(DataError, match=r"PubMed lacks raw/ind\.pubmed\.x,"):
        load_dataset("pubmed")
    assert prepare_dataset("pubmed") == places[1] / "planetoid" / "PubMed"
    assert not there.is_symlink()


def test_a_failed_download_leaves_nothing(tiny, places, monkeypatch):
    (tiny / "planetoid/PubMed/raw/ind.pubmed.graph").unlink()
    with pytest.raises(DataError) as raised:
        prepare_dataset("pubmed")
    message = str(raised.value)
    assert "cannot download file:" in message
    assert f"put it at {places[1]}/planetoid/PubMed/raw/ind.pubmed.graph" in message
    assert not any(places[1].iterdir())


def test_a_download_of_another_version_leaves_nothing(tiny, places, monkeypatch):
    card = datasets.load_card("pubmed")
    wrong = dict.fromkeys(card.checksums, hashlib.sha256(b"other").hexdigest())
    card = dataclasses.replace(card, checksums=wrong)
    monkeypatch.setattr(datasets, "load_card", lambda name: card)
    with pytest.raises(DataError, match=r"PubMed/raw/ind\.pubmed\.x is damaged or of another"):
        prepare_dataset("pubmed")
    assert not any(places[1].iterdir())


def test_what_is_loaded_can_be_multiplied(tiny):
    data = load_dataset("pubmed", root=tiny)
    assert isinstance(data.adjacency, Adjacency)
    assert data.adjacency.is_symmetric
    assert data.adjacency.propagate("gcn", data.x).shape == data.x.shape
