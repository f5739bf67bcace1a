"""An encoder that is trained to predict links."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch_geometric.nn as pyg
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.utils import to_undirected

from gist import LADIES, Cluster, GISTTrainer, LinkData, link_scores, load_dataset
from gist.baselines import DataParallelTrainer, EnsembleTrainer, local_sgd_settings
from gist.errors import CheckpointError, ConfigError, DataError
from gist.graph.link_metrics import link_loss, link_metric
from gist.graph.link_objective import LinkObjective
from gist.graph.link_sampling import links_of
from gist.nn import GCN, GraphSAGE
from gist.partition.spec import model_tensors

GRAPH = load_dataset(
    "csbm", num_nodes=120, num_features=8, num_classes=4, homophily=0.9, average_degree=8
)
DATA = LinkData.split(GRAPH, num_negatives=50)
CLUSTERS = {"clusters": 6, "clusters_per_batch": 2}
CPU = torch.device("cpu")
ONE = {"seed": 0, "round": 0, "subnet": 0}


def encoder(dtype: torch.dtype = torch.float32, **settings: Any) -> GCN:
    torch.manual_seed(0)
    return GCN(8, 16, 12, 2, **{"norm": None, **settings}).to(dtype)


def trainer(model: torch.nn.Module | None = None, data: LinkData = DATA, **settings: Any):
    known = {
        "num_subnets": 2, "local_steps": 10, "epochs": 80, "schedule": "constant", "progress": False
    }  # fmt: skip
    return GISTTrainer(encoder() if model is None else model, data, **{**known, **settings})


def pairs_of(pairs: Tensor) -> set[tuple[int, ...]]:
    return {tuple(sorted(pair)) for pair in pairs.t().tolist()}


@pytest.mark.parametrize("recipe", [None, Cluster(num_parts=6, parts_per_batch=2)])
def test_a_batch_has_its_links_and_as_many_pairs_without_one(recipe):
    for batch in LinkObjective(DATA, CPU, recipe).batches(**ONE, steps=4):
        links = links_of(batch.graph.edge_index, len(batch.x))
        count = links.size(1)
        assert batch.targets.shape == (2, 2 * count)
        assert batch.y.tolist() == [1.0] * count + [0.0] * count
        assert torch.equal(batch.targets[:, :count], links)
        others = pairs_of(batch.targets[:, count:])
        assert len(others) == count
        assert not others & pairs_of(links)
        assert int(batch.targets.max()) < len(batch.x)


@pytest.mark.parametrize("recipe", [None, Cluster(num_parts=6, parts_per_batch=2)])
def test_batches_depend_on_what_names_them_alone(recipe):
    def seen(between=lambda: None, **changes: int) -> list[Tensor]:
        found = []
        objective = LinkObjective(DATA, CPU, recipe)
        for batch in objective.batches(**{**ONE, **changes}, steps=3):
            found += [batch.x, batch.targets]
            between()
        return found

    def same(one: list[Tensor], two: list[Tensor]) -> bool:
        return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))

    first = seen()
    states = (torch.get_rng_state(), random.getstate())
    assert same(first, seen())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert same(first, seen(between=lambda: (torch.rand(1), random.random())))
    assert not torch.equal(first[1], first[3]), "other pairs in every step"
    for change in ({"seed": 1}, {"round": 1}, {"subnet": 1}):
        assert not same(first[1:2], seen(**change)[1:2])


def test_a_batch_without_a_link_or_without_other_pairs_has_a_loss():
    triangles = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 6, 8], [1, 2, 0, 4, 5, 3, 6, 7, 9]])
    edges = to_undirected(triangles[:, :6])
    data = LinkData.from_edges(
        edges, torch.randn(10, 8), val=triangles[:, 6:7], test=triangles[:, 7:], num_negatives=2
    )
    objective = LinkObjective(data, CPU, Cluster(num_parts=4))
    sizes = set()
    for batch in objective.batches(**ONE, steps=16):
        sizes.add(tuple(batch.y.tolist()))
        assert torch.isfinite(objective.loss(encoder(), batch))
    assert (0.0,) in sizes
    assert (1.0, 1.0, 1.0) in sizes


def test_the_loss_of_stacked_subnets_is_that_of_each():
    objective = LinkObjective(DATA, CPU)
    (batch,) = objective.batches(**ONE, steps=1)
    z = torch.randn(120, 3, 5, dtype=torch.float64)

    class Encoder(torch.nn.Module):
        def __init__(self, z: Tensor) -> None:
            super().__init__()
            self.z = z

        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            return self.z

    stacked = objective.loss(Encoder(z), batch)
    each = [objective.loss(Encoder(z[:, i]), batch) for i in range(3)]
    assert torch.allclose(stacked, torch.stack(each))
    half = len(batch.y) // 2
    scores = link_scores(z[:, 0], batch.targets)
    assert float(each[0]) == pytest.approx(link_loss(scores[:half], scores[half:]))


@pytest.mark.parametrize("settings", [{}, {"executor": "serial"}, CLUSTERS], ids=str)
def test_it_learns_to_predict_links(settings):
    run = trainer(**settings)
    before = run.evaluate("test")["mrr"]
    result = run.fit()
    assert result.history[-1].train_loss < result.history[0].train_loss
    assert result.history[-1].val_loss is not None
    chance = sum(1 / rank for rank in range(1, 52)) / 51
    assert run.evaluate("test") == {"mrr": result.test_metric}
    assert result.test_metric > max(1.2 * before, 2 * chance)

    z = run.predict()
    assert z.shape == (120, 12)
    scores = link_scores(z, DATA.test), link_scores(z, DATA.negative_pairs("test").flatten(1))
    by_hand = link_metric("mrr", scores[0], scores[1].view(-1, 50))
    assert by_hand == result.test_metric == DATA.evaluate(z)["mrr"]
    with pytest.raises(ConfigError, match="mrr is not defined on the train split"):
        run.evaluate("train")


def test_serial_and_stacked_are_the_same_run_to_rounding():
    data = LinkData.split(
        Data(x=GRAPH.x.double(), edge_index=GRAPH.edge_index), metric="hits@9", num_negatives=50
    )
    runs = [
        trainer(encoder(torch.float64), data, executor=executor, shared_batches=True)
        for executor in ("serial", "stacked")
    ]
    one, other = (run.fit() for run in runs)
    assert {run.executor.name for run in runs} == {"serial", "stacked"}
    losses = zip(one.history, other.history, strict=True)
    assert all(a.train_loss == pytest.approx(b.train_loss, rel=1e-6) for a, b in losses)
    assert torch.allclose(runs[0].predict(), runs[1].predict(), rtol=1e-6)
    assert "hits@9" in runs[0].evaluate("val")


def test_resuming_gives_the_bits_of_a_run_that_never_stopped(tmp_path):
    settings = {**CLUSTERS, "local_steps": 4, "rounds": 4, "epochs": None}
    whole = trainer(**settings)
    whole.fit()
    part = {**settings, "out": str(tmp_path), "checkpoint_every": 2}
    trainer(**part, callbacks=[lambda trainer, record: record.round == 2]).fit()
    again = trainer(**part)
    result = again.fit(resume=tmp_path)
    assert [r.train_loss for r in result.history] == [r.train_loss for r in whole.history]
    tensors = model_tensors(again.model)
    assert all(torch.equal(t, tensors[n]) for n, t in model_tensors(whole.model).items())
    assert torch.equal(again.predict(), whole.predict())
    other = trainer(data=LinkData.split(GRAPH, num_negatives=50, seed=1), **settings)
    with pytest.raises(CheckpointError, match=r"of another run.*data="):
        other.load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "model",
    [
        lambda: GraphSAGE(8, 16, 5, 2),
        lambda: pyg.GCN(8, 16, 2, 24),
        lambda: pyg.GAT(8, 16, 2, 7, heads=2),
    ],
    ids=["gist sage", "pyg gcn", "pyg gat"],
)
def test_any_encoder_of_any_width_will_do(model):
    torch.manual_seed(0)
    result = trainer(model(), epochs=40).fit()
    assert result.history[-1].train_loss < result.history[0].train_loss


def test_ways_to_evaluate():
    scores = trainer().predict()
    assert torch.allclose(trainer(evaluation="layerwise").predict(), scores, atol=1e-5)
    clustered = trainer(evaluation="clusters", **CLUSTERS)
    assert clustered.predict().shape == scores.shape
    assert 0 < clustered.evaluate("val")["mrr"] < 1


def test_it_is_rehearsed_where_memory_is_limited():
    rough = trainer()
    rehearsed = trainer(memory_limit=rough.room.needed + 2**25, executor="stacked")
    assert rough.room.evaluation is None
    assert rehearsed.room.evaluation is not None
    assert rehearsed.room.needed <= rehearsed.room.limit
    wide = GCN(8, 4096, 4096, 2, norm=None)
    with pytest.raises(ConfigError, match=r"does not fit into memory.*training"):
        trainer(wide, memory_limit=rehearsed.room.needed + 2**26)


def test_baselines():
    m = {"num_subnets": 2, "local_steps": 5, "epochs": 20, "progress": False}
    for run in (
        GISTTrainer(encoder(), DATA, **local_sgd_settings({**m, **CLUSTERS})),
        DataParallelTrainer(encoder(), DATA, **m),
    ):
        result = run.fit()
        assert result.history[-1].train_loss < result.history[0].train_loss
    with pytest.raises(ConfigError, match=r"ensemble.*embeddings"):
        EnsembleTrainer(encoder(), DATA, **m)


def test_what_does_not_suit_links_is_refused():
    with pytest.raises(ConfigError, match="FullGraph or Cluster"):
        trainer(batches=LADIES(nodes_per_layer=(9, 9)))
    with pytest.raises(ConfigError, match="inductive=True"):
        trainer(inductive=True)
    with pytest.raises(ConfigError, match=r"one node alone.*fewer clusters"):
        trainer(clusters=110)
    with pytest.raises(DataError, match="diverged"):
        LinkObjective(DATA, CPU).measure(torch.full((120, 3), torch.nan))
