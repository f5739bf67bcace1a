"""Graphs saved and loaded: bit for bit, complete or not there, and nothing computed again."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gist import load_dataset
from gist.errors import ConfigError, DataError
from gist.graph import files
from gist.graph.adjacency import Adjacency
from gist.graph.data import GraphData

SETTINGS = ("task", "metric", "num_classes", "directed", "name")
KNOWN = ("is_symmetric", "has_symmetric_pattern", "has_self_loops")
FORMATS = ("graph.npz", "graph")
EDGES = np.array([[0, 1, 1, 2, 2, 3], [1, 0, 2, 1, 3, 2]])
PATH = {
    "edge_index": EDGES,
    "x": np.arange(8, dtype=np.float32).reshape(4, 2),
    "y": np.array([0, 1, 2, 0]),
    "train": np.array([0, 1]),
    "val": np.array([False, False, True, False]),
    "test": np.array([3]),
}


def same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.dtype == other.dtype and torch.equal(one, other)


def assert_same(one: GraphData, other: GraphData) -> None:
    for name in SETTINGS:
        assert getattr(one, name) == getattr(other, name), name
    for name in ("x", "y", "train_mask", "val_mask", "test_mask"):
        assert same(getattr(one, name), getattr(other, name)), name
    for name in ("edge_index", "edge_weight", "edge_attr"):
        assert same(getattr(one, name), getattr(other, name)), name
    assert all(map(same, one.adjacency.rows, other.adjacency.rows))
    for name in KNOWN:
        assert getattr(one.adjacency, name) == getattr(other.adjacency, name), name
    assert one.fingerprint() == other.fingerprint()


@st.composite
def graphs(draw: st.DrawFn) -> GraphData:
    """Of every task, with and without directions, weights, features of edges, duplicates."""
    nodes = draw(st.integers(4, 9))
    pairs = draw(st.lists(st.tuples(*[st.integers(0, nodes - 1)] * 2), max_size=20))
    directed = draw(st.booleans())
    if not directed:
        pairs += [(v, u) for u, v in pairs]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    task = draw(st.sampled_from(["multiclass", "binary", "multilabel"]))
    double = draw(st.booleans())
    columns = (nodes, 3) if task == "multilabel" else (nodes,)
    carried = {}
    if directed and draw(st.booleans()):
        carried["edge_weight"] = torch.randn(len(pairs), generator=generator)
    if draw(st.booleans()):
        carried["edge_attr"] = torch.randn(len(pairs), 2, generator=generator)
    return GraphData.from_edges(
        torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T,
        torch.randn(nodes, 3, generator=generator, dtype=torch.float64 if double else None),
        torch.randint(0, 2, columns, generator=generator),
        train=[0],
        val=[2, 1],
        test=[3],
        task=task,
        num_classes=2 if task == "multiclass" else None,
        directed=directed,
        name=draw(st.sampled_from(["graph", "größe 1"])),
        **carried,
    )


@pytest.mark.parametrize("name", FORMATS)
@given(data=graphs())
def test_what_is_loaded_is_what_was_saved(name, data, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "below" / name
    assert data.save(str(path)) == path
    assert_same(GraphData.load(str(path)), data)
    loaded = GraphData.load(path)
    assert_same(GraphData.load(loaded.save(path)), data)  # over itself
    assert sorted(path.parent.iterdir()) == [path]


def test_a_folder_is_opened_without_reading_or_computing(tmp_path, monkeypatch):
    data = load_dataset("csbm", num_nodes=60, num_features=4, num_classes=3)
    data.save(tmp_path / "graph")
    for name in ("_check_splits", "_check_labels", "_check_symmetry"):
        monkeypatch.delattr(GraphData, name)
    for name in ("is_symmetric", "has_symmetric_pattern", "has_self_loops", "to_scipy"):
        monkeypatch.delattr(Adjacency, name)
    for name in ("sha256", "file_digest"):
        monkeypatch.delattr(f"hashlib.{name}")
    opened = GraphData.load(tmp_path / "graph")
    assert [getattr(opened.adjacency, name) for name in KNOWN] == [True, True, False]
    assert len(opened.fingerprint()) == 64
    assert opened.tensors() == []
    assert not opened.adjacency.is_listed


def test_changes_in_place_stay_in_memory_and_change_the_fingerprint(tmp_path):
    data = load_dataset("csbm", num_nodes=60, num_features=4, num_classes=3)
    opened = GraphData.load(data.save(tmp_path / "graph"))
    opened.x[3] += 1
    assert opened.fingerprint() != data.fingerprint()
    assert GraphData.load(tmp_path / "graph").fingerprint() == data.fingerprint()


def test_the_layout_of_a_folder_is_plain_numpy(tmp_path):
    data = GraphData.from_edges(**PATH)
    data.save(tmp_path / "graph")
    meta = json.loads((tmp_path / "graph" / "meta.json").read_text())
    assert (meta["format"], meta["version"]) == ("gist graph", 1)
    assert meta["fingerprint"] == data.fingerprint()
    for name, entry in meta["arrays"].items():
        file = tmp_path / "graph" / f"{name}.npy"
        array = np.load(file)
        assert entry == {
            "dtype": array.dtype.str,
            "shape": list(array.shape),
            "bytes": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
    assert np.load(tmp_path / "graph" / "indptr.npy").tolist() == [0, 1, 3, 5, 6]


# --- archives that users write ---------------------------------------------------------------


def archive(tmp_path: Path, **changes) -> Path:
    given_ = {k: v for k, v in (PATH | changes).items() if v is not None}
    np.savez(tmp_path / "mine.npz", **given_)
    return tmp_path / "mine.npz"


def test_an_archive_may_be_written_with_numpy(tmp_path):
    data = GraphData.load(archive(tmp_path))
    assert_same(data, GraphData.from_edges(**PATH, name="mine"))
    changed = GraphData.load(
        archive(tmp_path, name="n", num_classes=5, directed=1, edge_index=EDGES[:, :1])
    )
    assert (changed.name, changed.num_classes, changed.directed) == ("n", 5, True)
    added = GraphData.load(archive(tmp_path, edge_index=EDGES[:, ::2], symmetrize=True))
    assert added.num_edges == 6
    np.savez_compressed(tmp_path / "small.npz", **PATH)
    assert GraphData.load(tmp_path / "small.npz").fingerprint() == data.fingerprint()


def test_the_precision_of_an_archive_is_the_default_unless_it_says_so(tmp_path):
    x = PATH["x"] / 3
    for given_ in (x, x.astype(float)):
        assert same(GraphData.load(archive(tmp_path, x=given_)).x, torch.tensor(x))
    double = GraphData.load(archive(tmp_path, x=x.astype(float), float64=True))
    assert same(double.x, torch.tensor(x, dtype=torch.float64))
    loaded = GraphData.load(double.save(tmp_path / "graph.npz"))
    assert_same(loaded, double)


@pytest.mark.parametrize(
    ("match", "changes"),
    [
        ("lacks y, val; got: edge_index.*savez", {"y": None, "val": None}),
        ("holds what is not known; got: edge_weights; expected", {"edge_weights": np.ones(6)}),
        ("x cannot be read; got: Object arrays.*objects", {"x": np.array([None] * 4)}),
        ("task is not a setting; got: 3; expected: one str", {"task": 3}),
        (r"num_classes is not a setting; got: array\(\[3", {"num_classes": np.array([3])}),
        ("directed is not a setting; got: 2", {"directed": 2}),
        ("features hold NaN", {"x": np.full((4, 2), np.nan)}),
        (r"x must hold one row.*\(4,\)", {"x": np.ones(4)}),
        (r"edge_index must hold.*\(3, 6\)", {"edge_index": np.zeros((3, 6), dtype=int)}),
        ("edges out of range", {"edge_index": EDGES + 1}),
        ("edge_weight must be one", {"edge_weight": np.ones(5)}),
        ("labels cannot be read", {"y": np.array(["a", "b", "c", "d"])}),
        ("val split shares nodes", {"val": np.array([1])}),
        ("edges without a reverse", {"edge_index": EDGES[:, 1:]}),
    ],
)
def test_archives_that_are_refused(match, changes, tmp_path):
    with pytest.raises(DataError, match=match):
        GraphData.load(archive(tmp_path, **changes))


def test_contradicting_settings_of_an_archive(tmp_path):
    with pytest.raises(ConfigError, match="symmetrised graph is not directed"):
        GraphData.load(archive(tmp_path, directed=True, symmetrize=True))


def test_files_that_are_no_archives(tmp_path):
    path = archive(tmp_path)
    content = path.read_bytes()
    for broken in (b"", b"text", content[:-30], content[:100]):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=r"not an \.npz archive; got: .*cut off"):
            GraphData.load(path)
    start = content.index(PATH["x"].tobytes())
    path.write_bytes(content[: start + 8] + b"\xff" + content[start + 9 :])
    with pytest.raises(DataError, match=r"x cannot be read; got: .*CRC"):
        GraphData.load(path)
    with zipfile.ZipFile(archive(tmp_path), "a") as added:
        added.writestr("name", "text")
    with pytest.raises(DataError, match="name cannot be read; got: not an array"):
        GraphData.load(path)
    for name in ("none.npz", "none"):
        with pytest.raises(DataError, match=f"no saved graph .*{name}; got: no such file"):
            GraphData.load(tmp_path / name)


# --- folders ---------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return GraphData.from_edges(**PATH).save(tmp_path / "graph")


def refused(folder: Path, match: str) -> None:
    with pytest.raises(DataError, match=match):
        GraphData.load(folder)


@pytest.mark.parametrize(
    ("match", "damage"),
    [
        ("x.npy is damaged.*got: no such file", lambda f: (f / "x.npy").unlink()),
        ("x.npy is damaged.*'bytes': 159.*'bytes': 160", lambda f: os.truncate(f / "x.npy", 159)),
        ("x.npy is damaged", lambda f: os.truncate(f / "x.npy", 20)),
        ("x.npy is damaged", lambda f: (f / "x.npy").write_bytes(b"")),
        ("y.npy is damaged.*<i4.*<i8", lambda f: np.save(f / "y.npy", np.zeros(8, dtype=np.int32))),
        ("meta.json is damaged", lambda f: os.truncate(f / "meta.json", 100)),
        ("is not a saved graph", lambda f: (f / "meta.json").unlink()),
        ("is not a saved graph", lambda f: (f / "meta.json").write_text("[]")),
    ],
)
def test_damage_is_noticed_when_a_folder_is_opened(match, damage, folder):
    damage(folder)
    refused(folder, match)


def overwrite(folder: Path, name: str, values: np.ndarray) -> None:
    """Other content of the same size, in the layout of what was there."""
    np.load(folder / f"{name}.npy", mmap_mode="r+")[...] = values


@pytest.mark.parametrize("indptr", [[1, 1, 3, 5, 6], [0, 1, 3, 5, 5], [0, 9, 3, 5, 6]])
def test_rows_that_are_no_rows_are_noticed_when_a_folder_is_opened(indptr, folder):
    overwrite(folder, "indptr", indptr)
    refused(folder, r"indptr\.npy is damaged.*expected: offsets that rise from 0 to 6")


def test_other_damage_is_noticed_when_a_folder_is_verified(folder):
    meta = json.loads((folder / "meta.json").read_text())
    assert_same(GraphData.load(folder, verify=True), GraphData.load(folder))
    overwrite(folder, "x", 7)
    assert GraphData.load(folder).x[0, 0] == 7
    with pytest.raises(DataError, match=r"x\.npy is damaged.*sha256.*sha256.*save the graph again"):
        GraphData.load(folder, verify=True)
    overwrite(folder, "x", PATH["x"])
    overwrite(folder, "indices", [4, 0, 2, 1, 3, 2])
    sum_ = hashlib.sha256((folder / "indices.npy").read_bytes()).hexdigest()
    meta["arrays"]["indices"]["sha256"] = sum_
    (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(DataError, match=r"indices\.npy is damaged.*got: 0 to 4; expected: 0 to 3"):
        GraphData.load(folder, verify=True)


@pytest.mark.parametrize("name", ["settings", "known", "fingerprint", "arrays"])
def test_facts_that_are_missing_or_are_something_else_are_refused(name, folder):
    meta = json.loads((folder / "meta.json").read_text())
    for wrong in ({}, {name: None}, {name: {"task": "binary"}}):
        others = {key: value for key, value in meta.items() if key != name}
        (folder / "meta.json").write_text(json.dumps(others | wrong))
        refused(folder, r"meta\.json is damaged.*save the graph again")


def test_other_versions_and_other_arrays_are_refused(folder):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"version": 2}))
    refused(folder, "another version of the format; got: 2; expected: 1; remedy: save the graph")
    del meta["arrays"]["x"]
    (folder / "meta.json").write_text(json.dumps(meta))
    refused(folder, "meta.json is damaged")
    with pytest.raises(DataError, match=r"no saved graph.*got: a file of another kind"):
        GraphData.load(folder / "x.npy")


def test_nothing_else_is_replaced(tmp_path):
    data = GraphData.from_edges(**PATH)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("kept")
    (tmp_path / "file").write_text("kept")
    for name in ("notes", "file"):
        with pytest.raises(DataError, match=f"{name} is there already, and is not a saved graph"):
            data.save(tmp_path / name)
    (tmp_path / "graph.npz").mkdir()
    with pytest.raises(DataError, match=r"graph\.npz is a folder"):
        data.save(tmp_path / "graph.npz")
    assert (tmp_path / "notes" / "mine.txt").read_text() == "kept"
    (tmp_path / "empty").mkdir()
    assert GraphData.load(data.save(tmp_path / "empty")).num_nodes == 4


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("moment", ["_sync", "_sync_folder", "rename"])
def test_an_interrupted_save_leaves_the_old_graph(name, moment, tmp_path, monkeypatch):
    old = GraphData.from_edges(**PATH)
    new = GraphData.from_edges(**PATH | {"y": np.array([1, 1, 2, 0])})
    path = old.save(tmp_path / name)

    def interrupt(*_):
        raise KeyboardInterrupt

    if moment == "rename":
        monkeypatch.setattr(files, "_exchanged", lambda *_: False)  # as on other systems
        monkeypatch.setattr(Path, "replace", interrupt)
    else:
        monkeypatch.setattr(files, moment, interrupt)
    with pytest.raises(KeyboardInterrupt):
        new.save(path)
    monkeypatch.undo()
    found = GraphData.load(path).fingerprint()
    written = moment == "_sync_folder" and path.suffix == ".npz"  # renamed before
    assert found == (new if written else old).fingerprint()
    assert sorted(tmp_path.iterdir()) == [path]


def test_a_reader_finds_a_whole_graph_while_it_is_replaced(tmp_path):
    graphs = [GraphData.from_edges(**PATH | {"x": PATH["x"] + i}, name=f"{i}") for i in range(2)]
    path = graphs[0].save(tmp_path / "graph")

    def replace() -> None:
        for i in range(20):
            graphs[i % 2].save(path)

    writer = threading.Thread(target=replace)
    writer.start()
    try:
        while writer.is_alive():
            found = GraphData.load(path)
            assert found.x[0, 0] == int(found.name)
    finally:
        writer.join()
    assert list(tmp_path.iterdir()) == [path]


def test_a_graph_larger_than_memory_can_be_opened(tmp_path):
    """The file of features has a hole of a terabyte."""
    data = GraphData.from_edges(**PATH)
    path = data.save(tmp_path / "graph")
    meta = json.loads((path / "meta.json").read_text())
    columns = 2**36
    with (path / "x.npy").open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (4, columns)}
        np.lib.format.write_array_header_1_0(file, header)
        size = file.tell() + 16 * columns
        file.truncate(size)
    meta["arrays"]["x"] |= {"shape": [4, columns], "bytes": size}
    (path / "meta.json").write_text(json.dumps(meta))
    assert GraphData.load(path).x[3, -1] == 0
