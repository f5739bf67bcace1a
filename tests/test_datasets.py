"""Datasets by name, of either kind."""

from __future__ import annotations

import pytest

from gist.catalog.records import GraphCard, SampleCard
from gist.datasets import find_card, load_dataset, prepare_dataset
from gist.errors import ConfigError
from gist.graph.data import GraphData
from gist.samples.data import SampleData


def test_a_name_gives_what_its_card_is_of(tmp_path):
    graph, images = load_dataset("digits"), load_dataset("Digits-Images")
    assert isinstance(graph, GraphData)
    assert isinstance(images, SampleData)
    assert isinstance(find_card("digits"), GraphCard)
    assert isinstance(find_card("digits-images"), SampleCard)
    assert graph.num_nodes == images.num_samples


def test_a_path_gives_a_saved_graph(tmp_path):
    saved = load_dataset("digits").save(tmp_path / "mine.npz")
    assert find_card(saved) is None
    assert load_dataset(saved).fingerprint() == load_dataset("digits").fingerprint()
    with pytest.raises(ConfigError, match="a saved graph has no options; got: part"):
        load_dataset(saved, part="t10k")


def test_a_known_name_is_no_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    load_dataset("digits").save("digits-images")
    assert isinstance(load_dataset("digits-images"), SampleData)


def test_seed_and_options_reach_the_loader():
    size = {"num_nodes": 60, "num_features": 4, "num_classes": 3}
    one, two = (load_dataset("csbm", seed=seed, **size) for seed in (1, 2))
    assert one.fingerprint() != two.fingerprint()
    same = load_dataset("digits-images", seed=1).fingerprint()
    assert load_dataset("digits-images").fingerprint() == same
    for name, option in (("digits-images", "part"), ("digits", "part"), ("mnist", "neighbours")):
        with pytest.raises(ConfigError, match=f"options that {name} does not have; got: {option}"):
            load_dataset(name, **{option: 1})


def test_unknown_names_list_the_known_ones_of_both_kinds():
    for action in (load_dataset, prepare_dataset, find_card):
        with pytest.raises(ConfigError, match=r"unknown dataset.*'mnits'.*cora or.*mean 'mnist'"):
            action("mnits")


def test_what_needs_no_files_needs_no_preparing():
    assert prepare_dataset("digits") is None
    assert prepare_dataset("digits-images") is None
