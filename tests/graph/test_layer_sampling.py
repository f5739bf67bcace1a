"""LADIES and FastGCN: probabilities, weights and expectations as in the papers."""

from __future__ import annotations

import pytest
import torch
import torch_geometric.nn.models as zoo
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gist import LADIES, Adjacency, FastGCN, GISTTrainer, GraphData, load_dataset
from gist.errors import ConfigError
from gist.graph.batch import training_graph
from gist.graph.layer_sampling import LayerSource, SampledLayer
from gist.graph.sparse import CSR
from gist.nn import GAT, GCN, GraphSAGE
from gist.partition.streams import stream

ALL = 10**6


def small(*, nodes: int = 12, edges: int = 30, seed: int = 0, weighted: bool = False) -> GraphData:
    generator = torch.Generator().manual_seed(seed)
    one_way = torch.randint(nodes, (2, edges), generator=generator)
    weight = torch.rand(edges, generator=generator) + 0.1 if weighted else None
    return GraphData.from_edges(
        torch.cat([one_way, one_way.flip(0)], dim=1),
        torch.randn(nodes, 3, generator=generator, dtype=torch.float64),
        torch.arange(nodes) % 2,
        train=torch.arange(nodes - 4),
        val=[nodes - 4, nodes - 3],
        test=[nodes - 2, nodes - 1],
        edge_weight=None if weight is None else weight.repeat(2),
    )


def dense(matrix: CSR) -> Tensor:
    return torch.from_numpy(matrix.to_scipy().toarray())


def whole(data: GraphData, form: str) -> Tensor:
    return dense(data.adjacency.matrix(form, torch.float64).rows)


def spread(sources: Tensor, layer: SampledLayer, num_nodes: int) -> Tensor:
    """The sampled matrix with a column for every node."""
    out = torch.zeros(layer.num_targets, num_nodes, dtype=torch.float64)
    return out.index_add_(1, sources, dense(layer.matrix(layer.form, torch.float64).rows))


def recipe(kind: type, count: int, form: str, **settings) -> LADIES | FastGCN:
    if kind is LADIES:
        settings.setdefault("row_normalize", False)
    return kind(nodes_per_layer=(count,), batch_size=4, form=form, **settings)


@pytest.mark.parametrize("form", ["gcn", "mean"])
@pytest.mark.parametrize("kind", [LADIES, FastGCN])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_sampled_layer_is_right_on_average(kind, form, weighted):
    data = small(weighted=weighted)
    source = recipe(kind, 5, form).bind(data)
    targets = torch.tensor([7, 1, 4])
    exact = whole(data, form)[targets]
    generator = stream("average", 0)
    draws = torch.stack(
        [spread(*source.layer(targets, 5, generator), data.num_nodes) for _ in range(1200)]
    )
    error = draws.std(0) / len(draws) ** 0.5
    assert (draws.mean(0) - exact).abs().max() > 0, "an estimate"
    # five standard errors, for each of 36 entries
    assert bool(((draws.mean(0) - exact).abs() <= 5 * error + 1e-12).all())


@pytest.mark.parametrize("form", ["gcn", "mean"])
@pytest.mark.parametrize("kind", [LADIES, FastGCN])
@given(seed=st.integers(0, 99), count=st.integers(1, 9))
def test_weights_are_times_drawn_over_draws_times_probability(kind, form, seed, count):
    data = small(seed=seed % 7)
    source = recipe(kind, count, form).bind(data)
    targets = torch.randperm(12, generator=torch.Generator().manual_seed(seed))[:3]
    matrix = whole(data, form)
    rows = matrix[targets]
    norms = (rows if kind is LADIES else matrix).square().sum(0)
    probability = norms / norms.sum()
    sampled = spread(*source.layer(targets, count, stream("weights", seed)), data.num_nodes)
    scale = (sampled / rows.where(rows != 0, 1.0)).nan_to_num()
    if kind is LADIES and count >= int((rows != 0).any(0).sum()):
        assert torch.allclose(sampled, rows, atol=1e-12), "all neighbours: nothing to draw"
        return
    drawn = torch.zeros(data.num_nodes, dtype=torch.float64)
    for node in range(data.num_nodes):
        mine = scale[rows[:, node] != 0, node]
        if len(mine):
            assert torch.allclose(mine, mine[0].expand_as(mine)), "one weight for a column"
            drawn[node] = mine[0] * count * probability[node]
    assert torch.allclose(drawn, drawn.round(), atol=1e-9), "whole numbers of draws"
    assert drawn.sum() <= count + 1e-9
    if kind is LADIES:
        assert drawn.sum() == pytest.approx(count), "only neighbours are drawn"


