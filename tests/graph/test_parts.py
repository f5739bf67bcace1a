"""Cutting graphs, and the cache of cuts."""

from __future__ import annotations

import json
import os
import stat
from itertools import combinations

import pymetis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gist import Adjacency, Cluster, load_dataset
from gist.errors import DataError
from gist.graph import parts
from gist.graph.parts import cut_graph


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path_factory):
    """No test sees cuts of another one, or of this machine's user."""
    monkeypatch.setenv("GIST_CACHE", str(tmp_path_factory.mktemp("cache") / "none"))
    monkeypatch.setattr(parts, "_RECENT", {})


@st.composite
def graphs(draw: st.DrawFn) -> Adjacency:
    """Directed, with self loops, duplicates and isolated nodes."""
    nodes = draw(st.integers(1, 14))
    pairs = draw(st.lists(st.tuples(*[st.integers(0, nodes - 1)] * 2), max_size=40))
    edges = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T.contiguous()
    weight = torch.rand(edges.size(1)) if draw(st.booleans()) else None
    return Adjacency(edges, nodes, weight)


def ring_of_cliques(cliques: int = 6, size: int = 5) -> Adjacency:
    edges = [
        (c * size + a, c * size + b)
        for c in range(cliques)
        for a, b in combinations(range(size), 2)
    ]
    edges += [(c * size, (c + 1) % cliques * size + 1) for c in range(cliques)]
    index = torch.tensor(edges).T
    return Adjacency(torch.cat([index, index.flip(0)], 1), cliques * size)


def test_metis_finds_cliques():
    graph = ring_of_cliques()
    found = cut_graph(graph, 6).reshape(6, 5)
    assert all(len(set(clique.tolist())) == 1 for clique in found)
    assert len(set(found[:, 0].tolist())) == 6


def test_metis_cuts_fewer_edges_than_chance():
    data = load_dataset("csbm", num_nodes=2000, num_classes=10, average_degree=10.0)
    metis = Cluster(num_parts=20).bind(data)
    chance = Cluster(num_parts=20, method="random").bind(data)
    assert metis.edges_within > 2 * chance.edges_within
    for source in (metis, chance):
        sizes = source.parts.bincount(minlength=20)
        assert sizes.min() > 80
        assert sizes.max() < 120


@given(graph=graphs(), num_parts=st.integers(1, 14))
def test_any_graph_can_be_cut(graph, num_parts):
    num_parts = min(num_parts, graph.num_nodes)
    before = [t if t is None else t.clone() for t in graph.rows]
    for method in ("metis", "random"):
        got = cut_graph(graph, num_parts, method=method)
        assert got.shape == (graph.num_nodes,)
        assert 0 <= int(got.min()) <= int(got.max()) < num_parts
    assert all(a is b or torch.equal(a, b) for a, b in zip(before, graph.rows, strict=True))


def test_cuts_repeat_and_seeds_differ():
    graph = load_dataset("digits").adjacency
    for method in ("metis", "random"):
        one = cut_graph(graph, 10, method=method)
        parts._RECENT.clear()
        assert torch.equal(cut_graph(graph, 10, method=method), one)
        assert not torch.equal(cut_graph(graph, 10, method=method, seed=1), one)


def test_weights_do_not_change_the_cut():
    data = load_dataset("digits")
    weight = torch.rand(data.num_edges)
    weighted = Adjacency(data.edge_index, data.num_nodes, weight)
    assert torch.equal(cut_graph(weighted, 10), cut_graph(data.adjacency, 10))


# --- the cache ---


def no_metis(monkeypatch):
    def fails(*_, **__):
        raise AssertionError("METIS was called")

    monkeypatch.setattr(pymetis, "part_graph", fails)


def test_a_cut_is_kept_and_found(monkeypatch, tmp_path):
    data = load_dataset("digits")
    folder = tmp_path / "cuts"
    first = Cluster(num_parts=10, cache=folder).bind(data)
    (file,) = folder.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    parts._RECENT.clear()
    no_metis(monkeypatch)
    assert torch.equal(Cluster(num_parts=10, cache=folder).bind(data).parts, first.parts)
    for other in ({"num_parts": 11}, {"seed": 1}, {"cache": False}):
        with pytest.raises(AssertionError, match="METIS was called"):
            Cluster(**{"num_parts": 10, "cache": folder, **other}).bind(data)
    assert [path.name for path in folder.iterdir()] == [file.name]


def test_one_process_cuts_a_graph_once(monkeypatch):
    data = load_dataset("digits")
    first = cut_graph(data.adjacency, 10, cache=False)
    kept = first.clone()
    first.fill_(0)
    no_metis(monkeypatch)
    assert torch.equal(cut_graph(load_dataset("digits").adjacency, 10, cache=False), kept)


def test_the_cache_of_the_datasets_is_used_where_it_exists(monkeypatch, tmp_path):
    graph = load_dataset("digits").adjacency
    home = tmp_path / "home"
    monkeypatch.setenv("GIST_CACHE", str(home))
    cut_graph(graph, 10)
    assert not home.exists(), "nothing is created that nobody asked for"
    home.mkdir()
    cut_graph(graph, 10, cache=False)
    assert not list(home.iterdir())
    cut_graph(graph, 10, method="random")
    assert not list(home.iterdir()), "a random deal costs nothing"
    cut_graph(graph, 10)
    assert len(list((home / "clusters").iterdir())) == 1


def edited(file, **changes):
    """The same cut with other metadata."""
    with safe_open(file, "pt") as stored:
        metadata = json.loads(stored.metadata()["cut"])
    save_file(load_file(file), file, metadata={"cut": json.dumps({**metadata, **changes})})


def flipped(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda file: file.write_bytes(b"nonsense"), "is damaged"),
        (lambda file: file.write_bytes(b""), "is damaged"),
        (lambda file: file.write_bytes(file.read_bytes()[:-40]), "is damaged"),
        (flipped, "is damaged: its content is not what was written"),
        (lambda file: save_file({"other": torch.zeros(3)}, file), "is damaged"),
        (lambda file: edited(file, graph="0" * 64), "cut of another graph"),
        (lambda file: edited(file, parts=12), "another cut.*got: parts 12; expected: parts 10"),
        (lambda file: edited(file, format=0), "another cut.*format"),
    ],
    ids=["nonsense", "empty", "cut short", "bit", "tensors", "graph", "parts", "format"],
)
def test_a_wrong_cache_is_refused(tmp_path, damage, why):
    graph = load_dataset("digits").adjacency
    cut_graph(graph, 10, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    damage(file)
    with pytest.raises(DataError, match=f"{why}.*remedy: delete it"):
        cut_graph(graph, 10, cache=tmp_path)


def test_the_cut_of_another_graph_is_refused_whatever_its_name(tmp_path):
    graph = load_dataset("digits").adjacency
    other = Adjacency(graph.edge_index[:, 1:], graph.num_nodes)
    cut_graph(graph, 10, cache=tmp_path)
    (mine,) = tmp_path.iterdir()
    cut_graph(other, 10, cache=tmp_path)
    (theirs,) = set(tmp_path.iterdir()) - {mine}
    os.replace(theirs, mine)
    with pytest.raises(DataError, match="cut of another graph"):
        cut_graph(graph, 10, cache=tmp_path)
