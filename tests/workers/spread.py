"""Evaluates models that are spread over workers, and checks what comes out and what it takes.

Run by test_spread.py.
"""

from __future__ import annotations

import hashlib
import math
import sys
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch_geometric.nn as pyg
import torch_geometric.nn.models as zoo
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gist.nn
from gist import Adjacency, DisjointUniform, GISTTrainer, load_dataset, spread
from gist.errors import ConfigError
from gist.execution.comm import Comm, join
from gist.execution.distributed import ShardedStore
from gist.graph import spread as graph_spread
from gist.graph.hidden import Hidden
from gist.graph.inference import forward
from gist.graph.live_bytes import LiveBytes
from gist.graph.spread import Rehearsed, SpreadLayerwise
from gist.partition.spec import model_tensors
from gist.partition.wiring import partition_spec
from gist.spread import ShardPeers

NODES, FEATURES, CLASSES = 30, 5, 3

GAT: dict[str, Any] = {"family": "GAT", "width": 36}
CASES: dict[str, dict[str, Any]] = {
    "gcn": {"family": "GCN"},
    "gcn batch": {"family": "GCN", "norm": "batch"},
    "gcn graph norm": {"family": "GCN", "norm": pyg.LayerNorm(37)},
    "gcn batch of all": {
        "family": "GCN",
        "norm": nn.BatchNorm1d(37, track_running_stats=False),
        "act_first": True,
    },
    "gcn mean": {"family": "GCN", "aggr": "mean", "bias": False, "act": nn.PReLU()},
    "gcn cat": {"family": "GCN", "jk": "cat", "layers": 4},
    "gcn max": {"family": "GCN", "jk": "max", "layers": 4, "norm": "batch"},
    "gcn last": {"family": "GCN", "jk": "last"},
    "gcn narrows": {"family": "GCN", "features": 50, "width": 11},
    "sage": {"family": "GraphSAGE"},
    "sage float32": {"family": "GraphSAGE", "dtype": torch.float32},
    "sage concat": {"family": "GraphSAGE", "concat": True},
    "sage normalize": {"family": "GraphSAGE", "normalize": True, "norm": None},
    "sage max": {"family": "pygGraphSAGE", "aggr": "max", "normalize": True, "messages": True},
    "sage project": {"family": "GraphSAGE", "project": True, "whole": True},
    "gin": {"family": "pygGIN", "train_eps": True, "eps": 0.3},
    "gin batch cat": {"family": "pygGIN", "norm": "batch_norm", "jk": "cat"},
    "gin max max": {"family": "pygGIN", "jk": "max", "layers": 4},
    "gin no sums": {"family": "pygGIN", "aggr": "max", "whole": True},
    "gat 1": {**GAT, "heads": 1},
    "gat 4": {**GAT, "heads": 4, "norm": "batch"},
    "gat heads": {**GAT, "heads": 6, "units": "heads"},
    "gat residual cat": {**GAT, "heads": 3, "residual": True, "jk": "cat"},
    "gat mean of heads": {**GAT, "heads": 2, "concat": False, "whole": True},
    "gatv2 4": {**GAT, "heads": 4, "v2": True},
    "gatv2 2": {**GAT, "heads": 2, "v2": True, "residual": True, "jk": "max", "whole": True},
    "gatv2 shared": {**GAT, "heads": 6, "v2": True, "share_weights": True, "units": "heads"},
    "fewer columns than ranks": {"family": "GCN", "width": 2, "whole": True},
}


def build(
    *,
    family: str,
    width: int = 37,
    layers: int = 3,
    features: int = FEATURES,
    dtype: torch.dtype = torch.float64,
    whole: bool = False,
    messages: bool = False,
    **choice: Any,
) -> nn.Module:
    """A model with random parameters and statistics, the same on all ranks."""
    sizes = (features, width, CLASSES, layers)
    if family.startswith("pyg"):
        model = getattr(zoo, family[3:])(features, width, layers, CLASSES, **choice)
    else:
        model = getattr(gist.nn, family)(*sizes, **choice)
    generator = torch.Generator().manual_seed(0)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = 0.5 * torch.randn(tensor.shape, generator=generator)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d) and module.running_var is not None:
            module.running_var.abs_().add_(0.5)
    return model.to(dtype).eval()