@pytest.mark.parametrize("form", ["gcn", "mean"])
@pytest.mark.parametrize("kind", [LADIES, FastGCN])
def test_nothing_is_estimated_where_all_are_taken(kind, form):
    data = small()
    source = recipe(kind, ALL, form).bind(data)
    targets = torch.tensor([2, 9, 0])
    sampled = spread(*source.layer(targets, ALL, stream(0)), data.num_nodes)
    assert torch.allclose(sampled, whole(data, form)[targets], rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", ["gcn", "mean"])
def test_ladies_rows_sum_to_one(form):
    data = small()
    source = recipe(LADIES, 4, form, row_normalize=True).bind(data)
    for seed in range(20):
        matrix = spread(*source.layer(torch.arange(4), 4, stream(seed)), data.num_nodes)
        sums = matrix.sum(1)
        assert torch.allclose(sums[sums != 0], torch.ones(()).double())
    plain = recipe(LADIES, 4, form).bind(data)
    unscaled = spread(*plain.layer(torch.arange(4), 4, stream(0)), data.num_nodes)
    scaled = spread(*source.layer(torch.arange(4), 4, stream(0)), data.num_nodes)
    assert torch.allclose(scaled, unscaled / unscaled.sum(1, keepdim=True).clamp(min=1e-9))


def models(data: GraphData, layers: int) -> list[torch.nn.Module]:
    shape = (data.num_features, 5, data.num_classes, layers)
    made = [
        GCN(*shape),
        GCN(*shape, norm=None, act="elu", act_first=True),
        GraphSAGE(*shape),
        GraphSAGE(*shape, concat=True, norm="batch"),
    ]
    return [model.double().eval() for model in made]


def form_of(model: torch.nn.Module) -> str:
    return "gcn" if isinstance(model, GCN) else "mean"


@pytest.mark.parametrize("kind", [LADIES, FastGCN])
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("which", range(4))
def test_a_model_on_complete_layers_is_the_model_on_the_graph(kind, layers, which):
    data = small(nodes=20, edges=40)
    model = models(data, layers)[which]
    settings = {"row_normalize": False} if kind is LADIES else {}
    source = kind(nodes_per_layer=(ALL,) * layers, form=form_of(model), **settings).bind(data)
    targets = torch.tensor([3, 11, 5])
    batch = source.draw(targets, stream(0))
    assert batch.targets is None
    assert torch.equal(batch.y, data.y[targets])
    expected = model(data.x, data.adjacency)[targets]
    got = model(batch.x, batch.graph)
    assert torch.allclose(got, expected, rtol=0, atol=1e-10)
    ours, theirs = (
        torch.autograd.grad(out.square().sum(), list(model.parameters())) for out in (got, expected)
    )
    assert all(torch.allclose(*pair, rtol=0, atol=1e-9) for pair in zip(ours, theirs, strict=True))
    assert batch.graph[0].is_constant(batch.x)


def test_sources_of_mean_layers_begin_with_their_targets():
    data = small()
    source = recipe(LADIES, 3, "mean").bind(data)
    targets = torch.tensor([7, 1, 4])
    sources, layer = source.layer(targets, 3, stream(0))
    assert torch.equal(sources[:3], targets)
    assert len(sources) == len(sources.unique()) == layer.num_nodes
    x = torch.randn(layer.num_nodes, 2)
    assert torch.equal(layer.propagate("identity", x), x[:3])


def test_a_layer_without_neighbours_or_draws_is_not_empty():
    lonely = GraphData.from_edges(
        torch.empty(2, 0, dtype=torch.int64),
        torch.randn(4, 2),
        torch.tensor([0, 1, 0, 1]),
        train=[0, 1],
        val=[2],
        test=[3],
    )
    mean = LADIES(nodes_per_layer=(2,), form="mean").bind(lonely)
    sources, layer = mean.layer(torch.tensor([1, 0]), 2, stream(0))
    assert sources.tolist() == [1, 0]
    assert layer.num_edges == 0
    gcn = FastGCN(nodes_per_layer=(1,), batch_size=1).bind(lonely)
    for seed in range(20):  # the one draw misses the one target, now and then
        sources, layer = gcn.layer(torch.tensor([1]), 1, stream(seed))
        assert sources.tolist() == [1]
        assert layer.propagate("gcn", torch.ones(1, 1)).item() in (0.0, 4.0)


@pytest.mark.parametrize("kind", [LADIES, FastGCN])
def test_batches_are_passes_over_the_training_nodes(kind):
    data = load_dataset("digits", train_per_class=9)
    made = kind(nodes_per_layer=(30, 30), batch_size=16)
    source = made.bind(data)
    assert source.steps_per_epoch == 6
    arguments = {"seed": 1, "round": 0, "subnet": 1, "steps": 6}
    batches = list(source.batches(**arguments))
    assert [len(b.y) for b in batches] == [16] * 5 + [10]
    assert torch.equal(
        torch.cat([b.y for b in batches]).sort().values, data.y[data.train_mask].sort().values
    )
    again = list(made.bind(data).batches(**arguments))
    for one, two in zip(batches, again, strict=True):
        assert torch.equal(one.x, two.x)
        for a, b in zip(one.graph, two.graph, strict=True):
            assert torch.equal(dense(a.gcn.rows), dense(b.gcn.rows))
    other = list(source.batches(**{**arguments, "round": 1}))
    assert any(len(a.x) != len(b.x) for a, b in zip(batches, other, strict=True))


def test_inductive_batches_see_training_nodes_only():
    data = load_dataset("digits", train_per_class=50)
    seen = {tuple(row.tolist()) for row in data.x[data.train_mask]}
    for batch in (
        LADIES(nodes_per_layer=(40, 40), batch_size=64)
        .bind(training_graph(data))
        .batches(seed=0, round=0, subnet=0, steps=8)
    ):
        assert {tuple(row.tolist()) for row in batch.x} <= seen


@pytest.mark.parametrize("executor", ["serial", "stacked"])
@pytest.mark.parametrize(
    "batches",
    [
        LADIES(nodes_per_layer=(200, 200), batch_size=100),
        FastGCN(nodes_per_layer=(800, 800), batch_size=100),
        LADIES(nodes_per_layer=(200, 200), batch_size=100, form="mean"),
    ],
    ids=["LADIES", "FastGCN", "LADIES, SAGE"],
)
def test_subnets_learn_on_sampled_layers(batches, executor):
    data = load_dataset(
        "csbm", num_nodes=1500, num_features=16, num_classes=4, average_degree=8.0, homophily=0.8
    )
    torch.manual_seed(0)
    model = (GCN if batches.form == "gcn" else GraphSAGE)(16, 32, 4, num_layers=2)
    trainer = GISTTrainer(
        model,
        data,
        num_subnets=2,
        local_steps=8,
        epochs=16,
        batches=batches,
        executor=executor,
        progress=False,
    )
    assert trainer.fit().val_metric > 0.75
    assert trainer.describe()["batches"]["name"] == type(batches).__name__


@pytest.mark.parametrize(
    ("model", "settings", "why"),
    [
        (GAT(8, 16, 4, num_layers=2), {}, "GAT does not multiply with it in all of its layers"),
        (zoo.GCN(8, 16, 2, 4), {}, "GCN does not multiply"),
        (GraphSAGE(8, 16, 4, num_layers=2), {}, "'gcn'.*got: layers with 'mean', 'mean'"),
        (GCN(8, 16, 4, num_layers=2), {"form": "mean"}, "'mean'.*got: layers with 'gcn', 'gcn'"),
        (GCN(8, 16, 4, num_layers=2, improved=True), {}, "got: layers with None, None"),
        (GraphSAGE(8, 16, 4, num_layers=2, aggr="max"), {"form": "mean"}, "got: layers with None"),
        (GCN(8, 16, 4, num_layers=3), {}, "another number of layers.*3 numbers"),
    ],
)
@pytest.mark.parametrize("kind", [LADIES, FastGCN])
def test_models_that_cannot_be_sampled_are_refused_by_name(kind, model, settings, why):
    data = load_dataset("csbm", num_nodes=60, num_features=8, num_classes=4, average_degree=4.0)
    with pytest.raises(ConfigError, match=f"{kind.__name__} samples .*{why}"):
        GISTTrainer(model, data, num_subnets=2, batches=kind(nodes_per_layer=(9, 9), **settings))


def tuple_of(*forms: str) -> tuple[SampledLayer, ...]:
    ring = Adjacency(torch.tensor([[0, 1, 2], [1, 2, 0]]), 3)
    return tuple(
        SampledLayer(ring.matrix(form).rows, form, targets_first=form == "mean") for form in forms
    )


def test_models_want_one_graph_per_layer():
    x = torch.randn(3, 4)
    graphs = tuple_of("gcn", "gcn")
    assert GCN(4, 8, 2, num_layers=2)(x, graphs).shape == (3, 2)
    for count in (1, 3):
        with pytest.raises(ConfigError, match=f"one graph per layer.*got: 2.*expected: {count}"):
            GCN(4, 8, 2, num_layers=count)(x, graphs)
    with pytest.raises(ConfigError, match=r"jumping knowledge.*jk='cat'"):
        GCN(4, 8, 2, num_layers=2, jk="cat")(x, graphs)
    with pytest.raises(ConfigError, match="GAT cannot train on sampled layers"):
        GAT(4, 8, 2, num_layers=2)(x, graphs)


def test_a_sampled_layer_refuses_what_it_was_not_sampled_for():
    (layer,) = tuple_of("gcn")
    x = torch.randn(3, 4)
    with pytest.raises(ConfigError, match=r"sampled for the form 'gcn'.*multiplies with.*'mean'"):
        layer.propagate("mean", x)
    with pytest.raises(ConfigError, match="targets' own features"):
        layer.propagate("identity", x)
    with pytest.raises(ConfigError, match="passes messages along edges"):
        GCN(4, 8, 2, num_layers=1, improved=True)(x, (layer,))


@pytest.mark.parametrize("kind", [LADIES, FastGCN])
@pytest.mark.parametrize(
    "settings",
    [
        {"nodes_per_layer": ()},
        {"nodes_per_layer": 512},
        {"nodes_per_layer": (0, 3)},
        {"nodes_per_layer": (4, 2.5)},
        {"nodes_per_layer": (4,), "batch_size": 0},
        {"nodes_per_layer": (4,), "form": "sum"},
    ],
    ids=str,
)
def test_wrong_settings_are_refused(kind, settings):
    with pytest.raises(ConfigError, match=r"how many nodes to draw|unknown form"):
        kind(**settings)


def test_a_list_of_counts_will_do():
    assert LADIES(nodes_per_layer=[4, 5]).nodes_per_layer == (4, 5)
    assert isinstance(LADIES(nodes_per_layer=[4, 5]).bind(small()), LayerSource)
