"""The same graph is the same data, and trains to the same bits, wherever it comes from.

A builder takes the graph as a PyG ``Data``, and hands it on in its own form: edges in another
order, or each once, nodes by name, numbers as text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch_geometric.data import Data

from gist import GISTTrainer, load_dataset
from gist.catalog.cards import load_card
from gist.graph.data import GraphData
from gist.graph.dgl_graph import import_dgl
from gist.graph.ogb_files import read_arxiv
from gist.nn import GCN
from tests.ogb_layout import write_ogb_layout

CLASSES = 7
SPLITS = ("train", "val", "test")


def shuffled(graph: Data) -> torch.Tensor:
    """``[2, E]``: the edges in no particular order."""
    generator = torch.Generator().manual_seed(1)
    return graph.edge_index[:, torch.randperm(graph.num_edges, generator=generator)]


def each_once(graph: Data) -> list[list[int]]:
    """Pairs: one direction of every edge, in no particular order."""
    return [[u, v] for u, v in shuffled(graph).T.tolist() if u <= v]


def splits(graph: Data, form: Callable[[torch.Tensor], object] = torch.Tensor.numpy) -> dict:
    return {split: form(graph[f"{split}_mask"]) for split in SPLITS}


def from_pyg(graph: Data, folder: Path) -> GraphData:
    other = graph.clone()
    other.edge_index = shuffled(graph)
    return GraphData.from_pyg(other)


def from_arrays(graph: Data, folder: Path) -> GraphData:
    numbers = splits(graph, lambda mask: mask.nonzero()[:, 0].tolist())
    return GraphData.from_edges(shuffled(graph).tolist(), graph.x.numpy(), graph.y, **numbers)


def from_scipy(graph: Data, folder: Path) -> GraphData:
    ones, ends = np.ones(graph.num_edges), tuple(shuffled(graph).numpy())
    matrix = sp.coo_array((ones, ends), shape=(graph.num_nodes,) * 2)
    return GraphData.from_scipy(matrix.tocsc(), graph.x, graph.y, **splits(graph))


def from_networkx(graph: Data, folder: Path) -> GraphData:
    made = nx.Graph()
    for node, (x, y) in enumerate(zip(graph.x.tolist(), graph.y.tolist(), strict=True)):
        made.add_node(f"paper {node}", words=x, topic=y)
    made.add_edges_from((f"paper {u}", f"paper {v}") for u, v in each_once(graph))
    return GraphData.from_networkx(made, x="words", y="topic", **splits(graph))


def from_dgl(graph: Data, folder: Path) -> GraphData:
    made = import_dgl().graph(tuple(shuffled(graph)), num_nodes=graph.num_nodes)
    made.ndata.update(feat=graph.x, label=graph.y)
    return GraphData.from_dgl(made, **splits(graph))


def from_csv(graph: Data, folder: Path) -> GraphData:
    names = [f"paper {node}" for node in range(graph.num_nodes)]
    tables = {
        "edges": [[names[u], names[v]] for u, v in each_once(graph)],
        "features": [[name, *row] for name, row in zip(names, graph.x.tolist(), strict=True)],
        "labels": list(zip(names, graph.y.tolist(), strict=True)),
    }
    for name, rows in tables.items():
        text = "".join(",".join(map(str, row)) + "\n" for row in rows)
        (folder / f"{name}.csv").write_text(text)
    numbers = splits(graph, lambda mask: [names[node] for node in mask.nonzero()[:, 0]])
    files = [folder / f"{name}.csv" for name in tables]
    return GraphData.from_csv(*files, header=False, symmetrize=True, **numbers)


def from_archive(graph: Data, folder: Path) -> GraphData:
    arrays = {"edge_index": shuffled(graph).numpy(), "x": graph.x.numpy(), "y": graph.y.numpy()}
    np.savez(folder / "graph.npz", **arrays, **splits(graph))
    return GraphData.load(folder / "graph.npz")


def from_folder(graph: Data, folder: Path) -> GraphData:
    return GraphData.load(from_pyg(graph, folder).save(folder / "graph"))


def from_ogb_files(graph: Data, folder: Path) -> GraphData:
    split = {part: graph[f"{name}_mask"].nonzero()[:, 0] for part, name in
             (("train", "train"), ("valid", "val"), ("test", "test"))}  # fmt: skip
    edges = torch.tensor(each_once(graph)).T
    place = write_ogb_layout(folder, "ogbn-arxiv", edges, graph.x, graph.y, split)
    return read_arxiv(place, replace(load_card("ogbn-arxiv"), classes=int(graph.y.max()) + 1))


BUILDERS = [
    from_pyg,
    from_arrays,
    from_scipy,
    from_networkx,
    from_dgl,
    from_csv,
    from_archive,
    from_folder,
    from_ogb_files,
]


def trained(data: GraphData) -> dict[str, torch.Tensor]:
    """The parameters after a short run."""
    torch.manual_seed(0)
    model = GCN(data.num_features, 16, data.num_classes, num_layers=3)
    settings = {"num_subnets": 2, "epochs": 4, "local_steps": 1, "executor": "serial"}
    GISTTrainer(model, data, **settings, progress=False).fit()
    return model.state_dict()


def assert_same(data: GraphData, expected: GraphData, run: dict[str, torch.Tensor]) -> None:
    for name in ("task", "metric", "num_classes", "directed"):
        assert getattr(data, name) == getattr(expected, name), name
    assert data.edge_weight is None
    for name in ("edge_index", "x", "y", *(f"{split}_mask" for split in SPLITS)):
        got, wanted = getattr(data, name), getattr(expected, name)
        assert got.dtype == wanted.dtype, name
        assert torch.equal(got, wanted), name
    for got, wanted in zip(data.adjacency.rows[:2], expected.adjacency.rows[:2], strict=True):
        assert got.dtype == wanted.dtype
        assert torch.equal(got, wanted)
    assert data.fingerprint() == expected.fingerprint()
    for name, tensor in trained(data).items():
        assert torch.equal(tensor, run[name]), name


def as_pyg(data: GraphData) -> Data:
    masks = {f"{split}_mask": data.mask(split) for split in SPLITS}
    return Data(x=data.x, edge_index=data.edge_index, y=data.y, **masks)


@pytest.fixture(scope="module")
def citations() -> tuple[Data, GraphData, dict[str, torch.Tensor]]:
    """Small, and else like Cora: rows of a bag of words that sum to 1, and nodes in no split."""
    size = {"num_nodes": 140, "num_features": 50, "num_classes": CLASSES, "average_degree": 4}
    graph = as_pyg(load_dataset("csbm", **size, train_share=0.3, val_share=0.2))
    words = (graph.x > 1).float()
    graph.x = words / words.sum(1, keepdim=True).clamp(min=1)
    graph.test_mask &= torch.arange(graph.num_nodes) % 3 > 0
    data = GraphData.from_pyg(graph)
    return graph, data, trained(data)


@pytest.mark.parametrize("build", BUILDERS)
def test_the_same_graph_is_the_same_data_and_the_same_run(build, citations, tmp_path):
    graph, expected, run = citations
    assert_same(build(graph, tmp_path), expected, run)


@pytest.fixture(scope="module")
def cora(real_data_root) -> tuple[Data, GraphData, dict[str, torch.Tensor]]:
    data = load_dataset("cora", root=real_data_root)
    return as_pyg(data), data, trained(data)


@pytest.mark.slow
@pytest.mark.realdata
@pytest.mark.parametrize("build", BUILDERS)
def test_cora_is_the_same(build, cora, tmp_path):
    graph, expected, run = cora
    assert_same(build(graph, tmp_path), expected, run)
