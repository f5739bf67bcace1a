"""Clusters as batches: the cut, its cache, the unions, and the passes over them."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
import torch_geometric.nn.models as zoo
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch_geometric.utils import subgraph

from gist import Adjacency, Cluster, GISTTrainer, GraphData, load_dataset
from gist.errors import CheckpointError, ConfigError
from gist.graph import clusters, layout, parts, prefetch
from gist.graph.batch import GraphBatch, passes, training_graph
from gist.graph.clusters import ClusterSource
from gist.graph.sparse import CSR
from gist.nn import GAT, GCN, GraphSAGE
from gist.partition.streams import seeded, stream

FORMS = ("gcn", "mean", "sum")


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path_factory):
    """No test sees cuts of another one, or of this machine's user."""
    monkeypatch.setenv("GIST_CACHE", str(tmp_path_factory.mktemp("cache") / "none"))
    monkeypatch.setattr(parts, "_RECENT", {})


@st.composite
def datasets(draw: st.DrawFn, *, symmetric: bool | None = None) -> GraphData:
    """Small data on any multigraph: directed or not, weighted or not, with self loops."""
    nodes = draw(st.integers(5, 14))
    pairs = draw(st.lists(st.tuples(*[st.integers(0, nodes - 1)] * 2), max_size=40))
    edges = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T.contiguous()
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    weight = None
    if draw(st.booleans()):
        # in 64ths, so that duplicates add up to the same in any order
        weight = torch.randint(1, 99, edges.shape[1:], generator=generator).double() / 64
    if draw(st.booleans()) if symmetric is None else symmetric:
        edges = torch.cat([edges, edges.flip(0)], dim=1)
        weight = None if weight is None else weight.repeat(2)
    order = torch.randperm(nodes, generator=generator)
    train = draw(st.integers(1, nodes - 2))
    return GraphData.from_edges(
        edges,
        torch.randn(nodes, 3, generator=generator, dtype=torch.float64),
        torch.randint(2, (nodes,), generator=generator),
        train=order[:train],
        val=order[train : train + 1],
        test=order[train + 1 :],
        edge_weight=weight,
        num_classes=2,
        directed=True,
    )


def random_source(data: GraphData, num_parts: int, q: int = 1, **settings) -> ClusterSource:
    recipe = Cluster(num_parts=num_parts, parts_per_batch=q, method="random", **settings)
    return recipe.bind(data)


def dense(matrix: CSR) -> Tensor:
    return torch.from_numpy(matrix.to_scipy().toarray())


def same_batch(one: GraphBatch, two: GraphBatch) -> bool:
    return (
        torch.equal(one.x, two.x)
        and torch.equal(one.y, two.y)
        and torch.equal(one.graph.edge_index, two.graph.edge_index)
        and all(
            torch.equal(one.graph.matrix(form).rows.values, two.graph.matrix(form).rows.values)
            for form in FORMS
        )
    )


# --- the union of clusters is the induced subgraph ---


@given(data=datasets(), draw=st.data(), normalization=st.sampled_from(["batch", "full"]))
def test_a_batch_is_the_subgraph_that_its_nodes_induce(data, draw, normalization):
    num_parts = draw.draw(st.integers(1, data.num_nodes))
    source = random_source(data, num_parts, normalization=normalization)
    chosen = sorted(
        draw.draw(st.sets(st.integers(0, num_parts - 1), min_size=1, max_size=num_parts))
    )
    batch, nodes = source.batch(chosen), source.nodes(chosen)
    assert set(source.parts[nodes].tolist()) == set(chosen)
    assert len(nodes) == int(torch.isin(source.parts, torch.tensor(chosen)).sum())

    assert torch.equal(batch.x, data.x[nodes])
    targets = torch.arange(len(nodes)) if batch.targets is None else batch.targets
    assert torch.equal(nodes[targets], nodes[data.train_mask[nodes]])
    assert torch.equal(batch.y, data.y[nodes[targets]])

    index, weight = subgraph(nodes, data.edge_index, data.edge_weight, num_nodes=data.num_nodes)
    place = torch.full((data.num_nodes,), -1)
    place[nodes] = torch.arange(len(nodes))
    oracle = Adjacency(place[index], len(nodes), weight)
    assert batch.graph.num_edges == oracle.num_edges
    ours, theirs = (g.to_scipy().toarray() for g in (batch.graph, oracle))
    assert abs(ours - theirs).max(initial=0) < 1e-12
    for form in FORMS:
        got = batch.graph.matrix(form, torch.float64)
        if normalization == "full" and form != "sum":
            whole = dense(data.adjacency.matrix(form, torch.float64).rows)
            expected = whole[nodes][:, nodes]
        else:
            expected = dense(oracle.matrix(form, torch.float64).rows)
        assert torch.allclose(dense(got.rows), expected, rtol=0, atol=1e-12), form
        assert torch.allclose(dense(got.columns), expected.T, rtol=0, atol=1e-12), form


