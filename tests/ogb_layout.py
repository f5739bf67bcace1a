"""Tiny datasets in the raw layout of the Open Graph Benchmark, as its archives unpack."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

CARDS = Path(__file__).resolve().parents[1] / "datasets"

SPLITS = {"ogbn-arxiv": "time", "ogbn-products": "sales_ranking", "ogbn-proteins": "species"}
"""Name of the split's folder, as OGB has it."""


def write_ogb_layout(
    folder: Path,
    name: str,
    edge_index: Any,
    x: Any,
    y: Any,
    split: Mapping[str, Any],
    *,
    edge_feat: Any = None,
    node_files: Mapping[str, Any] | None = None,
) -> Path:
    """Writes ``folder/ogbn_arxiv/`` with everything that OGB's own loaders want to find there.

    Args:
        folder: What OGB calls the root.
        name: As OGB has it, such as ``"ogbn-arxiv"``.
        edge_index: ``[2, K]``, each edge as the raw file has it: where OGB adds the reverses
            (products, proteins), one direction alone.
        x: ``[N, F]`` features; None for a dataset without.
        y: ``[N]`` class numbers, or ``[N, T]`` 0/1 labels.
        split: Node numbers by ``"train"``, ``"valid"`` and ``"test"``.
        edge_feat: ``[K, E]``; None for none.
        node_files: Further files of one row per node, by name, such as ``"node_year"``.

    Returns:
        The dataset's folder.
    """
    place = folder / name.replace("-", "_")
    raw, parts = place / "raw", place / "split" / SPLITS[name]
    for needed in (raw, parts, place / "processed", place / "mapping"):
        needed.mkdir(parents=True)
    (place / "RELEASE_v1.txt").write_text("")
    edges, labels = np.asarray(edge_index).T, np.asarray(y)
    tables = {
        "edge": edges,
        "node-label": labels,
        "num-node-list": np.array([len(labels)]),
        "num-edge-list": np.array([len(edges)]),
        **({} if x is None else {"node-feat": np.asarray(x)}),
        **({} if edge_feat is None else {"edge-feat": np.asarray(edge_feat)}),
        **{key: np.asarray(values) for key, values in (node_files or {}).items()},
    }
    for key, table in tables.items():
        _write(raw / f"{key}.csv.gz", table)
    for key in ("train", "valid", "test"):
        _write(parts / f"{key}.csv.gz", np.asarray(split[key]))
    return place


def write_cards(folder: Path, changes: Mapping[str, Mapping[str, Any]]) -> Path:
    """Copies all dataset cards to a new folder, some of them with other values.

    Loaders compare a dataset with its card: a tiny one needs a card with its own sizes, in a folder
    that takes the place of ``gist.catalog.cards._PLACES``.

    Args:
        folder: A new one.
        changes: Top-level keys and their values, by name of the dataset.

    Returns:
        ``folder``.
    """
    shutil.copytree(CARDS, folder)
    for name, values in changes.items():
        card = folder / f"{name}.yaml"
        card.write_text(yaml.safe_dump({**yaml.safe_load(card.read_text()), **values}))
    return folder


def _write(path: Path, table: np.ndarray) -> None:
    """One row per line, no header; enough digits for a float32 to come back as it was."""
    whole = np.issubdtype(table.dtype, np.integer)
    np.savetxt(path, table, fmt="%d" if whole else "%.9g", delimiter=",")
