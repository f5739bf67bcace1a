"""Graphs that took long to read are kept, and made again when what they were made of changed."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
import shutil

import numpy as np
import pytest
import torch

from gist import load_dataset
from gist.catalog import cards, writing
from gist.catalog import places as raw_places
from gist.catalog.cards import load_card
from gist.catalog.places import sums_known
from gist.errors import ConfigError, DataError
from gist.graph import datasets, files, ogb_files, processed
from gist.graph.outline import GraphShape
from tests.ogb_layout import write_cards, write_ogb_layout

KEY = "ogbn-arxiv-symmetrize=true"


@pytest.fixture
def places(monkeypatch, tmp_path):
    """A GIST_DATA with a tiny ogbn-arxiv, and an empty GIST_CACHE."""
    folders = {name: tmp_path / name.lower() for name in ("GIST_DATA", "GIST_CACHE")}
    for name, folder in folders.items():
        folder.mkdir()
        monkeypatch.setenv(name, str(folder))
    write(folders["GIST_DATA"], 0)
    sizes = {"nodes": 10, "edges": 20, "features": 3}
    changes = dict.fromkeys(("ogbn-arxiv", "ogbn-products", "amazon2m"), sizes)
    monkeypatch.setattr(cards, "_PLACES", (write_cards(tmp_path / "cards", changes),))
    return folders["GIST_DATA"], folders["GIST_CACHE"]


def write(data, seed, name="ogbn-arxiv"):
    """A ring of ten nodes with random features, in place of what is there."""
    shutil.rmtree(data / "ogb", ignore_errors=True)
    ring = np.stack([np.arange(10), np.roll(np.arange(10), 1)])
    x = np.random.default_rng(seed).standard_normal((10, 3))
    split = {"train": range(4), "valid": range(4, 7), "test": range(7, 10)}
    write_ogb_layout(data / "ogb", name, ring, x, np.arange(10), split)


@pytest.fixture
def reads(monkeypatch):
    """Counts how often raw files were read."""
    seen = []
    real = ogb_files._edges
    monkeypatch.setattr(ogb_files, "_edges", lambda folder: seen.append(1) or real(folder))
    return seen


def test_raw_files_are_read_once(places, reads):
    data, cache = places
    before = sorted(data.rglob("*"))
    first, second = load_dataset("ogbn-arxiv"), load_dataset("ogbn-arxiv")
    assert len(reads) == 1
    assert first.fingerprint() == second.fingerprint()
    assert sorted(data.rglob("*")) == before, "GIST_DATA is only read"
    assert [path.name for path in (cache / "processed").iterdir()] == [KEY]
    assert GraphShape.of(second) == dataclasses.replace(
        GraphShape.of_dataset("ogbn-arxiv"),
        num_nodes=10, num_edges=20, num_features=3, train_nodes=4,
    )  # fmt: skip


def test_options_are_kept_apart(places, reads):
    assert load_dataset("ogbn-arxiv").num_edges == 20
    assert load_dataset("ogbn-arxiv", symmetrize=False).num_edges == 10
    assert load_dataset("ogbn-arxiv", symmetrize=True).num_edges == 20
    assert len(reads) == 2


def test_other_raw_files_are_read_anew(places, reads):
    first = load_dataset("ogbn-arxiv")
    write(places[0], 1)
    second = load_dataset("ogbn-arxiv")
    assert first.fingerprint() != second.fingerprint()
    assert load_dataset("ogbn-arxiv").fingerprint() == second.fingerprint()
    assert len(reads) == 2
    assert [path.name for path in (places[1] / "processed").iterdir()] == [KEY]


def test_raw_files_may_go_once_they_were_read(places, reads):
    first = load_dataset("ogbn-arxiv")
    shutil.rmtree(places[0] / "ogb")
    assert load_dataset("ogbn-arxiv").fingerprint() == first.fingerprint()
    assert len(reads) == 1
    assert datasets.prepare_dataset("ogbn-arxiv") == places[1] / "processed" / KEY


@pytest.mark.parametrize("what", ["reader", "files", "damage", "meta"])
def test_what_was_kept_by_another_version_is_made_again(places, reads, monkeypatch, what):
    first = load_dataset("ogbn-arxiv")
    kept = places[1] / "processed" / KEY
    if what == "reader":
        monkeypatch.setattr(processed, "_FORMAT", -1)
    elif what == "files":
        monkeypatch.setattr(files, "_VERSION", -1)
    elif what == "damage":
        os.truncate(kept / "x.npy", 100)
    else:
        (kept / "meta.json").write_text("[")
    assert load_dataset("ogbn-arxiv").fingerprint() == first.fingerprint()
    assert len(reads) == 2
    load_dataset("ogbn-arxiv")
    assert len(reads) == 2


@pytest.mark.parametrize("what", ["reader", "files"])
def test_without_the_raw_files_another_version_is_refused(places, monkeypatch, what):
    load_dataset("ogbn-arxiv")
    shutil.rmtree(places[0] / "ogb")
    module, name = (processed, "_FORMAT") if what == "reader" else (files, "_VERSION")
    monkeypatch.setattr(module, name, -1)
    with pytest.raises(DataError, match=r"raw files of ogbn-arxiv are not there|another version"):
        load_dataset("ogbn-arxiv")


def test_what_was_kept_beside_the_raw_files_is_used(places, reads):
    data, cache = places
    load_dataset("ogbn-arxiv", root=data)
    load_dataset("ogbn-arxiv")
    assert len(reads) == 1
    assert not (cache / "processed").exists()


def test_nothing_is_kept_where_nothing_may_be_written(places, reads, monkeypatch):
    monkeypatch.setattr(writing.os, "access", lambda *_: False)
    assert load_dataset("ogbn-arxiv").num_nodes == 10
    assert not any(places[1].iterdir())


def test_a_process_that_waited_takes_what_the_other_made(places, reads, monkeypatch):
    find = datasets.find_kept

    def find_none(*_):
        monkeypatch.setattr(datasets, "find_kept", find)
        load_dataset("ogbn-arxiv")  # as if another process made it after the first look

    monkeypatch.setattr(datasets, "find_kept", find_none)
    assert load_dataset("ogbn-arxiv").num_nodes == 10
    assert len(reads) == 1


def test_damage_is_noticed_before_files_are_read(places, monkeypatch):
    card = load_card("ogbn-arxiv")
    file = places[0] / card.files[0]
    good = hashlib.sha256(file.read_bytes()).hexdigest()
    sums = file.parent.parent / "SHA256SUMS"
    sums.write_text(f"{good}  raw/edge.csv.gz\n")
    assert load_dataset("ogbn-arxiv").num_nodes == 10
    sums.write_text(f"{'0' * 64}  raw/edge.csv.gz\n")
    os.utime(file)
    with pytest.raises(DataError, match=rf"edge\.csv\.gz is damaged.*{good}.*or delete .*SUMS too"):
        load_dataset("ogbn-arxiv")


def test_the_record_of_what_was_read_is_sizes_and_times(places):
    load_dataset("ogbn-arxiv")
    source = files.read_facts(places[1] / "processed" / KEY)["source"]
    stat = (places[0] / load_card("ogbn-arxiv").files[0]).stat()
    assert source["files"]["raw/edge.csv.gz"] == [stat.st_size, stat.st_mtime_ns]


def test_an_archive_has_no_place_for_a_source(places):
    with pytest.raises(ConfigError, match=r"no place for extra values; got: source; .*folder"):
        load_dataset("ogbn-arxiv").save(places[1] / "mine.npz", extra={"source": {}})


def test_an_older_graph_stays_until_the_new_one_is_complete(places, monkeypatch):
    first = load_dataset("ogbn-arxiv").fingerprint()
    write(places[0], 1)

    def fail(*_, **__):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(files.np, "save", fail)
        with pytest.raises(OSError, match="no space left"):
            load_dataset("ogbn-arxiv")
    shutil.rmtree(places[0] / "ogb")
    assert load_dataset("ogbn-arxiv").fingerprint() == first


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF])
def test_a_file_system_without_locks_will_do(places, monkeypatch, code):
    def flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(writing.fcntl, "flock", flock)
    assert load_dataset("ogbn-arxiv").num_nodes == 10
    assert (places[1] / "processed" / KEY).is_dir()


def test_preparing_hashes_each_raw_file_once(places, monkeypatch):
    folder = places[0] / "ogb" / "ogbn_arxiv"
    raw_places.record_sums(load_card("ogbn-arxiv"), folder)
    hashed, sha256 = [], raw_places.sha256
    monkeypatch.setattr(raw_places, "sha256", lambda file: hashed.append(file) or sha256(file))
    assert datasets.prepare_dataset("ogbn-arxiv") == folder
    assert sorted(hashed) == sorted(folder / file for file in load_card("ogbn-arxiv").checksums)


def test_what_was_compared_with_checksums_is_told(places):
    card, folder = load_card("ogbn-arxiv"), places[0] / "ogb" / "ogbn_arxiv"
    assert sums_known(card, folder) == (
        "checksums of 8 raw files: none is known; its card has none, so only its sizes say that "
        "these are the official files"
    )
    load_dataset("ogbn-arxiv")
    shutil.rmtree(folder)
    kept = datasets.prepare_dataset("ogbn-arxiv")
    assert sums_known(card, kept).startswith("its raw files are gone")


def test_amazon2m_is_kept_of_its_own(places, reads):
    write(places[0], 0, "ogbn-products")
    first = load_dataset("amazon2m")
    shutil.rmtree(places[0] / "ogb")
    second = load_dataset("amazon2m")
    assert first.saved_fingerprint == second.saved_fingerprint == first.fingerprint()
    assert [path.name for path in (places[1] / "processed").iterdir()] == ["amazon2m"]
    assert len(reads) == 1


def test_amazon2m_is_made_of_what_was_kept_of_products(places, reads, monkeypatch):
    write(places[0], 0, "ogbn-products")
    products = load_dataset("ogbn-products")
    shutil.rmtree(places[0] / "ogb")
    monkeypatch.setattr(datasets, "fetch", lambda *_: pytest.fail("a download"))
    assert datasets.prepare_dataset("amazon2m") == places[1] / "processed" / "ogbn-products"
    assert torch.equal(load_dataset("amazon2m").edge_index, products.edge_index)
    assert datasets.prepare_dataset("amazon2m") == places[1] / "processed" / "amazon2m"
    assert len(reads) == 1


@pytest.mark.parametrize("symmetrize", [True, False])
@pytest.mark.parametrize("key", ["nodes", "edges", "features"])
def test_files_of_other_sizes_are_refused(places, tmp_path, monkeypatch, key, symmetrize):
    sizes = {"nodes": 10, "edges": 20, "features": 3}
    changes = {"ogbn-arxiv": {**sizes, key: 99}}
    monkeypatch.setattr(cards, "_PLACES", (write_cards(tmp_path / "others", changes),))
    match = r"ogbn_arxiv/raw are not those of ogbn-arxiv; got: 10 nodes, 20 edges, .*99.*prepare"
    with pytest.raises(DataError, match=match):
        load_dataset("ogbn-arxiv", symmetrize=symmetrize)
    assert not any((places[1] / "processed").iterdir())
