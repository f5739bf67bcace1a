"""What users have (arrays, PyG, scipy, networkx) turned into the tensors of a graph.

Shape legend: ``N`` nodes, ``E`` directed edges, ``F`` features, ``C`` output columns.
"""

from __future__ import annotations

from typing import Any

import networkx as nx
import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.utils import from_scipy_sparse_matrix

from gist.errors import ConfigError, DataError
from gist.graph.metrics import METRICS, Task, one_of

SPLITS = ("train", "val", "test")


def as_tensor(what: str, value: Any) -> Tensor:
    """A plain tensor of ``value``, sharing memory where possible.

    Raises:
        DataError: ``value`` is not a dense array of numbers; ``what`` names it in the message.
    """
    if isinstance(value, Tensor) and value.layout == torch.strided:
        return value.detach().as_subclass(Tensor)
    try:
        if sp.issparse(value) or isinstance(value, Tensor):
            raise TypeError("sparse")
        return torch.from_numpy(np.require(np.asarray(value), requirements=["C", "W"]))
    except (TypeError, ValueError) as error:
        kind = getattr(value, "dtype", None)
        raise DataError(
            f"{what} cannot be read as a dense array of numbers",
            got=type(value).__name__ + (f" of {kind}" if kind is not None else ""),
            expected="a torch tensor, a numpy array or equally long lists of numbers",
            remedy="convert it first, e.g. .toarray() or .to_dense() for a sparse matrix",
        ) from error


def as_features(x: Any) -> Tensor:
    """``[N, F]`` features: tensors keep their dtype, arrays and lists take torch's default.

    Raises:
        DataError: ``x`` is not a dense array of numbers.
    """
    features = as_tensor("features", x)
    if features.is_complex() or isinstance(x, Tensor):
        return features
    return features.to(torch.get_default_dtype())


def as_mask(split: str, value: Any, num_nodes: int) -> Tensor:
    """A boolean mask ``[N]`` from a mask or from node indices.

    Raises:
        DataError: wrong length or dtype, an index out of range or given twice.
    """
    given = as_tensor(f"the {split} split", value)
    mask = torch.zeros(num_nodes, dtype=torch.bool, device=given.device)
    if given.numel() == 0:
        return mask
    if given.dtype == torch.bool and given.shape == mask.shape:
        return given
    if given.dtype == torch.bool or given.is_floating_point() or given.dim() != 1:
        raise DataError(
            f"the {split} split must say for each node whether it belongs to it",
            got=f"{given.dtype} of shape {tuple(given.shape)}",
            expected=f"a boolean mask of shape ({num_nodes},), or a list of node indices",
        )
    low, high = int(given.min()), int(given.max())
    if low < 0 or high >= num_nodes:
        raise DataError(
            f"the {split} split names nodes that do not exist",
            got=f"indices between {low} and {high}",
            expected=f"0 to {num_nodes - 1}",
        )
    mask[given.long()] = True
    if int(mask.sum()) != len(given):
        raise DataError(
            f"the {split} split names a node more than once",
            got=f"{len(given)} indices of {int(mask.sum())} different nodes",
            expected="each node once",
            remedy="if this is a 0/1 mask, convert it to booleans; otherwise remove duplicates",
        )
    return mask


