"""Datasets of the Open Graph Benchmark, from their raw files; and its evaluator.

The files are read without OGB's loaders, which ask questions on standard input and unpickle what
they wrote. Its evaluator is loaded alone: importing the ``ogb`` package starts a thread that asks
the network for a newer version, and imports DGL where that is installed.

Shape legend: ``N`` nodes, ``K`` edges of a raw file, ``E`` directed edges, ``D`` edge features,
``C`` output columns.
"""

from __future__ import annotations

import importlib.util
import zlib
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch_geometric.utils import to_undirected

from gist.catalog.records import Card
from gist.errors import ConfigError, DataError, MissingDependencyError
from gist.graph.convert import mean_of_edges
from gist.graph.data import GraphData

EXTRA = "pip install 'gist-subnets[ogb]'"
"""How OGB, and what its files are read with, is installed."""

_CHUNK_ROWS = 2**18
"""Rows of a file that are parsed at a time."""

_PARTS = {"train": "train", "val": "valid", "test": "test"}
"""Splits, and what OGB calls them."""


def read_arxiv(folder: Path, card: Card, *, symmetrize: bool = True) -> GraphData:
    """ogbn-arxiv: a directed graph, made symmetric as leaderboard scripts do.

    Args:
        folder: The dataset's folder.
        card: Its card.
        symmetrize: Give every edge its reverse, each once; or keep the citations directed.

    Raises:
        DataError: the raw files are damaged.
        MissingDependencyError: pandas is not installed.
    """
    edges, num_nodes = _edges(folder)
    edge_index = torch.from_numpy(edges.T.astype(np.int64))
    if symmetrize:
        edge_index = to_undirected(edge_index, num_nodes=num_nodes)
    x = _node_features(folder, num_nodes)
    return _graph(folder, card, edge_index, x, directed=not symmetrize)


def read_products(folder: Path, card: Card) -> GraphData:
    """ogbn-products.

    Raises:
        DataError: the raw files are damaged.
        MissingDependencyError: pandas is not installed.
    """
    edges, num_nodes = _edges(folder)
    edge_index = _both_directions(edges, num_nodes)[0]
    del edges
    return _graph(folder, card, edge_index, _node_features(folder, num_nodes))


def read_proteins(folder: Path, card: Card, *, edge_features: bool = True) -> GraphData:
    """ogbn-proteins: nodes get the mean of their edges' features, as in OGB's example.

    Args:
        folder: The dataset's folder.
        card: Its card.
        edge_features: Keep the features of the edges, ``[E, 8]``, as well.

    Raises:
        DataError: the raw files are damaged.
        MissingDependencyError: pandas is not installed.
    """
    edges, num_nodes = _edges(folder)
    given = _table(folder / "raw" / "edge-feat.csv.gz", np.float32, rows=len(edges))
    edge_index, edge_attr = _both_directions(edges, num_nodes, given)
    del edges, given
    assert edge_attr is not None
    x = mean_of_edges(edge_index, edge_attr, num_nodes)
    return _graph(folder, card, edge_index, x, edge_attr=edge_attr if edge_features else None)


def official_score(name: str, scores: Tensor, y: Tensor, nodes: Tensor) -> float:
    """The score by OGB's own evaluator, which decides what a leaderboard says.

    Args:
        name: As OGB has it, such as ``"ogbn-arxiv"``.
        scores: ``[N, C]`` raw model outputs.
        y: ``[N]`` class numbers, or ``[N, C]`` 0/1.
        nodes: ``[n]`` int64: whom to score.

    Returns:
        Accuracy or ROC-AUC, between 0 and 1.

    Raises:
        ConfigError: OGB does not know the dataset.
        DataError: it refuses the scores or the labels.
        MissingDependencyError: OGB is not installed.
    """
    try:
        evaluator = _evaluate_module().Evaluator(name)
    except ValueError as error:
        raise ConfigError("OGB does not know this dataset", got=repr(name)) from error
    predicted, actual = scores.detach()[nodes].float(), y[nodes]
    if actual.dim() == 1:
        predicted, actual = predicted.argmax(dim=1, keepdim=True), actual[:, None]
    try:
        (score,) = evaluator.eval({"y_true": actual, "y_pred": predicted}).values()
    except RuntimeError as error:
        raise DataError(f"OGB's evaluator of {name} refuses", got=error) from error
    return float(score)