@given(data=datasets(symmetric=True))
def test_no_batch_of_a_symmetric_graph_builds_a_transpose(data):
    source = random_source(data, 3, 2)
    graph = source.batch([0, 2]).graph
    for form in FORMS:
        matrix = graph.matrix(form)
        assert matrix.columns.indices is matrix.rows.indices, form


def test_all_clusters_together_are_the_whole_graph():
    data = load_dataset("digits")
    batch = random_source(data, 7, 7).batch(range(7))
    order = random_source(data, 7, 7).nodes(range(7))
    assert torch.allclose(
        batch.graph.propagate("gcn", batch.x), data.adjacency.propagate("gcn", data.x)[order]
    )
    assert batch.graph.num_edges == data.num_edges


def test_products_with_the_features_are_computed_once_per_batch(monkeypatch):
    data = load_dataset("digits")
    count = []
    product = CSR.product
    monkeypatch.setattr(CSR, "product", lambda self, x: (count.append(1), product(self, x))[1])
    for q in (1, 2):
        source = random_source(data, 4, q)
        count.clear()
        for batch in source.batches(seed=0, round=0, subnet=0, steps=4 // q):
            for _ in range(3):
                batch.graph.propagate("mean", batch.x)
        assert len(count) == 4 // q
        # single clusters are kept from pass to pass
        for batch in source.batches(seed=0, round=1, subnet=0, steps=4 // q):
            batch.graph.propagate("mean", batch.x)
        assert len(count) == (4 if q == 1 else 2 * 4 // q)


def test_what_does_not_fit_is_built_anew_with_the_same_result(monkeypatch):
    data = load_dataset("digits")
    kept = random_source(data, 6)
    assert kept.batch([3]) is kept.batch([3])
    monkeypatch.setattr(clusters, "_KEPT_BYTES", kept._x.numel() * 4)
    some = random_source(data, 6)
    assert 0 < some._keepable < 6
    assert some.batch([0]) is some.batch([0])
    assert some.batch([5]) is not some.batch([5])
    for source in (kept, some):
        got = list(source.batches(seed=0, round=0, subnet=0, steps=9))
        expected = list(kept.batches(seed=0, round=0, subnet=0, steps=9))
        assert all(same_batch(*pair) for pair in zip(got, expected, strict=True))


# --- passes ---


@given(data=datasets(), draw=st.data())
def test_a_pass_deals_every_cluster_once_and_no_batch_without_training_nodes(data, draw):
    num_parts = draw.draw(st.integers(1, data.num_nodes))
    q = draw.draw(st.integers(1, num_parts))
    source = random_source(data, num_parts, q)
    labelled = set(source.parts[data.train_mask].tolist())
    groups = source.deal(stream(draw.draw(st.integers(0, 9))))
    assert len(groups) == source.steps_per_epoch == min(-(-num_parts // q), len(labelled))
    dealt = [c for group in groups for c in group]
    assert len(set(dealt)) == len(dealt) == min(num_parts, q * len(groups))
    assert labelled <= set(dealt)
    assert max(map(len, groups)) - min(map(len, groups)) <= 1
    assert max(map(len, groups)) <= q
    assert all(labelled & set(group) for group in groups)
    for batch in source.batches(seed=0, round=0, subnet=0, steps=len(groups)):
        assert batch.targets is None or len(batch.targets)


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_passes_go_on_from_round_to_round(steps):
    deal = lambda generator: torch.randperm(5, generator=generator).tolist()  # noqa: E731
    one = {"deal": deal, "steps_per_epoch": 5, "seed": 3, "subnet": 1}
    seen = [i for r in range(20) for i in passes(**one, round=r, steps=steps)]
    assert len(seen) == 20 * steps
    for start in range(0, len(seen) - 4, 5):
        assert sorted(seen[start : start + 5]) == list(range(5))
    assert seen[:5] != seen[5:10] or seen[5:10] != seen[10:15]
    others = [
        [i for r in range(20) for i in passes(**{**one, **change}, round=r, steps=steps)]
        for change in ({"seed": 4}, {"subnet": 0})
    ]
    assert seen not in others


def test_batches_depend_on_their_arguments_alone():
    data = load_dataset("digits")
    recipe = Cluster(num_parts=9, parts_per_batch=2, method="random")
    arguments = {"seed": 5, "round": 3, "subnet": 1, "steps": 4}
    first = list(recipe.bind(data).batches(**arguments))
    other = recipe.bind(data)
    list(other.batches(seed=0, round=0, subnet=0, steps=3))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    second = list(other.batches(**arguments))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(same_batch(*pair) for pair in zip(first, second, strict=True))
    third = list(other.batches(**{**arguments, "subnet": 2}))
    assert not all(
        len(a.x) == len(b.x) and same_batch(a, b) for a, b in zip(first, third, strict=True)
    )


# --- shares ---


@given(data=datasets(), draw=st.data())
def test_shares_within_clusters_are_those_of_a_count(data, draw):
    source = random_source(data, draw.draw(st.integers(1, data.num_nodes)))
    first, second = source.parts[data.edge_index]
    expected = int((first == second).sum()) / max(data.num_edges, 1)
    assert source.edges_within == pytest.approx(expected)


@pytest.mark.parametrize(("num_parts", "q"), [(4, 2), (5, 2), (7, 3), (6, 5)])
def test_a_pass_keeps_the_share_that_was_expected(num_parts, q):
    data = load_dataset("digits")
    source = random_source(training_graph(data), num_parts, q)
    graph = training_graph(data).adjacency
    first, second = source.parts[graph.edge_index]
    kept = torch.zeros(())
    for seed in range(500):  # every way to deal the clusters is as likely as any other
        batch = torch.empty(num_parts, dtype=torch.int64)
        for number, group in enumerate(source.deal(stream(seed))):
            batch[group] = number
        kept += (batch[first] == batch[second]).float().mean() / 500
    assert source.kept_edges == pytest.approx(float(kept), abs=0.03)


def test_batches_of_one_cluster_keep_what_lies_within():
    data = load_dataset("digits")
    one, all_ = random_source(data, 8), random_source(data, 8, 8)
    assert one.kept_edges == pytest.approx(one.edges_within)
    assert all_.kept_edges == pytest.approx(1.0)
    kept = [b.graph.num_edges for b in one.batches(seed=0, round=0, subnet=0, steps=8)]
    assert sum(kept) / data.num_edges == pytest.approx(one.kept_edges)


# --- settings ---


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"num_parts": 0}, "num_parts must be a whole number of at least 1"),
        ({"num_parts": 2.0}, "num_parts"),
        ({"num_parts": True}, "num_parts"),
        ({"num_parts": 4, "parts_per_batch": 0}, "parts_per_batch"),
        ({"num_parts": 4, "parts_per_batch": 5}, "cannot hold more clusters"),
        ({"num_parts": 4, "seed": -1}, "seed"),
        ({"num_parts": 4, "method": "kmeans"}, "unknown method.*'kmeans'.*metis or random"),
        ({"num_parts": 4, "normalization": "no"}, "unknown normalization"),
    ],
)
def test_wrong_settings_are_refused(settings, why):
    with pytest.raises(ConfigError, match=why):
        Cluster(**settings)


def test_more_clusters_than_nodes_are_refused():
    data = load_dataset("digits")
    with pytest.raises(ConfigError, match=r"cannot be cut into that many parts.*1,798 parts"):
        Cluster(num_parts=1798).bind(data)


def test_what_a_source_says_of_itself_tells_cuts_apart():
    data = load_dataset("digits")
    one = Cluster(num_parts=4).bind(data).describe()
    assert one["name"] == "Cluster"
    assert one["num_parts"] == 4
    assert one == Cluster(num_parts=4, cache=False).bind(data).describe()
    for change in ({"seed": 1}, {"method": "random"}, {"normalization": "full"}):
        assert one != Cluster(num_parts=4, **change).bind(data).describe()


def test_parts_that_stay_empty_are_no_clusters(monkeypatch):
    data = load_dataset("digits")
    cut = torch.arange(data.num_nodes) % 5
    cut[cut == 1] = 3
    monkeypatch.setattr(layout, "cut_graph", lambda *_, **__: cut)
    source = Cluster(num_parts=5).bind(data)
    assert source.num_clusters == source.steps_per_epoch == 4
    assert source.parts.unique().tolist() == [0, 1, 2, 3]
    batches = source.batches(seed=0, round=0, subnet=0, steps=4)
    assert sum(len(batch.x) for batch in batches) == data.num_nodes


# --- the training graph ---


@given(data=datasets())
def test_the_training_graph_has_no_other_nodes(data):
    part = training_graph(data)
    nodes = data.train_mask.nonzero()[:, 0]
    assert torch.equal(part.x, data.x[nodes])
    assert torch.equal(part.y, data.y[nodes])
    assert bool(part.train_mask.all())
    assert not bool((part.val_mask | part.test_mask).any())
    whole = torch.from_numpy(data.adjacency.to_scipy().toarray())
    expected = whole[nodes][:, nodes]
    assert torch.allclose(torch.from_numpy(part.adjacency.to_scipy().toarray()), expected)
    assert part.adjacency.is_constant(part.x)
    assert len(data.x) == data.num_nodes, "the whole is as it was"


def test_batches_do_not_depend_on_being_made_ahead(monkeypatch):
    data = load_dataset("digits")
    runs = []
    for count in (1, 8):
        monkeypatch.setattr(prefetch, "_cores", lambda count=count: count)
        source = random_source(data, 12, 3)
        batches = []
        for batch in source.batches(seed=1, round=2, subnet=0, steps=9):
            batch.graph.propagate("gcn", batch.x)
            batches.append(batch)
        runs.append(batches)
        # forms that training asked for are there before it asks again
        assert all(b.graph.remembered(b.x) == {"gcn"} for b in batches)
    assert all(same_batch(*pair) for pair in zip(*runs, strict=True))


# --- training ---


def community(**settings) -> GraphData:
    options = {"num_nodes": 600, "num_features": 8, "num_classes": 3, "average_degree": 8.0}
    return load_dataset("csbm", homophily=0.8, **options, **settings)


def trainer(data: GraphData, make=GCN, **settings) -> GISTTrainer:
    torch.manual_seed(0)
    shape = (8, 16, 2, 3) if make is zoo.GCN else (8, 16, 3, 2)
    defaults = {"num_subnets": 2, "local_steps": 5, "epochs": 20, "executor": "serial"}
    return GISTTrainer(make(*shape), data, progress=False, **{**defaults, **settings})


@pytest.mark.parametrize("executor", ["serial", "stacked"])
@pytest.mark.parametrize("make", [GCN, GraphSAGE, GAT, zoo.GCN])
@pytest.mark.parametrize("inductive", [False, True])
def test_subnets_learn_on_clusters(make, executor, inductive):
    settings = {"clusters": 12, "clusters_per_batch": 3, "inductive": inductive}
    run = trainer(community(), make, executor=executor, **settings)
    assert run.objective.steps_per_epoch == 4
    assert run.fit().val_metric > 0.65


def test_one_subnet_on_clusters_is_plain_training_bit_for_bit():
    data = community()
    settings = {"clusters": 9, "clusters_per_batch": 2, "seed": 3, "schedule": "constant"}
    run = trainer(data, num_subnets=1, rounds=2, epochs=None, keep_best=False, **settings)
    run.fit()

    torch.manual_seed(0)
    model = GCN(8, 16, 3, 2).train()
    source = Cluster(num_parts=9, parts_per_batch=2).bind(data)
    for number in range(2):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=5e-4, fused=True)
        with seeded("train", 3, number, 0):
            for batch in source.batches(seed=3, round=number, subnet=0, steps=5):
                optimizer.zero_grad()
                scores = model(batch.x, batch.graph)[batch.targets]
                torch.nn.functional.cross_entropy(scores, batch.y).backward()
                optimizer.step()
    for name, tensor in model.state_dict().items():
        assert torch.equal(run.model.state_dict()[name], tensor), name


