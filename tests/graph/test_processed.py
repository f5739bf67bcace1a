"""Graphs that took long to read are kept, and made again when what they were made of changed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil

import numpy as np
import pytest

from gist import load_dataset
from gist.errors import DataError
from gist.graph import datasets, files, ogb_files, processed
from gist.graph.cards import load_card
from gist.graph.outline import GraphShape
from tests.ogb_layout import write_ogb_layout

KEY = "ogbn-arxiv-symmetrize=true"


@pytest.fixture
def places(monkeypatch, tmp_path):
    """A GIST_DATA with a tiny ogbn-arxiv, and an empty GIST_CACHE."""
    folders = {name: tmp_path / name.lower() for name in ("GIST_DATA", "GIST_CACHE")}
    for name, folder in folders.items():
        folder.mkdir()
        monkeypatch.setenv(name, str(folder))
    write(folders["GIST_DATA"], 0)
    return folders["GIST_DATA"], folders["GIST_CACHE"]


def write(data, seed):
    """A ring of ten papers with random features, in place of what is there."""
    shutil.rmtree(data / "ogb", ignore_errors=True)
    ring = np.stack([np.arange(10), np.roll(np.arange(10), 1)])
    x = np.random.default_rng(seed).standard_normal((10, 3))
    split = {"train": range(4), "valid": range(4, 7), "test": range(7, 10)}
    write_ogb_layout(data / "ogb", "ogbn-arxiv", ring, x, np.arange(10), split)


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


@pytest.mark.parametrize("what", ["reader", "files", "damage", "source"])
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
        (kept / "source.json").write_text("[")
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
    monkeypatch.setattr(processed.os, "access", lambda *_: False)
    assert load_dataset("ogbn-arxiv").num_nodes == 10
    assert not any(places[1].iterdir())


def test_a_process_that_waited_takes_what_the_other_made(places, reads, monkeypatch):
    source = processed._find
    made = []

    def find(folders, wanted):
        if not made:  # as if another process made it after the first look
            made.append(1)
            load_dataset("ogbn-arxiv")
            return None
        return source(folders, wanted)

    monkeypatch.setattr(processed, "_find", find)
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
    source = json.loads((places[1] / "processed" / KEY / "source.json").read_text())
    stat = (places[0] / load_card("ogbn-arxiv").files[0]).stat()
    assert source["files"]["raw/edge.csv.gz"] == [stat.st_size, stat.st_mtime_ns]
