"""A graph laid out cluster by cluster, so that batches of clusters are made of slices.

Shape legend: ``N`` nodes, ``E`` stored edges, ``c`` clusters, ``F`` features.

The layout of a saved graph can be kept (:func:`keep_layout`) and is then mapped into memory: a
training run on clusters starts without sorting, copying or even reading the graph.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gist.errors import DataError
from gist.graph import files
from gist.graph.adjacency import Rows, offsets
from gist.graph.batch import training_graph, training_place
from gist.graph.data import GraphData
from gist.graph.parts import Method, cache_folder, cut_graph

_ARRAYS = ("parts", "order", "starts", "indptr", "indices", "x")
_CARRIED = ("weight", "attr")


@dataclass(frozen=True, kw_only=True, eq=False)
class ClusterLayout:
    """Nodes in the order of their clusters.

    Attributes:
        parts: ``[N]`` int64, the cluster of every node of the graph.
        order: ``[N]`` int64, the nodes of the graph in their order here.
        starts: ``[c + 1]`` int64: cluster ``i`` has the places ``starts[i]`` to ``starts[i + 1]``.
        rows: The edges that each place receives; ends are places.
        x: ``[N, F]`` features.
        edges_within: Share of the edges that lie within a cluster.
    """

    parts: Tensor
    order: Tensor
    starts: Tensor
    rows: Rows
    x: Tensor
    edges_within: float


def lay_out(
    data: GraphData,
    num_parts: int,
    *,
    method: Method = "metis",
    seed: int = 0,
    cache: str | os.PathLike[str] | bool = True,
) -> ClusterLayout:
    """The layout that was kept, or that is made now; arguments as for ``cut_graph``.

    Raises:
        ConfigError: more clusters than nodes.
        DataError: what is cached of the cut is damaged, or of another graph.
    """
    folder = _folder(data, num_parts, method, seed, cache)
    if folder is not None and folder.is_dir():
        return _load(folder, data)
    parts = cut_graph(data.adjacency, num_parts, method=method, seed=seed, cache=cache)
    return _lay_out(data, torch.unique(parts, return_inverse=True)[1])


def keep_layout(
    data: GraphData,
    num_parts: int,
    *,
    method: Method = "metis",
    seed: int = 0,
    cache: str | os.PathLike[str] | bool = True,
) -> Path | None:
    """Cuts a graph, and keeps its layout for :func:`lay_out`; arguments as there.

    Takes about as much room on disk as the graph. Of a graph that was not opened from a folder the
    cut alone is kept: its edges and features have to be read anyway.

    Returns:
        The folder; None where there is none to keep it in.

    Raises:
        ConfigError: more clusters than nodes.
        DataError: what is cached of the cut is damaged, or of another graph.
    """
    layout = lay_out(data, num_parts, method=method, seed=seed, cache=cache)
    folder = _folder(data, num_parts, method, seed, cache)
    if folder is None or folder.is_dir():
        return folder
    rows = {name: t for name, t in layout.rows._asdict().items() if t is not None}
    tensors = {"parts": layout.parts, "order": layout.order, "starts": layout.starts}
    arrays = {name: t.numpy() for name, t in {**tensors, **rows, "x": layout.x}.items()}
    facts = {"graph": data.fingerprint(), "edges_within": layout.edges_within}
    files.write_folder(folder, arrays, facts)
    return folder


def keep_training_graph(
    data: GraphData, *, cache: str | os.PathLike[str] | bool = True
) -> GraphData:
    """The training graph of a graph from a folder, kept in one of its own for inductive runs.

    Args:
        data: The whole graph; of one in memory nothing is kept.
        cache: As for ``cut_graph``; runs look where True is.
    """
    part, place = training_graph(data), training_place(data, cache)
    if place is None or part.saved_fingerprint is not None:
        return part
    return GraphData.load(part.save(place))


def _folder(
    data: GraphData, num_parts: int, method: Method, seed: int, cache: str | os.PathLike[str] | bool
) -> Path | None:
    """Where the layout of a graph from a folder is kept; None of any other graph."""
    place = cache_folder(cache)
    if place is None or data.saved_fingerprint is None:
        return None
    return place / f"{method}-{num_parts}-seed{seed}-{data.saved_fingerprint[:16]}-laid-out"


def _load(folder: Path, data: GraphData) -> ClusterLayout:
    remedy = "delete it, and run gist prepare NAME --clusters N"
    kinds = {"graph": str, "edges_within": float}
    arrays, facts = files.read_folder(folder, _ARRAYS, _CARRIED, facts=kinds, remedy=remedy)
    if facts["graph"] != data.fingerprint():
        raise DataError(
            f"{folder} holds the clusters of another graph",
            got=facts["graph"],
            expected=data.fingerprint(),
            remedy=remedy,
        )
    tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in arrays.items()}
    rows = Rows(**{name: tensors.pop(name) for name in Rows._fields if name in tensors})
    return ClusterLayout(**tensors, rows=rows, edges_within=facts["edges_within"])


def _lay_out(data: GraphData, parts: Tensor) -> ClusterLayout:
    device = data.x.device
    sizes = torch.bincount(parts)
    order = torch.argsort(parts, stable=True).to(device)
    starts = offsets(sizes).to(device)
    rows = data.adjacency.rows.take(order)
    kind = rows.indices.dtype
    place = torch.empty(data.num_nodes, dtype=kind, device=device)
    place[order] = torch.arange(data.num_nodes, dtype=kind, device=device)
    rows = rows._replace(indices=place.index_select(0, rows.indices))

    cluster = parts.to(device, kind)[order]
    inside = torch.arange(sizes.numel(), dtype=kind, device=device)
    counts = rows.indptr.index_select(0, starts).diff()
    inside = inside.repeat_interleave(counts, output_size=data.num_edges)
    within = int((cluster.index_select(0, rows.indices) == inside).sum())
    return ClusterLayout(
        parts=parts,
        order=order,
        starts=starts,
        rows=rows,
        x=data.x[order],
        edges_within=within / max(data.num_edges, 1),
    )