def test_a_pass_of_training_takes_each_training_node_once():
    run = trainer(community(), clusters=10, clusters_per_batch=3, inductive=True)
    source, data = run.objective.source, run.objective.data
    batches = list(source.batches(seed=0, round=0, subnet=0, steps=run.objective.steps_per_epoch))
    seen = torch.cat([batch.x for batch in batches])
    assert len(seen) == int(data.train_mask.sum())
    assert sorted(map(tuple, seen.tolist())) == sorted(map(tuple, data.x[data.train_mask].tolist()))
    assert run.objective.data.num_nodes == 600, "evaluation is on the whole graph"


def test_resumed_on_clusters_equals_uninterrupted_bit_for_bit(tmp_path):
    settings = {"clusters": 9, "clusters_per_batch": 2, "rounds": 4, "epochs": None}
    whole = trainer(community(), **settings).fit()
    stopped = trainer(
        community(),
        **settings,
        checkpoint_every=1,
        out=tmp_path,
        callbacks=lambda _, record: record.round == 1,
    )
    stopped.fit()
    resumed = trainer(community(), **settings, checkpoint_every=1, out=tmp_path)
    result = resumed.fit(resume=tmp_path)
    for one, two in zip(whole.history, result.history, strict=True):
        assert one.train_loss == two.train_loss
        assert one.val_metric == two.val_metric


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"clusters": 8}, r"batches\."),
        ({"clusters_per_batch": 3}, r"batches\."),
        ({"clusters": None, "clusters_per_batch": 1}, r"batches\."),
        ({"inductive": True}, r"batches\.|inductive="),
        (
            {
                "clusters": None,
                "clusters_per_batch": 1,
                "batches": Cluster(num_parts=9, parts_per_batch=2, seed=1),
            },
            r"batches\.",
        ),
    ],
    ids=["clusters", "per batch", "whole graph", "inductive", "seed of the cut"],
)
def test_a_run_is_not_resumed_on_other_batches(tmp_path, change, what):
    settings = {"clusters": 9, "clusters_per_batch": 2, "rounds": 2, "epochs": None}
    trainer(community(), **settings, checkpoint_every=1, out=tmp_path).fit()
    other = trainer(community(), **{**settings, **change})
    with pytest.raises(CheckpointError, match=f"of another run.*({what})"):
        other.fit(resume=tmp_path)


