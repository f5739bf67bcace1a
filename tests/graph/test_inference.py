"""Three ways to the scores of all nodes, how one is chosen, and what trainers make of them."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch_geometric.nn as pyg
import torch_geometric.nn.models as zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gist import Adjacency, Cluster, GISTTrainer, GraphData, load_dataset, metrics
from gist.errors import CheckpointError, ConfigError
from gist.graph import inference, objective, parts
from gist.graph.inference import (
    Inference,
    choose_inference,
    default_memory_limit,
    forward,
    forward_bytes,
    infer,
    infer_on_clusters,
)
from gist.graph.live_bytes import LiveBytes
from gist.graph.objective import GraphObjective
from gist.metrics import compute_metric, loss, mean_loss
from gist.nn import GAT, GCN, GraphSAGE

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path_factory):
    """No test sees cuts of another one, or of this machine's user."""
    monkeypatch.setenv("GIST_CACHE", str(tmp_path_factory.mktemp("cache") / "none"))
    monkeypatch.setattr(parts, "_RECENT", {})


@pytest.fixture(scope="module")
def data() -> GraphData:
    return load_dataset(
        "csbm", num_nodes=400, num_features=12, num_classes=4, average_degree=6.0, homophily=0.9
    )


def model_for(data: GraphData, make=GraphSAGE, **settings) -> nn.Module:
    torch.manual_seed(0)
    if make in (GCN, GraphSAGE, GAT):
        return make(data.num_features, 16, data.num_classes, 3, **settings).eval()
    return make(data.num_features, 16, 3, data.num_classes, **settings).eval()