class Largest(TorchDispatchMode):
    """The most bytes of one tensor that an operation made."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in tree_leaves(args) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in known:
                    self.nbytes = max(self.nbytes, storage.nbytes())
        return out


def same(comm: Comm, scores: Tensor) -> bool:
    """Whether every rank has the same bits."""
    own = hashlib.sha256(scores.numpy().tobytes()).hexdigest()
    return len(set(comm.gather_values(own))) == 1


def expected_bytes(peers: ShardPeers, layers: SpreadLayerwise) -> tuple[int, int]:
    """What this rank sends and receives: entries that lie elsewhere, and columns of others."""
    rank, size, shards = peers.rank, peers.size, peers.shards
    sent = received = 0
    convs: list[Any] = [layer.conv for layer in layers.layers]
    later = {name for conv in convs for name in conv.names}
    small = [name for name in shards.tensors if name not in later]
    taken = [(small, None), *((list(conv.names), conv.cuts) for conv in convs)]
    for names, cuts in taken:
        for name in names:
            owner, shape = shards.owner(name), shards.spec.layouts[name].shape
            if owner is None:
                continue
            along = shards.homes[name].dim  # type: ignore[union-attr]
            row = math.prod(shape) // shape[along] * shards.tensors[name].element_size()
            wanted = [owner if cuts is None else owner[cut] for cut in cuts or [None] * size]
            assert along == 0 or cuts is None
            received += row * int((wanted[rank] != rank).sum())
            sent += row * sum(int((wanted[r] == rank).sum()) for r in range(size) if r != rank)
    for conv in convs:
        if conv.cuts is None:
            continue
        own, item = conv.own.stop - conv.own.start, layers.x.element_size()
        sent += (size - 1) * NODES * own * item
        received += NODES * (conv.stage.width - own) * item
        if getattr(conv.stage.module, "att_src", None) is not None:
            folded = 2 * conv.stage.module.heads * conv._like.size(1) * item
            sent += (size - 1) * folded
            received += (size - 1) * folded
    return sent, received


def check(comm: Comm, settings: dict[str, Any]) -> None:
    """One model: exact, the same on all ranks, within its limits, with the bytes it should send."""
    model = build(**settings)
    first = next(iter(model.parameters()))
    generator = torch.Generator().manual_seed(1)
    edges = torch.randint(NODES - 1, (2, 100), generator=generator)  # a node is alone
    edges = torch.cat([edges[:, edges[0] != edges[1]], torch.tensor([[3], [3]])], dim=1)
    graph = Adjacency(edges, NODES)
    width = settings.get("features", FEATURES)
    x = torch.randn(NODES, width, generator=generator, dtype=first.dtype)
    with torch.no_grad():
        expected = forward(model, x, graph)
    largest = max((t.nbytes for t in model_tensors(model).values()), default=0)
    rehearsed = SpreadLayerwise(model, x, graph, Rehearsed(model, comm.rank, comm.size))
    spec = partition_spec(model, None)
    store = ShardedStore(model, spec, comm, torch.device("cpu"))
    peers = ShardPeers(store.shards)
    before, made = (comm.sent, comm.received), Largest()
    with made:
        layers = SpreadLayerwise(store.model, x, graph, peers)
        scores = layers.run(layers.most)
    traffic = comm.sent - before[0], comm.received - before[1]
    assert traffic == expected_bytes(peers, layers)
    apart = comm.size > 1 and not settings.keys() & {"whole", "messages", "features"}
    assert not apart or made.nbytes < largest, (made.nbytes, largest)
    _agrees(scores, expected)
    assert same(comm, scores)
    sizes = [layers.smallest, layers.enough, layers.most]
    assert sizes == sorted(sizes)
    assert all(each == sizes for each in comm.gather_values(sizes))
    assert rehearsed.smallest >= layers.smallest
    assert rehearsed.sent_bytes == layers.sent_bytes

    limit = (layers.smallest + layers.enough) // 2
    with LiveBytes() as live:
        again = layers.run(limit)
    assert live.peak <= limit
    _agrees(again, expected)
    assert same(comm, again)

    _scatter(store)
    before = comm.sent, comm.received
    layers = SpreadLayerwise(store.model, x, graph, peers)
    with LiveBytes() as live:
        least = layers.run(layers.smallest)
    assert live.peak <= layers.smallest
    assert (comm.sent - before[0], comm.received - before[1]) == expected_bytes(peers, layers)
    _agrees(least, expected)
    assert same(comm, least)
    for tensor in model_tensors(store.model).values():
        assert tensor.is_meta


def _agrees(got: Tensor, expected: Tensor) -> None:
    scale = 100 * torch.finfo(got.dtype).eps * float(expected.abs().max())
    assert got.shape == expected.shape
    assert float((got - expected).abs().max()) <= scale


def _scatter(store: ShardedStore) -> None:
    """A round in which nothing is trained: rows of vectors move to where they would have been."""
    smallest = min(store.spec.sizes.values())
    deal = DisjointUniform()(store.spec.sizes, min(5, smallest), seed=0, round=0)
    shards = store.shards
    with store.open(deal) as transfer:
        for subnet in range(shards.comm.rank, deal.num_subnets, shards.comm.size):
            transfer.save(transfer._parts[subnet])
        transfer.finish()


def check_files(comm: Comm) -> None:
    """Hidden layers go to files where the limit has no room for them."""
    made: list[tuple[int, int]] = []
    in_file = Hidden.in_file

    def noting(shape: tuple[int, int], *args: Any, **kwargs: Any) -> Hidden:
        made.append(shape)
        return in_file(shape, *args, **kwargs)

    model = build(family="GraphSAGE", width=64)
    nodes, generator = 2000, torch.Generator().manual_seed(0)
    graph = Adjacency(torch.randint(nodes, (2, 6000), generator=generator), nodes)
    x = torch.randn(nodes, FEATURES, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        expected = forward(model, x, graph)
    store = ShardedStore(model, partition_spec(model, None), comm, torch.device("cpu"))
    whole, graph_spread.EXCHANGE_BYTES = graph_spread.EXCHANGE_BYTES, 2**16
    layers = SpreadLayerwise(store.model, x, graph, ShardPeers(store.shards))
    graph_spread.EXCHANGE_BYTES = whole
    Hidden.in_file = noting  # type: ignore[method-assign]
    assert layers.smallest < layers.enough - layers.hidden_bytes // 2
    try:
        with LiveBytes() as live:
            scores = layers.run(layers.smallest)
    finally:
        Hidden.in_file = in_file  # type: ignore[method-assign]
    assert made == [(nodes, 64)] * 2
    assert live.peak <= layers.smallest
    _agrees(scores, expected)
    assert same(comm, scores)


def check_trainer(comm: Comm) -> None:
    """A trainer evaluates and predicts with the model that it has, and never assembles it."""
    data = load_dataset("csbm", num_nodes=120, num_features=7, num_classes=3, seed=1)

    def make(how: str, norm: str = "layer", **more: Any) -> GISTTrainer:
        torch.manual_seed(0)
        model = gist.nn.GraphSAGE(7, 20, 3, num_layers=3, norm=norm)
        given = {"local_steps": 2, "rounds": 3, "progress": False, "evaluation": how, **more}
        return GISTTrainer(model, data, num_subnets=4, **given)

    run, assembled = make("layerwise"), ShardedStore.assembled
    ShardedStore.assembled = None  # type: ignore[method-assign, assignment]
    try:
        result = run.fit()
        scores, metrics = run.predict(), run.evaluate("test")
    finally:
        ShardedStore.assembled = assembled  # type: ignore[method-assign]
    assert same(comm, scores)
    whole = run.gather_model()
    if whole is not None:
        with torch.no_grad():
            _agrees(scores, forward(whole, data.x, data.adjacency))
    other = make("full")
    assert other.spread is None
    assert other.fit().test_metric == result.test_metric
    assert other.evaluate("test") == metrics

    state = run._more_choices()
    assert run.spread is not None
    assert state["spread_limit"] == run.spread.memory_limit
    run._restore_more({**state, "spread_limit": 2**22})
    assert run.spread.memory_limit == 2**22
    run._restore_more({**state, "spread_limit": 2**60})
    assert run.spread.memory_limit == 2**22

    with pytest.raises(ConfigError, match="BatchNorm cannot be re-estimated"):
        make("layerwise", "batch")
    make("layerwise", "batch", recalibrate_bn=False).fit()
    assert make("auto").spread is None
    before, spread.SPREAD_BYTES = spread.SPREAD_BYTES, 1000
    try:
        assert make("auto").spread is not None
        assert make("auto", "batch").spread is None
        assert make("clusters", clusters=4).spread is None
    finally:
        spread.SPREAD_BYTES = before
    run.spread = replace(run.spread, memory_limit=1000)
    with pytest.raises(ConfigError, match="memory_limit is too small"):
        run.spread.check()


def main() -> None:
    torch.set_num_threads(1)
    comm = join(torch.device("cpu"), timeout=60)
    checks = {name: partial(check, comm, settings) for name, settings in CASES.items()}
    checks |= {"files": partial(check_files, comm), "trainer": partial(check_trainer, comm)}
    for name in sys.argv[1:] or checks:
        try:
            checks[name]()
        except Exception as error:
            error.add_note(f"rank {comm.rank}, {name}")
            raise


if __name__ == "__main__":
    main()