def test_the_same_batches_by_setting_and_by_recipe():
    by_setting = trainer(community(), clusters=9, clusters_per_batch=2).fit()
    recipe = Cluster(num_parts=9, parts_per_batch=2)
    by_recipe = trainer(community(), batches=recipe).fit()
    assert by_setting.history[-1].train_loss == by_recipe.history[-1].train_loss


def test_layers_that_normalise_for_themselves_are_refused_where_the_graph_should():
    full = Cluster(num_parts=4, normalization="full")
    assert trainer(community(), batches=full).fit().val_metric > 0.5
    with pytest.raises(ConfigError, match=r"GCN is given the edges.*normalization='full'"):
        trainer(community(), zoo.GCN, batches=full)


@pytest.mark.parametrize("settings", [{"clusters": 3}, {"inductive": True}])
def test_a_convolution_that_keeps_the_edges_that_it_saw_first_is_refused(settings):
    def cached(*shape: int) -> zoo.GCN:
        return zoo.GCN(*shape[:2], 3, 3, cached=True)

    with pytest.raises(ConfigError, match=r"convs\.0 keeps the normalised edges.*cached=True"):
        trainer(community(), cached, **settings)
    trainer(community(), cached)


@pytest.mark.parametrize("q", [1, 2, 3])
def test_the_largest_batch_takes_as_much_as_any(q):
    data = community()
    source = random_source(data, 7, q)

    def size(nodes: Tensor) -> int:  # features twice, and edges as often as they are kept
        degrees = torch.bincount(data.edge_index[1], minlength=data.num_nodes)
        return len(nodes) * (2 * 4 * data.num_features + 32) + 32 * int(degrees[nodes].sum())

    sizes = {g: size(source.nodes(g)) for g in combinations(range(source.num_clusters), q)}
    worst = max(sizes, key=lambda group: sizes[group])
    assert same_batch(source.largest_batch(), source.batch(worst))
    assert source.kept_bytes >= sizes[worst]


def test_wrong_batches_are_refused():
    with pytest.raises(ConfigError, match=r"batches must be a recipe; got: 3"):
        trainer(community(), batches=3)
    with pytest.raises(ConfigError, match="either clusters or batches"):
        trainer(community(), clusters=3, batches=Cluster(num_parts=3))
    with pytest.raises(ConfigError, match="cut into that many parts"):
        trainer(community(), clusters=601)
    with pytest.raises(ConfigError, match="local_steps"):  # before the graph is cut
        trainer(community(), clusters=601, local_steps=0)


def test_batch_norm_statistics_are_taken_on_clusters():
    run = trainer(community(), lambda *shape: GCN(*shape, norm="batch"), clusters=6)
    run.fit()
    statistics = [b for n, b in run.model.named_buffers() if n.endswith("running_mean")]
    assert statistics
    assert all(bool((b != 0).any()) for b in statistics)
