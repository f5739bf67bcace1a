"""The layout of a saved graph by clusters: kept, found again, and the same as one made now."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import gist
from gist import Cluster, GISTTrainer, GraphData
from gist.errors import DataError
from gist.graph import layout
from gist.graph.batch import training_graph
from gist.graph.clusters import ClusterSource
from gist.graph.layout import keep_layout, keep_training_graph, lay_out


@pytest.fixture
def saved(tmp_path):
    data = gist.load_dataset("csbm", num_nodes=400, num_features=6, num_classes=4)
    return GraphData.load(data.save(tmp_path / "graph"))


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def tensors(found) -> list[torch.Tensor]:
    return [found.parts, found.order, found.starts, *found.rows[:2], found.x]


def test_a_kept_layout_is_the_one_that_is_made_now(saved, cache, monkeypatch):
    now = lay_out(saved, 20, cache=False)
    folder = keep_layout(saved, 20, cache=cache)
    assert folder is not None
    monkeypatch.setattr(layout, "cut_graph", None)  # nothing is cut
    kept = lay_out(saved, 20, cache=cache)
    assert all(torch.equal(a, b) for a, b in zip(tensors(kept), tensors(now), strict=True))
    assert kept.edges_within == now.edges_within
    written = folder.stat().st_mtime_ns
    assert keep_layout(saved, 20, cache=cache) == folder
    assert folder.stat().st_mtime_ns == written


def test_a_run_on_a_kept_layout_has_the_same_bits(saved, cache):
    recipe = Cluster(num_parts=20, parts_per_batch=4, cache=cache)
    keep_layout(saved, 20, cache=cache)
    states = []
    for batches in (recipe, Cluster(num_parts=20, parts_per_batch=4, cache=False)):
        torch.manual_seed(0)
        model = gist.nn.GraphSAGE(6, 16, 4, 3)
        settings = {"num_subnets": 2, "rounds": 2, "local_steps": 3, "executor": "serial"}
        GISTTrainer(model, saved, batches=batches, **settings).fit()
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_edges_keep_their_weights_and_features(tmp_path, cache):
    plain = gist.load_dataset("csbm", num_nodes=100, num_features=3, num_classes=4)
    splits = {name: plain.mask(name) for name in ("train", "val", "test")}
    edges = plain.edge_index
    attr = torch.stack([edges.min(0).values, edges.max(0).values], dim=1).float()
    data = GraphData.from_edges(
        edges, plain.x, plain.y, edge_weight=attr.sum(1), edge_attr=attr, **splits
    )
    saved = GraphData.load(data.save(tmp_path / "graph"))
    keep_layout(saved, 8, cache=cache)
    for data in (saved, plain):
        source = ClusterSource(Cluster(num_parts=8, parts_per_batch=8, cache=cache), data)
        graph = source.batch(range(8)).graph
        ends = source.nodes(range(8))[graph.edge_index]
        if data is saved:
            assert torch.equal(graph.edge_attr, ends.sort(dim=0).values.T.float())
            assert torch.equal(graph.edge_weight, ends.sum(0).float())
        else:
            assert graph.edge_attr is None


def test_other_settings_and_other_graphs_have_their_own(saved, cache, tmp_path):
    folder = keep_layout(saved, 20, cache=cache)
    others = [
        keep_layout(saved, 10, cache=cache),
        keep_layout(saved, 20, seed=1, cache=cache),
        keep_layout(saved, 20, method="random", cache=cache),
    ]
    assert len({folder, *others}) == 4
    part = training_graph(saved)
    assert part.saved_fingerprint is None
    assert lay_out(part, 20, cache=cache).x.size(0) == int(saved.train_mask.sum())


def test_the_training_graph_may_be_kept_with_a_layout_of_its_own(saved, cache, monkeypatch):
    monkeypatch.setenv("GIST_CACHE", str(cache.parent))
    plain = training_graph(saved)
    kept = keep_training_graph(saved)
    assert kept.saved_fingerprint == plain.fingerprint() == training_graph(saved).saved_fingerprint
    folder = keep_layout(kept, 8)
    assert folder is not None
    monkeypatch.setattr(layout, "cut_graph", None)  # nothing is cut
    torch.manual_seed(0)
    model = gist.nn.GraphSAGE(6, 16, 4, 3)
    trainer = GISTTrainer(model, saved, clusters=8, inductive=True, num_subnets=2, rounds=1)
    assert torch.equal(trainer.objective.source.parts, lay_out(kept, 8).parts)


def test_a_graph_changed_in_place_is_laid_out_anew(saved, cache):
    keep_layout(saved, 20, cache=cache)
    saved.x.mul_(2)
    assert saved.saved_fingerprint is None
    assert saved.to("meta").saved_fingerprint is None
    found = lay_out(saved, 20, cache=cache)
    assert torch.equal(found.x, saved.x[found.order])


def test_a_trainer_on_a_kept_layout_makes_no_list_of_all_edges(saved, cache):
    keep_layout(saved, 20, cache=cache)
    recipe = Cluster(num_parts=20, parts_per_batch=4, cache=cache)
    trainer = GISTTrainer(gist.nn.GraphSAGE(6, 16, 4, 3), saved, batches=recipe, rounds=1)
    next(iter(trainer.objective.batches(seed=0, round=0, subnet=0, steps=1)))
    assert not {"_listed", "edge_index"} & vars(saved.adjacency).keys()


def test_a_graph_in_memory_has_its_cut_kept_alone(cache):
    data = gist.load_dataset("csbm", num_nodes=400, num_features=6, num_classes=4)
    assert keep_layout(data, 20, cache=cache) is None
    assert [file.suffix for file in cache.iterdir()] == [".safetensors"]


def test_a_damaged_layout_is_refused(saved, cache):
    folder = keep_layout(saved, 20, cache=cache)
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, "graph": "0" * 64}))
    with pytest.raises(DataError, match=r"clusters of another graph.*delete it"):
        lay_out(saved, 20, cache=cache)
    (folder / "meta.json").write_text(json.dumps(meta))
    with (folder / "x.npy").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(DataError, match=r"x\.npy is damaged.*gist prepare NAME --clusters N"):
        lay_out(saved, 20, cache=cache)
    shutil.rmtree(folder)
    assert lay_out(saved, 20, cache=cache).x.shape == saved.x.shape