class Mine(nn.Module):
    """A model that is not of PyG's family."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.conv, self.lin = pyg.GCNConv(features, 8), nn.Linear(8, classes)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.lin(self.conv(x, edge_index).relu())


MODELS = [
    (GCN, {}),
    (GraphSAGE, {}),
    (GraphSAGE, {"concat": True}),
    (GAT, {"heads": 2}),
    (zoo.GCN, {"norm": "batch_norm", "jk": "cat"}),
    (zoo.GIN, {}),
]


# --- the ways agree ---


@pytest.mark.parametrize(("make", "choices"), MODELS)
def test_both_exact_ways_are_the_forward_pass(data, make, choices):
    model = model_for(data, make, **choices)
    with torch.no_grad():
        expected = forward(model, data.x, data.adjacency)
    model.train()  # inference is in evaluation mode, and leaves modes as they were
    for how in ("full", "layerwise", "auto"):
        got = infer(model, data.x, data.adjacency, how=how)
        assert torch.allclose(got, expected, atol=1e-4)
        assert all(module.training for module in model.modules())
        assert not got.requires_grad


@pytest.mark.parametrize(("make", "choices"), MODELS)
def test_one_cluster_is_the_whole_graph(data, make, choices):
    model = model_for(data, make, **choices)
    source = Cluster(num_parts=1).bind(data)
    got = infer_on_clusters(model, source)
    assert torch.allclose(got, infer(model, data.x, data.adjacency, how="full"), atol=1e-4)


@settings(max_examples=8)
@given(sizes=st.lists(st.integers(3, 9), min_size=2, max_size=5), q=st.integers(1, 3))
def test_clusters_without_edges_between_them_are_exact(sizes, q):
    generator = torch.Generator().manual_seed(0)
    total, edges, place = sum(sizes), [], 0
    shuffled = torch.randperm(total, generator=generator)  # components are not contiguous
    for size in sizes:
        ring = torch.arange(size)
        edges.append(place + torch.stack([ring, ring.roll(1)]))
        place += size
    index = shuffled[torch.cat([torch.cat(edges, dim=1), torch.cat(edges, dim=1).flip(0)], dim=1)]
    component = torch.empty(total, dtype=torch.int64)
    component[shuffled] = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    data = GraphData.from_edges(
        index,
        torch.randn(total, 5, generator=generator, dtype=torch.float64),
        torch.arange(total) % 2,
        train=[0],
        val=[1],
        test=[2],
    )
    recipe = Cluster(num_parts=len(sizes), parts_per_batch=min(q, len(sizes)), method="random")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gist.graph.layout.cut_graph", lambda *args, **kwargs: component)
        source = recipe.bind(data)
    model = model_for(data).double()
    got = infer_on_clusters(model, source)
    assert torch.allclose(got, infer(model, data.x, data.adjacency), rtol=1e-9, atol=1e-12)


def test_clusters_score_every_node_with_what_it_sees_of_its_own_union(data):
    model = model_for(data)
    source = Cluster(num_parts=6, parts_per_batch=4).bind(data)
    got = infer_on_clusters(model, source)
    exact = infer(model, data.x, data.adjacency)
    assert not torch.allclose(got, exact, atol=1e-3)
    for group in (range(4), range(4, 6)):
        nodes = torch.isin(source.parts, torch.tensor(list(group))).nonzero()[:, 0]
        part = data.adjacency.subgraph(nodes)
        assert torch.allclose(got[nodes], infer(model, data.x[nodes], part), atol=1e-4)


# --- the choice ---


@pytest.mark.parametrize(("make", "choices"), MODELS)
@pytest.mark.parametrize("degree", [3, 40])
def test_what_a_forward_pass_takes_is_foreseen(make, choices, degree):
    generator = torch.Generator().manual_seed(0)
    nodes = 700
    graph = Adjacency(torch.randint(nodes, (2, degree * nodes), generator=generator), nodes)
    x = torch.randn(nodes, 12, generator=generator)
    data = load_dataset("csbm", num_nodes=60, num_features=12, num_classes=4, average_degree=4.0)
    model = model_for(data, make, **choices)
    for form in ("gcn", "mean"):
        graph.matrix(form)
    for _ in range(2):  # the second time, products with x are remembered
        need = forward_bytes(model, x, graph)
        with torch.no_grad(), LiveBytes() as live:
            forward(model, x, graph)
        assert live.peak == pytest.approx(need, rel=0.03)
        graph.remember(x)


def test_auto_makes_one_pass_where_that_fits_and_goes_by_layer_where_not(data):
    x, graph = data.x, data.adjacency
    model = model_for(data)
    infer(model, x, graph)
    need = forward_bytes(model, x, graph)
    assert choose_inference(model, x, graph, memory_limit=need).how == "full"
    assert choose_inference(model, x, graph, memory_limit=need - 1).how == "layerwise"
    assert choose_inference(model, x, graph, memory_limit=need - 1, how="full").how == "full"


@pytest.mark.parametrize("make", [GAT, zoo.GCN, zoo.GraphSAGE, zoo.GIN])
def test_auto_goes_by_layer_where_a_pass_would_make_a_message_per_edge(data, make):
    model = model_for(data, make, **({"heads": 2} if make is GAT else {}))
    assert choose_inference(model, data.x, data.adjacency).how == "layerwise"


def test_a_model_without_layers_that_are_known_makes_one_pass_with_a_warning(data):
    model, x, graph = Mine(data.num_features, data.num_classes), data.x, data.adjacency
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_inference(model, x, graph).how == "full"
    with pytest.warns(UserWarning, match=r"forward pass over all 400 nodes takes about .*Mine is"):
        chosen = choose_inference(model, x, graph, memory_limit=1000)
    assert chosen.how == "full"
    with pytest.raises(ConfigError, match="cannot be evaluated layer by layer"):
        choose_inference(model, x, graph, how="layerwise")


def test_the_trial_leaves_caches_of_convolutions_alone(data):
    model = model_for(data, zoo.GCN, cached=True)
    forward_bytes(model, data.x, data.adjacency)
    with torch.no_grad():
        got = forward(model, data.x, data.adjacency)
        expected = forward(model_for(data, zoo.GCN), data.x, data.adjacency)
    assert torch.allclose(got, expected)


def test_bad_choices_are_refused(data):
    model, x, graph = model_for(data), data.x, data.adjacency
    with pytest.raises(ConfigError, match="unknown way of inference; got: 'fast'"):
        infer(model, x, graph, how="fast")
    for how in ("layerwise", "auto"):
        with pytest.raises(ConfigError, match="memory_limit is too small"):
            infer(model, x, graph, how=how, memory_limit=100)


def test_the_default_limit_is_a_power_of_two_of_at_most_half_of_what_is_free():
    assert default_memory_limit(CPU, free=10 * 2**30) == 4 * 2**30
    assert default_memory_limit(CPU, free=8 * 2**30) == 4 * 2**30
    assert default_memory_limit(CPU, free=8 * 2**30 - 1) == 2 * 2**30
    found = default_memory_limit(CPU)
    assert found & (found - 1) == 0
    assert found > 2**20


# --- metrics without a second copy of the scores ---


@given(
    seed=st.integers(0, 99),
    task=st.sampled_from(["multiclass", "binary", "multilabel"]),
    chunk=st.integers(1, 50),
)
def test_metrics_of_some_nodes_are_those_of_their_rows(seed, task, chunk):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(30, 1 if task == "binary" else 4, generator=generator)
    y = torch.randint(2, (30, 4) if task == "multilabel" else (30,), generator=generator)
    y = y if task == "multiclass" else y.float()
    nodes = torch.randperm(30, generator=generator)[:17]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "_CHUNK_ENTRIES", chunk)
        for metric in metrics.METRICS[task]:
            got = compute_metric(metric, scores, y, nodes)
            assert got == compute_metric(metric, scores[nodes], y[nodes]), metric
        expected = float(loss(task, scores[nodes], y[nodes]))
        assert mean_loss(task, scores, y, nodes) == pytest.approx(expected, rel=1e-5)


def test_an_evaluation_keeps_the_scores_once(monkeypatch):
    monkeypatch.setattr(metrics, "_CHUNK_ENTRIES", 1000)
    data = load_dataset(
        "csbm", num_nodes=3000, num_features=4, num_classes=60, average_degree=2.0, homophily=0.1
    )
    model = GraphSAGE(4, 8, 60, 2).eval()
    side = GraphObjective(data, CPU, evaluation="layerwise")
    side.choose_inference(model, memory_limit=2**20)
    side.evaluate(model)
    with LiveBytes() as live:
        side.evaluate(model)
    assert live.peak < 2**20  # the scores are 0.69 MiB, a copy of a split's 0.17 or more


# --- trainers ---


def trainer(data: GraphData, model: nn.Module, **choices) -> GISTTrainer:
    choices = {"num_subnets": 2, "rounds": 2, "local_steps": 2, "executor": "serial", **choices}
    return GISTTrainer(model, data, progress=False, **choices)


@pytest.mark.parametrize("evaluation", ["full", "layerwise", "auto"])
def test_a_run_is_the_same_however_it_is_evaluated(data, evaluation):
    plain = trainer(data, model_for(data), evaluation="full").fit()
    run = trainer(data, model_for(data), evaluation=evaluation)
    result = run.fit()
    for ours, theirs in zip(result.history, plain.history, strict=True):
        assert ours.train_loss == theirs.train_loss
        assert ours.val_metric == theirs.val_metric
        assert ours.val_loss == pytest.approx(theirs.val_loss, rel=1e-5)
    scores = run.predict()
    assert scores.shape == (400, 4)
    assert run.evaluate("val") == {
        "accuracy": compute_metric("accuracy", scores[data.val_mask], data.y[data.val_mask])
    }


@pytest.mark.parametrize("inductive", [False, True])
def test_training_on_clusters_may_be_evaluated_on_clusters_of_the_whole_graph(data, inductive):
    run = trainer(
        data,
        model_for(data),
        clusters=8,
        clusters_per_batch=3,
        inductive=inductive,
        evaluation="clusters",
    )
    run.fit()
    source = Cluster(num_parts=8, parts_per_batch=3).bind(data)
    expected = infer_on_clusters(run.model, source)
    assert torch.allclose(run.predict(), expected, atol=1e-5)
    assert not torch.allclose(expected, infer(run.model, data.x, data.adjacency), atol=1e-3)


def test_what_cannot_be_evaluated_is_refused_before_training(data):
    mine = Mine(data.num_features, data.num_classes)
    wiring = ["conv", "lin"]
    with pytest.raises(ConfigError, match=r"cannot be evaluated layer by layer.*Mine"):
        trainer(data, mine, evaluation="layerwise", wiring=wiring)
    with pytest.raises(ConfigError, match=r"evaluation on clusters needs clusters"):
        trainer(data, model_for(data), evaluation="clusters")


def test_an_evaluation_stays_below_the_limit_of_the_run(data):
    for limit in ("2GB", "40GB"):
        run = trainer(data, model_for(data), memory_limit=limit, evaluation="layerwise")
        assert isinstance(run.objective.inference, Inference)
        assert run.objective.inference.memory_limit < run.config.memory_limit


def test_a_resumed_run_is_evaluated_as_before(data, tmp_path, monkeypatch):
    first = trainer(data, model_for(data), rounds=3, checkpoint_every=1, out=tmp_path / "run")
    first.objective.inference = Inference(how="layerwise", memory_limit=2**21)
    first.fit()
    again = trainer(data, model_for(data), rounds=3, checkpoint_every=1, out=tmp_path / "run")
    assert again.objective.inference.how == "full"
    again.load_checkpoint(tmp_path / "run")
    assert again.objective.inference == first.objective.inference
    monkeypatch.setattr("gist.trainer.free_memory", lambda device: 2**20)
    smaller = trainer(data, model_for(data), rounds=3, checkpoint_every=1, out=tmp_path / "run")
    said = []
    monkeypatch.setattr(smaller, "_say", said.append)
    smaller.load_checkpoint(tmp_path / "run")  # a machine with less memory decides anew
    assert smaller.objective.inference.memory_limit < 2**21
    assert said == [
        "evaluation decides anew what to keep in memory: 2,097,152 bytes were allowed so far, "
        "1,048,576 are free; metrics may differ by rounding"
    ]


def test_a_run_is_not_resumed_with_another_evaluation(data, tmp_path):
    settings = {"clusters": 8, "rounds": 2, "checkpoint_every": 1, "out": tmp_path}
    trainer(data, model_for(data), evaluation="clusters", **settings).fit()
    other = trainer(data, model_for(data), evaluation="full", **settings)
    with pytest.raises(CheckpointError, match=r"of another run.*evaluation='full'"):
        other.fit(resume=tmp_path)


def test_the_objective_decides_when_first_asked(data):
    side = GraphObjective(data, CPU)
    model = model_for(data)
    assert side.inference is None
    scores = side.predict(model)
    assert side.inference == objective.choose_inference(model, data.x, data.adjacency)
    assert torch.equal(scores, inference.infer(model, data.x, data.adjacency))
