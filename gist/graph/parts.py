"""Cutting a graph into parts of about equal size, few edges apart; and keeping the cut on disk.

Shape legend: ``N`` nodes.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pymetis
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gist.catalog.places import data_folders
from gist.errors import ConfigError, DataError
from gist.graph.adjacency import Adjacency
from gist.partition.streams import stream

Method = Literal["metis", "random"]
METHODS = ("metis", "random")

_FORMAT = 1
_MOST_RECENT = 4
_RECENT: dict[tuple[Any, ...], Tensor] = {}
"""METIS cuts of this process: several trainers on one graph, one cut."""


def cut_graph(
    graph: Adjacency,
    num_parts: int,
    *,
    method: Method = "metis",
    seed: int = 0,
    cache: str | os.PathLike[str] | bool = True,
) -> Tensor:
    """The part of every node.

    Args:
        graph: Weights, directions, self loops and duplicates of its edges play no role.
        num_parts: Number of parts, at most ``N``.
        method: ``"metis"`` minimises the edges between parts (Karypis & Kumar, 1998); ``"random"``
            deals nodes at random. Either gives parts of about the same size.
        seed: The cut depends on this, the edges and the other arguments alone.
        cache: Where METIS cuts are kept: a folder; True for ``clusters`` in the cache folder of the
            datasets, if that exists; False for nowhere.

    Returns:
        ``[N]`` int64 in ``[0, num_parts)``, on the CPU. METIS may leave a part empty.

    Raises:
        ConfigError: more parts than nodes, or an unknown method.
        DataError: the cached cut is damaged, or one of another graph.
    """
    if method not in METHODS:
        raise ConfigError("unknown method", got=repr(method), expected=" or ".join(METHODS))
    if not 1 <= num_parts <= graph.num_nodes:
        raise ConfigError(
            "a graph cannot be cut into that many parts",
            got=f"{num_parts:,} parts of {graph.num_nodes:,} nodes",
            expected="at least 1, and at most one for each node",
        )
    if num_parts == 1:
        return torch.zeros(graph.num_nodes, dtype=torch.int64)
    if method == "random":
        order = torch.randperm(graph.num_nodes, generator=stream("parts", seed))
        return order % num_parts
    key: dict[str, Any] = {
        "format": _FORMAT,
        "graph": edge_hash(graph),
        "parts": num_parts,
        "method": method,
        "seed": seed,
    }
    folder = cache_folder(cache)
    file = None if folder is None else folder / _file_name(key)
    if file is not None and file.exists():
        return _read(file, key, graph.num_nodes)
    parts = _RECENT.get(tuple(key.values()))
    if parts is None:
        parts = _metis(graph, num_parts, seed)
        _RECENT[tuple(key.values())] = parts
        if len(_RECENT) > _MOST_RECENT:
            _RECENT.pop(next(iter(_RECENT)))
    if file is not None:
        _write(file, key, parts)
    return parts.clone()


def cache_folder(cache: str | os.PathLike[str] | bool) -> Path | None:
    """The folder that a setting ``cache`` of :func:`cut_graph` names; None for nowhere."""
    if cache is False:
        return None
    if cache is not True:
        return Path(cache).expanduser()
    datasets = data_folders(None)[-1]
    usable = datasets.is_dir() and os.access(datasets, os.W_OK)
    return datasets / "clusters" if usable else None


def edge_hash(graph: Adjacency) -> str:
    """SHA-256, in hex, of who is joined to whom: no weights, no features."""
    digest = hashlib.sha256(str(graph.num_nodes).encode())
    for tensor in (graph.rows.indptr, graph.rows.indices):
        digest.update(tensor.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _metis(graph: Adjacency, num_parts: int, seed: int) -> Tensor:
    matrix = graph.to_scipy()
    matrix.data = np.ones(matrix.nnz, dtype=np.int8)
    matrix.sum_duplicates()
    row = np.repeat(np.arange(graph.num_nodes, dtype=matrix.indices.dtype), np.diff(matrix.indptr))
    matrix.data = (matrix.indices != row).astype(np.int8)  # METIS crashes on self loops
    matrix.eliminate_zeros()
    if not graph.has_symmetric_pattern:  # and on directed graphs
        matrix = matrix.maximum(matrix.T.tocsr())
    kind = pymetis.zero_copy_dtype()
    # Recursive bisection, not direct k-way: about as few edges cut for few parts, far fewer for
    # thousands, in a fraction of the time, and parts of even size.
    _, parts = pymetis.part_graph(
        num_parts,
        adjacency=pymetis.CSRAdjacency(matrix.indptr.astype(kind), matrix.indices.astype(kind)),
        options=pymetis.Options(seed=seed + 1),  # 0 is the same as 1 to METIS
        recursive=True,
    )
    return torch.as_tensor(parts, dtype=torch.int64)


def _file_name(key: dict[str, Any]) -> str:
    return "{method}-{parts}-seed{seed}-".format(**key) + f"{key['graph'][:16]}.safetensors"


def _write(file: Path, key: dict[str, Any], parts: Tensor) -> None:
    small = parts.to(torch.int32)
    metadata = {**key, "sha256": _digest(small)}
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}-")
    os.close(handle)
    try:
        save_file({"parts": small}, name, metadata={"cut": json.dumps(metadata)})
        os.chmod(name, 0o644)
        os.replace(name, file)
    finally:
        Path(name).unlink(missing_ok=True)


def _read(file: Path, key: dict[str, Any], num_nodes: int) -> Tensor:
    remedy = "delete it, and the graph is cut anew"
    try:
        with safe_open(file, "pt") as stored:
            found = json.loads((stored.metadata() or {})["cut"])
            parts: Tensor = stored.get_tensor("parts")
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise DataError(f"{file} is damaged", got=error, remedy=remedy) from error
    differ = [name for name, value in key.items() if found.get(name) != value]
    if differ:
        raise DataError(
            f"{file} holds the cut of another graph, or another cut",
            got=", ".join(f"{name} {found.get(name)}" for name in differ),
            expected=", ".join(f"{name} {key[name]}" for name in differ),
            remedy=remedy,
        )
    if parts.shape != (num_nodes,) or found.get("sha256") != _digest(parts):
        raise DataError(
            f"{file} is damaged: its content is not what was written",
            got=f"{parts.dtype} of shape {tuple(parts.shape)}",
            remedy=remedy,
        )
    return parts.long()


def _digest(parts: Tensor) -> str:
    return hashlib.sha256(parts.contiguous().numpy().data).hexdigest()
