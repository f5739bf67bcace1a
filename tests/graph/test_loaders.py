"""PyTorch Geometric's loaders as batches."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import torch_geometric.nn.models as zoo
from torch_geometric.data import Batch, Data
from torch_geometric.loader import DataLoader, NeighborLoader, RandomNodeLoader
from torch_geometric.utils import k_hop_subgraph

from gist import GISTTrainer, GraphData, PyGLoader, load_dataset
from gist.errors import ConfigError, DataError, MissingDependencyError
from gist.graph.batch import GraphBatch, training_graph
from gist.nn import GraphSAGE

ONE = {"seed": 0, "round": 0, "subnet": 0}


def digits() -> GraphData:
    return load_dataset("digits", train_per_class=20)


class Neighbours:
    """Batches laid out as NeighborLoader lays them out: seeds first, then what they depend on."""

    def __init__(self, data: Data, batch_size: int, seeds: torch.Tensor) -> None:
        self.data, self.batch_size, self.seeds = data, batch_size, seeds

    def __len__(self) -> int:
        return -(-len(self.seeds) // self.batch_size)

    def __iter__(self) -> Iterator[Data]:
        order = self.seeds[torch.randperm(len(self.seeds))]
        for seeds in order.split(self.batch_size):
            nodes, _, _, kept = k_hop_subgraph(seeds, 2, self.data.edge_index)
            nodes = torch.cat([seeds, nodes[~torch.isin(nodes, seeds)]])
            place = torch.full((self.data.num_nodes,), -1)
            place[nodes] = torch.arange(len(nodes))
            batch = Data(edge_index=place[self.data.edge_index[:, kept]], n_id=nodes)
            for name in ("x", "y", "train_mask", "val_mask", "test_mask"):
                batch[name] = self.data[name][nodes]
            if "edge_weight" in self.data:
                batch.edge_weight = self.data.edge_weight[kept]
            batch.batch_size, batch.input_id = len(seeds), seeds
            yield batch


def neighbours(batch_size: int = 32) -> PyGLoader:
    return PyGLoader(lambda data: Neighbours(data, batch_size, data.train_mask.nonzero()[:, 0]))


def random_nodes(num_parts: int = 4) -> PyGLoader:
    return PyGLoader(lambda data: RandomNodeLoader(data, num_parts=num_parts, shuffle=True))


def targets(batch: GraphBatch) -> torch.Tensor:
    return torch.arange(len(batch.x)) if batch.targets is None else batch.targets


def features(x: torch.Tensor) -> list[tuple[float, ...]]:
    return sorted(map(tuple, x.tolist()))


def test_seeds_are_what_the_loss_is_taken_over():
    data = digits()
    source = neighbours(32).bind(data)
    assert source.steps_per_epoch == 7
    batches = list(source.batches(**ONE, steps=7))
    assert [len(batch.y) for batch in batches] == [32] * 6 + [8]
    for batch in batches:
        assert torch.equal(batch.targets, torch.arange(len(batch.y)))
        assert len(batch.x) > len(batch.y)
        assert batch.graph.is_constant(batch.x)
    seen = torch.cat([batch.x[batch.targets] for batch in batches])
    assert features(seen) == features(data.x[data.train_mask])
    labels = torch.cat([batch.y for batch in batches])
    assert torch.equal(labels.bincount(), data.y[data.train_mask].bincount())


def test_seeds_of_other_splits_are_not_trained_on():
    data = digits()
    every = PyGLoader(lambda d: Neighbours(d, 300, torch.arange(d.num_nodes)))
    seen = torch.cat([b.x[targets(b)] for b in every.bind(data).batches(**ONE, steps=6)])
    assert features(seen) == features(data.x[data.train_mask])


def test_without_seeds_the_training_nodes_of_a_batch_count():
    data = digits()
    source = random_nodes().bind(data)
    assert source.steps_per_epoch == 4
    batches = list(source.batches(**ONE, steps=4))
    assert sum(len(b.x) for b in batches) == data.num_nodes
    seen = torch.cat([b.x[targets(b)] for b in batches])
    assert features(seen) == features(data.x[data.train_mask])
    assert sum(b.graph.num_edges for b in batches) < data.num_edges


def test_the_number_of_joined_graphs_is_no_number_of_seeds():
    data = digits()
    joined = PyGLoader(lambda d: DataLoader([d, d], batch_size=2))
    (batch,) = joined.bind(data).batches(**ONE, steps=1)
    assert len(batch.y) == 2 * int(data.train_mask.sum())


def test_edge_weights_are_those_of_the_batch():
    plain = digits()
    weight = torch.rand(plain.num_edges) + 0.5
    data = GraphData.from_edges(
        plain.edge_index,
        plain.x,
        plain.y,
        train=plain.train_mask,
        val=plain.val_mask,
        test=plain.test_mask,
        edge_weight=weight,
        directed=True,
    )
    batch = next(neighbours(4).bind(data).batches(**ONE, steps=1))
    assert batch.graph.edge_weight.shape == (batch.graph.num_edges,)
    assert torch.isin(batch.graph.edge_weight, data.edge_weight).all()


@pytest.mark.parametrize("make", [neighbours, random_nodes])
def test_streams_repeat_and_touch_nothing(make):
    data = digits()

    def run(source, between: Callable[[], object] = lambda: None, **changes) -> list[torch.Tensor]:
        seen = []
        for batch in source.batches(**{**ONE, **changes}, steps=9):
            seen.append(batch.x)
            between()
        return seen

    def same(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
        return all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(one, two, strict=True))

    source = make().bind(data)
    first = run(source)
    assert len(first) == 9

    def states():
        own = np.random.get_state()[1].tolist()  # noqa: NPY002
        return torch.get_rng_state().tolist(), own, random.getstate()

    before = states()
    again = run(make().bind(data))
    assert states() == before
    assert same(first, again)
    legacy = np.random.rand
    noise = run(source, between=lambda: (torch.rand(3), legacy(), random.random()))
    assert same(first, noise), "what training draws changes nothing"
    for change in ({"seed": 1}, {"round": 1}, {"subnet": 1}):
        assert not same(first, run(source, **change))


class Slices:
    """Ordered slices of the training nodes, with some noise of every kind in their features."""

    def __init__(self, data: Data, steps: int) -> None:
        self.data, self.slices = data, data.train_mask.nonzero()[:, 0].chunk(steps)

    def __len__(self) -> int:
        return len(self.slices)

    def __iter__(self) -> Iterator[Data]:
        return map(self.collate, self.slices)

    def collate(self, nodes) -> Data:
        batch = self.data.subgraph(torch.as_tensor(nodes))
        noise = torch.rand(()) + np.random.rand() + random.random()  # noqa: NPY002
        batch.x = batch.x + 1e-3 * noise.float()
        return batch


def unsized(data: Data) -> Iterator[Data]:
    class Unsized(Slices):
        __len__ = None

    return Unsized(data, 5)


def plain(data: Data, **settings) -> DataLoader:
    """A torch DataLoader as PyG's own are: its order is that of indices, then collated."""
    nodes = data.train_mask.nonzero()[:, 0].tolist()
    return torch.utils.data.DataLoader(
        nodes, batch_size=40, collate_fn=Slices(data, 5).collate, **settings
    )