def as_labels(
    y: Any, task: Task | None = None, num_classes: int | None = None
) -> tuple[Tensor, Task, int]:
    """Labels in the dtype of their task, the task, and the number of output columns.

    One label per node means multiclass and a row of labels multilabel, unless ``task`` says
    otherwise. Missing labels may be NaN (or -1); in a multiclass task they become -1.

    Returns:
        ``y`` ([N] int64, [N] float32 or [N, C] float32), the task and ``C`` (binary: 1).

    Raises:
        ConfigError: the task is unknown.
        DataError: the shape does not fit the task, or class numbers are not whole or not dense.
    """
    labels = as_tensor("labels", y)
    if labels.dim() == 2 and labels.size(1) == 1 and task != "multilabel":
        labels = labels[:, 0]
    task = task or ("multilabel" if labels.dim() == 2 else "multiclass")
    one_of("task", task, METRICS)
    if labels.dim() != (2 if task == "multilabel" else 1) or labels.is_complex():
        raise DataError(
            f"labels do not fit the task {task}",
            got=f"{labels.dtype} of shape {tuple(labels.shape)}",
            expected="one row of 0/1 per node" if task == "multilabel" else "one number per node",
            remedy="pass argmax(1) of one-hot labels for multiclass, or give task=",
        )
    if task != "multiclass":
        columns = labels.size(1) if task == "multilabel" else 1
        return labels.float(), task, columns if num_classes is None else num_classes
    if labels.is_floating_point():
        labels = torch.where(labels.isnan(), -1, labels)
        if not bool((labels == labels.long()).all()):
            raise DataError(
                "labels of a multiclass task must be whole numbers",
                got=f"{float(labels[labels != labels.long()][0])}",
                expected="class numbers 0, 1, 2, ...; regression is not supported",
            )
    labels = labels.long()
    if num_classes is None:
        num_classes = int(labels.max()) + 1 if len(labels) else 0
        if num_classes > max(len(labels), 2):
            raise DataError(
                "labels are not class numbers 0, 1, 2, ...: there are fewer nodes than classes",
                got=f"largest label {num_classes - 1} for {len(labels)} nodes",
                expected="consecutive class numbers from 0",
                remedy="renumber with numpy.unique(y, return_inverse=True), or give num_classes=",
            )
    return labels, task, num_classes


def missing_reverses(
    edge_index: Tensor, edge_weight: Tensor | None, num_nodes: int
) -> tuple[Tensor, Tensor | None]:
    """The edges to add so that each edge has a reverse of the same weight, duplicates counted.

    Args:
        edge_index: ``[2, E]`` endpoints in ``[0, N)``.
        edge_weight: ``[E]`` or None.
        num_nodes: ``N``.

    Returns:
        ``[2, K]`` edges and their weights ``[K]`` (None if unweighted), sorted by endpoints.
    """
    if edge_index.numel() == 0:
        return edge_index, edge_weight
    source, target = edge_index.cpu().numpy()
    # how often an edge occurs among the reverses, less how often it occurs itself
    key = np.concatenate([source * num_nodes + target, target * num_nodes + source])
    count = np.repeat([-1, 1], len(source))
    weight = np.zeros(0) if edge_weight is None else np.tile(edge_weight.cpu().numpy(), 2)
    order = np.argsort(key) if edge_weight is None else np.lexsort((weight, key))
    key, count = key[order], count[order]
    new = key[1:] != key[:-1]
    if edge_weight is not None:
        weight = weight[order]
        new |= weight[1:] != weight[:-1]
    starts = np.concatenate([[0], np.flatnonzero(new) + 1])
    first = np.repeat(starts, np.maximum(np.add.reduceat(count, starts), 0))
    missing = torch.from_numpy(np.stack(np.divmod(key[first], num_nodes))).to(edge_index.device)
    if edge_weight is None:
        return missing, None
    return missing, torch.from_numpy(weight[first]).to(edge_weight.device)


def pyg_inputs(data: Data, split: int | None, overrides: dict[str, Any]) -> dict[str, Any]:
    """The arguments of ``GraphData.from_edges`` held by a PyG ``Data``, unless overridden.

    Raises:
        ConfigError: ``split`` is not a column of the masks.
        DataError: no ``Data``, a missing attribute, edge features, or masks of several splits.
    """
    if not isinstance(data, Data):
        raise DataError(
            "from_pyg reads one homogeneous graph",
            got=type(data).__name__,
            expected="torch_geometric.data.Data",
            remedy="pass dataset[0] of a dataset, or to_homogeneous() of a HeteroData",
        )
    names = {"edge_index": "edge_index", "x": "x", "y": "y"} | {s: f"{s}_mask" for s in SPLITS}
    found = {key: getattr(data, name, None) for key, name in names.items()} | overrides
    if lacking := [key for key in names if found[key] is None]:
        raise DataError(
            f"the Data object has no {', '.join(names[key] for key in lacking)}",
            got=f"attributes {sorted(data.keys())}",
            remedy=f"set it, or pass it to from_pyg as {', '.join(f'{key}=' for key in lacking)}",
        )
    for name in set(SPLITS) - set(overrides):
        found[name] = _column(name, found[name], split)
    if "edge_weight" not in overrides:
        found["edge_weight"] = pyg_weight(data)
    return found