@cache
def _evaluate_module() -> ModuleType:
    """``ogb.nodeproppred.evaluate``, without its package."""
    package = importlib.util.find_spec("ogb")
    if package is None or package.origin is None:
        raise _not_installed("OGB, with its evaluator,")
    file = Path(package.origin).parent / "nodeproppred" / "evaluate.py"
    spec = importlib.util.spec_from_file_location("ogb.nodeproppred.evaluate", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _not_installed(what: str) -> MissingDependencyError:
    return MissingDependencyError(f"{what} is not installed", remedy=EXTRA)


def _graph(folder: Path, card: Card, edge_index: Tensor, x: Tensor, **settings: Any) -> GraphData:
    """The graph with the labels and the split of its files."""
    num_nodes = len(x)
    labels = _table(folder / "raw" / "node-label.csv.gz", np.int64, rows=num_nodes, whole=True)
    multilabel = card.task == "multilabel"
    split: dict[str, Any] = {}
    for name, part in _PARTS.items():
        (file,) = (folder / file for file in card.checksums if file.endswith(f"/{part}.csv.gz"))
        split[name] = _table(file, np.int64, columns=1, below=num_nodes, whole=True)[:, 0]
    try:
        return GraphData.from_edges(
            edge_index,
            x,
            labels,
            **split,
            task=card.task,
            num_classes=None if multilabel else card.classes,
            metric=card.metric,
            name=card.name,
            **settings,
        )
    except DataError as error:
        raise DataError(
            f"the files in {folder} make no graph: {error.what}",
            got=error.got,
            expected=error.expected,
        ) from error


def _edges(folder: Path) -> tuple[np.ndarray, int]:
    """``[K, 2]`` int32 sources and targets as the file has them, and ``N``."""
    raw = folder / "raw"
    num_nodes, num_edges = (
        int(_table(raw / f"num-{what}-list.csv.gz", np.int64, rows=1, columns=1, whole=True)[0, 0])
        for what in ("node", "edge")
    )
    file = raw / "edge.csv.gz"
    edges = _table(file, np.int32, rows=num_edges, columns=2, below=num_nodes, whole=True)
    return edges, num_nodes


def _node_features(folder: Path, num_nodes: int) -> Tensor:
    table = _table(folder / "raw" / "node-feat.csv.gz", np.float32, rows=num_nodes)
    return torch.from_numpy(table)


def _both_directions(
    edges: np.ndarray, num_nodes: int, edge_attr: np.ndarray | None = None
) -> tuple[Tensor, Tensor | None]:
    """Every edge and its reverse, as OGB adds them: a self loop twice.

    They are sorted here, in place where they carry nothing: that takes less memory than sorting
    them later.

    Args:
        edges: ``[K, 2]``.
        num_nodes: ``N``.
        edge_attr: ``[K, D]`` or None.

    Returns:
        ``[2, 2K]`` in the order of source, then target, and ``[2K, D]`` or None.
    """
    key = edges.ravel().astype(np.int64)
    key *= num_nodes
    key += edges[:, ::-1].ravel()
    attr = None
    if edge_attr is None:
        key.sort()
    else:
        order = np.argsort(key, kind="stable")
        key, attr = key[order], torch.from_numpy(edge_attr[order // 2])
    index = np.empty((2, len(key)), dtype=np.int64)
    np.divmod(key, num_nodes, out=(index[0], index[1]))
    return torch.from_numpy(index), attr


def _table(
    file: Path,
    kind: type[np.generic],
    *,
    rows: int | None = None,
    columns: int | None = None,
    below: int | None = None,
    whole: bool = False,
) -> np.ndarray:
    """The numbers of a compressed table without a head, ``[rows, columns]``.

    Args:
        file: A ``.csv.gz``.
        kind: What to return them as.
        rows: How many there must be; None for any.
        columns: How many there must be; None for any.
        below: What they must be below, and not be negative; None for any.
        whole: Whether they must be whole.

    Raises:
        DataError: the file is damaged, or something else is in it.
        MissingDependencyError: pandas is not installed.
    """
    try:
        import pandas as pd  # what OGB reads them with: the same digits are the same numbers
    except ImportError as error:
        raise _not_installed("pandas, which reads OGB's files,") from error
    parts: list[np.ndarray] = []
    try:
        with pd.read_csv(
            file, header=None, dtype=np.float64, compression="gzip", chunksize=_CHUNK_ROWS
        ) as chunks:
            for chunk in chunks:
                values = chunk.to_numpy()
                _check(file, values, sum(map(len, parts)), columns, below, whole)
                parts.append(values.astype(kind))
    except DataError:
        raise
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise _damaged(
            file, got=str(error).strip(), expected="a gzip file of rows of numbers"
        ) from error
    found = sum(map(len, parts))
    if rows is not None and found != rows:
        raise _damaged(
            file, got=f"{found:,} rows", expected=f"{rows:,}, as the counts beside it say"
        )
    return np.concatenate(parts)


def _check(
    file: Path,
    values: np.ndarray,
    before: int,
    columns: int | None,
    below: int | None,
    whole: bool,
) -> None:
    """Refuses numbers that cannot be meant; ``before`` rows were read earlier."""
    if columns is not None and values.shape[1] != columns:
        raise _damaged(file, got=f"{values.shape[1]} columns", expected=columns)
    wrong, expected = ~np.isfinite(values), "as many finite numbers in each row as in the first"
    if whole and not wrong.any():
        wrong, expected = values != np.floor(values), "whole numbers"
    if below is not None and not wrong.any():
        wrong = (values < 0) | (values >= below)
        expected = f"0 to {below - 1}, since there are {below:,} nodes"
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise _damaged(
            file, got=f"{values[row, column]:g} in row {before + row + 1:,}", expected=expected
        )


def _damaged(file: Path, got: Any, expected: Any) -> DataError:
    return DataError(f"{file} is damaged", got=got, expected=expected)