SERIES = {
    "ordered": (plain, None),
    "shuffled": (lambda data: plain(data, shuffle=True), None),
    "its own generator": (
        lambda data: plain(data, shuffle=True, generator=torch.Generator()),
        None,
    ),
    "any iterable": (lambda data: Slices(data, 5), None),
    "no length": (unsized, 5),
    "an epoch of another length": (plain, 3),
    "PyG, ordered": (lambda data: RandomNodeLoader(data, num_parts=5), None),
    "PyG, shuffled": (lambda data: RandomNodeLoader(data, num_parts=5, shuffle=True), None),
}


@pytest.mark.parametrize("make", SERIES)
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 7])
def test_passes_go_on_from_round_to_round(make, steps):
    source = PyGLoader(*SERIES[make]).bind(digits())
    for subnet in (0, 1):
        given = {"seed": 0, "subnet": subnet}
        series = [batch.x for batch in source.batches(round=0, steps=14, **given)]
        for round in (2, 0, 1):
            batches = source.batches(round=round, steps=steps, **given)
            seen, wanted = [batch.x for batch in batches], series[round * steps :][:steps]
            assert len(seen) == steps
            assert all(torch.equal(a, b) for a, b in zip(seen, wanted, strict=False)), round


@pytest.mark.parametrize("make", ["ordered", "shuffled", "any iterable", "no length"])
def test_one_pass_sees_every_training_node_once(make):
    data = digits()
    recipe = PyGLoader(*SERIES[make])
    rounds = [list(recipe.bind(data).batches(seed=3, round=r, subnet=1, steps=1)) for r in range(5)]
    labels = torch.cat([batch.y for (batch,) in rounds])
    assert torch.equal(labels.bincount(), data.y[data.train_mask].bincount())
    seen = torch.cat([(16 * batch.x).round() for (batch,) in rounds])
    assert features(seen) == features(16 * data.x[data.train_mask])


