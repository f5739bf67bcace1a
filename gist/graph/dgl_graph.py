"""DGL's graphs, and which models want them; the library is imported when it is first needed.

Whether something is DGL's is told by where its type comes from, so nothing is imported to find out.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from gist.errors import MissingDependencyError

EXTRA = "pip install 'gist-subnets[dgl]'"
"""How DGL is installed."""


@contextmanager
def backend_named() -> Iterator[None]:
    """Names PyTorch as DGL's backend while DGL is imported.

    Unless one is named, DGL says so in a line and writes a file into the home directory.
    """
    named = "DGLBACKEND" in os.environ
    os.environ.setdefault("DGLBACKEND", "pytorch")
    try:
        yield
    finally:
        if not named:
            del os.environ["DGLBACKEND"]


@cache
def import_dgl() -> Any:
    """DGL.

    Raises:
        MissingDependencyError: it is not installed, or importing it fails.
    """
    try:
        with backend_named(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its source, when that is compiled first
            return importlib.import_module("dgl")
    except (ImportError, OSError) as error:  # later versions look for a library of this torch
        raise MissingDependencyError(
            "DGL cannot be imported", got=str(error).partition("\n")[0], remedy=EXTRA
        ) from error


@cache
def is_from(kind: type, package: str) -> bool:
    """Whether a type is one of a package's, or derives from one."""
    return any(base.__module__.partition(".")[0] == package for base in kind.__mro__)


def is_from_dgl(kind: type) -> bool:
    """Whether a type is one of DGL's, or derives from one."""
    return is_from(kind, "dgl")


def takes_dgl_graph(model: nn.Module) -> bool:
    """Whether a model is called with a ``DGLGraph``: a layer in it is DGL's, or says so.

    A layer says so with ``takes_dgl_graph = True``, as the grouped forms of DGL's layers do.
    """
    return any(
        is_from_dgl(type(module)) or getattr(module, "takes_dgl_graph", False)
        for module in model.modules()
    )


def needs_incoming_edges(layer: nn.Module) -> bool:
    """Whether a layer of DGL raises where a node receives no edge, as it does by default."""
    return is_from_dgl(type(layer)) and not getattr(layer, "_allow_zero_in_degree", True)


def dgl_graph(indptr: Tensor, indices: Tensor, num_sources: int) -> Any:
    """A ``DGLGraph`` from compressed rows, whose edges keep their order.

    Args:
        indptr: ``[T + 1]``: the edges of target ``i`` are ``indptr[i]`` to ``indptr[i + 1]``.
        indices: ``[E]`` sources, of the same dtype.
        num_sources: Where they are not as many as the targets, the graph has two types of nodes.

    Raises:
        MissingDependencyError: DGL cannot be imported, or not be used on this device.
        TypeError: tensors without memory, which DGL would read all the same.
    """
    if indptr.is_meta or isinstance(indptr, FakeTensor):
        raise TypeError("DGL computes with values, not with shapes alone")
    dgl = import_dgl()
    # Numbered as they come; some of DGL's kernels fail where edges have no numbers.
    edges = torch.arange(indices.numel(), dtype=indices.dtype, device=indices.device)
    rows = ("csc", (indptr, indices, edges))
    targets = indptr.numel() - 1
    try:
        if num_sources == targets:
            return dgl.graph(rows, num_nodes=targets)
        return dgl.heterograph(
            {("source", "to", "target"): rows}, {"source": num_sources, "target": targets}
        )
    except dgl.DGLError as error:
        raise MissingDependencyError(
            f"this build of DGL cannot use {indptr.device}",
            got=str(error).partition("\n")[0],
            remedy="install one that can, or train on the CPU",
        ) from error
