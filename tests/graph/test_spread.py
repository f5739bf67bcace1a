"""Layer by layer on several ranks: here threads, so that many graphs, models and limits are tried.

Real processes are in tests/workers/test_spread.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch_geometric.nn as pyg
import torch_geometric.nn.models as zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gist.nn
from gist import Adjacency
from gist.costs.rehearsal import Stage
from gist.graph import spread
from gist.graph.inference import forward
from gist.graph.live_bytes import LiveBytes
from gist.graph.spread import Rehearsed, SpreadConv, SpreadLayerwise, cuts_of
from gist.graph.stages import find_stages
from gist.partition.spec import model_tensors
from tests.threads import Queues, on_ranks

FEATURES, CLASSES = 5, 3


class Arriving:
    def __init__(self, parts: Callable[[], Tensor]) -> None:
        self.wait = parts


class Threads(Rehearsed):
    """A rank that is a thread: it has the whole model, and queues to the others."""

    def __init__(self, model: nn.Module, rank: int, queues: Queues) -> None:
        super().__init__(model, rank, len(queues))
        self.queues = queues

    def take(self, names: Sequence[str], cuts: Sequence[slice] | None) -> dict[str, Tensor]:
        own = {name: self._tensors[name].detach() for name in names}
        return own if cuts is None else {n: t[cuts[self.rank]] for n, t in own.items()}

    def start(
        self, outgoing: Tensor, counts_out: Sequence[int], counts_in: Sequence[int]
    ) -> Arriving:
        for rank, part in enumerate(outgoing.split(list(counts_out))):
            if rank != self.rank:
                self.queues[self.rank][rank].put(part.clone())

        def wait() -> Tensor:
            ranks = [rank for rank in range(self.size) if rank != self.rank]
            parts = [self.queues[rank][self.rank].get(timeout=20) for rank in ranks]
            assert [len(part) for part in parts] == [counts_in[rank] for rank in ranks]
            return torch.cat(parts)

        return Arriving(wait)


FAMILIES: dict[str, Callable[..., nn.Module]] = {
    "GCN": lambda *sizes: gist.nn.GCN(*sizes, norm="batch"),
    "SAGE": lambda *sizes: gist.nn.GraphSAGE(*sizes),
    "concat": lambda *sizes: gist.nn.GraphSAGE(*sizes, concat=True, jk="cat"),
    "normalize": lambda *sizes: gist.nn.GraphSAGE(*sizes, normalize=True, jk="max"),
    "GIN": lambda f, d, c, n: zoo.GIN(f, d, n, c, train_eps=True, jk="max"),
    "GIN norm": lambda f, d, c, n: zoo.GIN(f, d, n, c, norm="batch_norm", act_first=True),
    "GAT 1": lambda *sizes: gist.nn.GAT(*sizes, heads=1),
    "GAT 3": lambda f, d, c, n: gist.nn.GAT(f, 3 * d, c, n, heads=3, norm=None),
    "GATv2 3": lambda f, d, c, n: gist.nn.GAT(f, 3 * d, c, n, heads=3, v2=True, residual=True),
}


def build(family: str, *sizes: int) -> nn.Module:
    model = FAMILIES[family](*sizes).double().eval()
    generator = torch.Generator().manual_seed(0)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype) - 0.4
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_var.abs_().add_(0.5)
    return model


@st.composite
def graphs(draw: st.DrawFn) -> Adjacency:
    nodes = draw(st.integers(2, 30))
    pairs = draw(st.lists(st.tuples(*[st.integers(0, nodes - 1)] * 2), max_size=60))
    edges = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T.contiguous()
    return Adjacency(edges[:, edges[0] != edges[1]], nodes)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=8)
@given(
    graph=graphs(),
    layers=st.integers(1, 4),
    width=st.integers(1, 12),
    ranks=st.integers(2, 4),
    share=st.floats(0, 1),
    block=st.sampled_from([1, 2**10, 2**24]),
)
def test_any_number_of_ranks_gives_the_plain_forward_pass(
    family, graph, layers, width, ranks, share, block
):
    model = build(family, FEATURES, width, CLASSES, layers)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(graph.num_nodes, FEATURES, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        expected = forward(model, x, graph)

    def run(rank: int, queues: Queues) -> Tensor:
        by_layer = SpreadLayerwise(model, x, graph, Threads(model, rank, queues))
        span = by_layer.enough - by_layer.smallest
        assert span >= 0
        limit = by_layer.smallest + int(share * span)
        with LiveBytes() as live:
            scores = by_layer.run(limit)
        assert live.peak <= limit
        return scores

    before, spread.EXCHANGE_BYTES = spread.EXCHANGE_BYTES, block
    try:
        got = on_ranks(ranks, run)
    finally:
        spread.EXCHANGE_BYTES = before
    assert torch.allclose(got[0], expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
    assert all(torch.equal(got[0], other) for other in got)


@pytest.mark.parametrize(("width", "size", "unit"), [(37, 3, 1), (12, 4, 4), (8, 5, 4), (1, 1, 1)])
def test_columns_are_dealt_once_in_order_and_in_whole_units(width, size, unit):
    cuts = cuts_of(width, size, unit)
    assert len(cuts) == size
    assert [i for cut in cuts for i in range(cut.start, cut.stop)] == list(range(width))
    widths = [(cut.stop - cut.start) / unit for cut in cuts]
    assert all(each.is_integer() for each in widths)
    assert max(widths) - min(widths) <= 1


def test_columns_are_the_rows_that_ranks_have_of_a_matrix():
    for width, size in ((37, 3), (4096, 5)):
        homes = torch.arange(width).tensor_split(size)
        assert [cut.start for cut in cuts_of(width, size)] == [int(rows[0]) for rows in homes]


def test_a_rank_has_its_share_of_weights_and_of_columns_on_their_way():
    graph = Adjacency(torch.tensor([[0, 1], [1, 2]]), 3000)
    model = gist.nn.GCN(FEATURES, 1024, CLASSES, 3)
    x = torch.zeros(3000, FEATURES)
    for size in (2, 4):
        layers = SpreadLayerwise(model, x, graph, Rehearsed(model, 0, size))
        conv = layers.layers[1].conv
        assert isinstance(conv, SpreadConv)
        flight = 2 * conv.rows * 1024 * 4 * 2 * (size - 1) // size
        assert conv.held == 1024 * 1025 * 4 // size + flight
        assert spread.EXCHANGE_BYTES / 2 < flight <= spread.EXCHANGE_BYTES
        assert layers.sent_bytes == (size - 1) * 2 * 3000 * 1024 * 4 // size
        sizes = [layers.smallest, layers.enough, layers.most]
        assert sizes == sorted(sizes)


def test_what_it_takes_is_known_without_memory_for_it():
    graph = Adjacency(torch.tensor([[0, 1], [1, 2]]), 300)
    model, x = gist.nn.GraphSAGE(FEATURES, 64, CLASSES, 3, norm="batch").eval(), torch.zeros(300, 5)
    real = SpreadLayerwise(model, x, graph, Rehearsed(model, 1, 3))
    with torch.device("meta"):
        empty = gist.nn.GraphSAGE(FEATURES, 64, CLASSES, 3, norm="batch").eval()
    stage = Stage(torch.device("cpu"))
    outline = stage.outline(model)
    with stage.arranging():
        rehearsed = SpreadLayerwise(outline, x, graph, Rehearsed(outline, 1, 3))
    for other in (rehearsed, SpreadLayerwise(empty, x, graph, Rehearsed(empty, 1, 3))):
        assert other.smallest == real.smallest
        assert other.most == real.most
        assert other.sent_bytes == real.sent_bytes == 2 * 2 * 300 * 21 * 4


def test_convolutions_whose_columns_need_each_other_are_computed_whole():
    """By every rank, with all of their weights."""
    whole = [
        pyg.SAGEConv(5, 8, project=True),
        pyg.GATConv(5, 8, heads=2, concat=False),
        pyg.GATv2Conv(5, 8, aggr="max"),
        pyg.GINConv(nn.Linear(5, 8), aggr="max"),
        pyg.GINConv(nn.Sequential(nn.ReLU(), nn.Linear(5, 8))),
        pyg.GraphConv(5, 8),
    ]
    assert [find_stages(conv) for conv in whole] == [None] * len(whole)
    network = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.LayerNorm(9), nn.Linear(9, 8))
    stages = find_stages(pyg.GINConv(network))
    assert stages is not None
    assert [(stage.width, len(stage.after)) for stage in stages] == [(9, 2), (8, 0)]


def test_every_tensor_of_a_hidden_layer_is_cut_or_small():
    for family in FAMILIES:
        model = build(family, FEATURES, 12, CLASSES, 3)
        cut = {id(t) for stage in find_stages(model.convs[1]) or [] for t in stage.cut}
        left = [t for t in model_tensors(model.convs[1]).values() if id(t) not in cut]
        assert all(t.numel() <= max(t.shape, default=1) * 3 for t in left), family