def test_what_earlier_rounds_have_seen_is_not_sampled_again():
    collated = []

    def make(data):
        loader = plain(data, shuffle=True)
        collate = loader.collate_fn
        loader.collate_fn = lambda nodes: (collated.append(nodes), collate(nodes))[1]
        return loader

    source = PyGLoader(make).bind(digits())
    collated.clear()
    list(source.batches(seed=0, round=3, subnet=0, steps=1))
    assert len(collated) == 1


def test_workers_of_a_loader_take_the_order_up_too():
    data = digits()
    source = PyGLoader(
        lambda d: plain(d, num_workers=1, persistent_workers=True, shuffle=True)
    ).bind(data)
    labels = [next(source.batches(seed=0, round=r, subnet=0, steps=1)).y for r in range(5)]
    assert torch.equal(torch.cat(labels).bincount(), data.y[data.train_mask].bincount())


def test_passes_that_end_early_are_followed_by_the_next():
    source = PyGLoader(unsized, steps_per_epoch=50).bind(digits())
    assert len(list(source.batches(seed=0, round=1, subnet=0, steps=23))) == 23


def test_a_generator_of_the_loader_is_seeded_too():
    data = digits()

    class Own(Neighbours):
        generator = torch.Generator()

        def __iter__(self):
            self.seeds = (
                self.seeds[torch.randperm(len(self.seeds), generator=self.generator)].sort().values
            )
            yield from super().__iter__()

    def first():
        source = PyGLoader(lambda d: Own(d, 9, d.train_mask.nonzero()[:, 0])).bind(data)
        return next(source.batches(**ONE, steps=1)).x

    assert torch.equal(first(), first())


def test_batches_without_training_nodes_are_passed_over():
    data = load_dataset("digits", train_per_class=1)
    source = random_nodes(60).bind(data)
    batches = list(source.batches(**ONE, steps=40))
    assert len(batches) == 40
    assert all(len(batch.y) for batch in batches)


def test_a_loader_without_any_is_refused():
    data = digits()
    rest = PyGLoader(lambda d: Neighbours(d, 9, d.val_mask.nonzero()[:, 0]))
    with pytest.raises(ConfigError, match=r"no batch with a training node.*input_nodes"):
        rest.bind(data)