def _column(name: str, mask: Any, split: int | None) -> Any:
    """One column of masks that hold several splits side by side."""
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return mask
    columns = mask.size(1)
    if split is None and columns > 1:
        raise DataError(
            f"{name}_mask holds {columns} splits",
            got=f"shape {tuple(mask.shape)}",
            expected="one mask per node",
            remedy=f"choose a column with split=0 to split={columns - 1}",
        )
    if not 0 <= (split or 0) < columns:
        raise ConfigError(
            f"split is not a column of {name}_mask", got=split, expected=f"0 to {columns - 1}"
        )
    return mask[:, split or 0]


def pyg_weight(data: Data) -> Any:
    """Edge weights ``[E]`` of a ``Data``: ``edge_weight``, or a one-column ``edge_attr``; or None.

    Raises:
        DataError: several features per edge.
    """
    weight = getattr(data, "edge_weight", None)
    if weight is None:
        weight = getattr(data, "edge_attr", None)
        if isinstance(weight, Tensor) and weight.dim() == 2 and weight.size(1) == 1:
            weight = weight[:, 0]
        if isinstance(weight, Tensor) and weight.dim() != 1:
            raise DataError(
                "edge_attr holds edge features, which are not supported",
                got=f"shape {tuple(weight.shape)}",
                expected="one weight per edge",
                remedy="pass edge_weight=..., or edge_weight=None to leave them out",
            )
    return weight


def scipy_edges(matrix: Any) -> tuple[Tensor, Tensor | None]:
    """Edges ``[2, E]`` and weights ``[E]`` of a scipy sparse matrix.

    Entry ``(i, j)`` is the edge ``i -> j``. Weights are None where all stored entries are 1.

    Raises:
        DataError: the matrix is dense or not square.
    """
    if not sp.issparse(matrix) or matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise DataError(
            "the adjacency must be a square sparse matrix",
            got=f"{type(matrix).__name__} of shape {getattr(matrix, 'shape', None)}",
            expected="a scipy.sparse matrix of shape (N, N)",
            remedy="wrap a dense array in scipy.sparse.csr_array",
        )
    index, weight = from_scipy_sparse_matrix(matrix)
    return index, None if bool((weight == 1).all()) else weight


def networkx_edges(graph: nx.Graph, weight: str | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Edges ``[2, E]`` and weights ``[E]``; node numbers follow the order of ``graph.nodes``.

    An undirected edge gives both directions (a self loop one). Weights are None where no edge has
    the attribute ``weight``.

    Raises:
        DataError: some edges have the attribute and others have not.
    """
    number = {node: i for i, node in enumerate(graph.nodes)}
    edges = list(graph.edges(data=weight)) if weight else [(u, v, None) for u, v in graph.edges()]
    lacking = [(u, v) for u, v, w in edges if w is None]
    if lacking and len(lacking) < len(edges):
        raise DataError(
            f"edges without the attribute {weight!r}",
            got=f"{len(lacking)} of {len(edges)}, first {lacking[0]}",
            expected="a weight on every edge, or on none",
            remedy="fill them in, or pass weight=None",
        )
    index = np.array([(number[u], number[v]) for u, v, _ in edges], dtype=np.int64).reshape(-1, 2).T
    values = None if lacking or not edges else np.array([w for _, _, w in edges])
    if not graph.is_directed():
        twice = index[0] != index[1]
        index = np.concatenate([index, index[::-1, twice]], axis=1)
        values = None if values is None else np.concatenate([values, values[twice]])
    return index, values


def node_values(graph: nx.Graph, what: str, value: Any) -> Any:
    """``value`` itself, or, where it is a string, that attribute of every node in order.

    Raises:
        DataError: nodes without the attribute, or values of unequal shapes.
    """
    if not isinstance(value, str):
        return value
    lacking = [node for node, attributes in graph.nodes(data=True) if value not in attributes]
    if lacking:
        raise DataError(
            f"nodes without the attribute {value!r} ({what})",
            got=f"{len(lacking)} of {len(graph)}, first {lacking[0]!r}",
            expected="the attribute on every node",
            remedy=f"set it with networkx.set_node_attributes, or pass an array as {what}=",
        )
    try:
        return np.array([attribute for _, attribute in graph.nodes(data=value)])
    except ValueError as error:
        raise DataError(
            f"the node attribute {value!r} ({what}) has unequal shapes", expected="one shape"
        ) from error