def test_a_loader_that_cannot_sample_here_says_so_early():
    def make(data):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # without pyg-lib it is deprecated, says PyG
            return NeighborLoader(data, [3, 3], batch_size=8, input_nodes=data.train_mask)

    try:
        next(
            iter(
                make(
                    Data(
                        x=torch.ones(2, 1),
                        edge_index=torch.tensor([[0], [1]]),
                        train_mask=torch.tensor([True, True]),
                    )
                )
            )
        )
    except ImportError:
        pass
    else:
        pytest.skip("pyg-lib or torch-sparse is installed")
    with pytest.raises(MissingDependencyError, match=r"cannot sample here.*pyg-lib.*gist\.Cluster"):
        GISTTrainer(GraphSAGE(64, 8, 10), digits(), batches=PyGLoader(make))


@pytest.mark.parametrize(
    ("loader", "error", "why"),
    [
        (lambda data: 3, ConfigError, "something to iterate over; got: int"),
        (lambda data: iter([data]), ConfigError, "not known; got: None.*steps_per_epoch="),
        (lambda data: [torch.ones(3)], DataError, "Data with x, y and edge_index; got: Tensor"),
        (lambda data: [Data(x=data.x)], DataError, "Data with x, y and edge_index"),
        (
            lambda data: [Data(x=data.x, y=data.y, edge_index=data.edge_index)],
            DataError,
            "which of its nodes to train on",
        ),
        (
            lambda data: [Data(**{**data.to_dict(), "x": data.x[:, :3]})],
            DataError,
            r"does not fit the data.*\(1797, 3\).*64 features",
        ),
    ],
)
def test_loaders_that_give_something_else_are_refused(loader, error, why):
    with pytest.raises(error, match=why):
        PyGLoader(loader).bind(digits())


def test_a_loader_instead_of_a_function_is_refused():
    with pytest.raises(ConfigError, match="a function that makes the loader"):
        PyGLoader([1, 2]).bind(digits())
    loader = [Data()]
    with pytest.raises(ConfigError, match=r"batches must be a recipe.*put a loader.*PyGLoader"):
        GISTTrainer(GraphSAGE(64, 8, 10), digits(), batches=loader)


def test_a_length_can_be_given():
    data = digits()

    class Endless(Neighbours):
        __len__ = None

    make = lambda d: Endless(d, 50, d.train_mask.nonzero()[:, 0])  # noqa: E731
    assert PyGLoader(make, steps_per_epoch=5).bind(data).steps_per_epoch == 5
    for wrong in (0, 2.5, True):
        with pytest.raises(ConfigError, match="one pass of the loader"):
            PyGLoader(make, steps_per_epoch=wrong).bind(data)


def test_what_a_source_says_of_itself_tells_loaders_apart():
    data = digits()
    one = neighbours(32).bind(data).describe()
    assert one == neighbours(32).bind(data).describe()
    assert one["loader"] == "Neighbours"
    assert one != neighbours(31).bind(data).describe()
    assert one["first_batch"] != neighbours(31).bind(data).describe()["first_batch"]


def test_inductive_loaders_see_training_nodes_only():
    data = digits()
    seen = []

    def make(graph):
        seen.append(graph)
        return RandomNodeLoader(graph, num_parts=2)

    source = PyGLoader(make).bind(training_graph(data))
    assert features(seen[0].x) == features(data.x[data.train_mask])
    batches = list(source.batches(**ONE, steps=2))
    assert all(len(b.y) == len(b.x) for b in batches)


@pytest.mark.parametrize("executor", ["serial", "stacked"])
@pytest.mark.parametrize("make", [neighbours, random_nodes])
@pytest.mark.parametrize("model", ["gist", "pyg"])
def test_subnets_learn_from_loaders(make, executor, model):
    data = digits()
    torch.manual_seed(0)
    made = GraphSAGE(64, 32, 10) if model == "gist" else zoo.GCN(64, 32, 2, 10)
    trainer = GISTTrainer(
        made,
        data,
        num_subnets=2,
        local_steps=8,
        epochs=20,
        batches=make(),
        executor=executor,
        progress=False,
    )
    assert trainer.fit().val_metric > 0.7
    assert isinstance(Batch(), Data)
