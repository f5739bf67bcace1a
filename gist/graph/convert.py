"""What users have (arrays, PyG, scipy, networkx) turned into the tensors of a graph.

Shape legend: ``N`` nodes, ``E`` directed edges, ``F`` features, ``C`` output columns.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from numbers import Integral
from typing import Any

import networkx as nx
import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.utils import coalesce, from_scipy_sparse_matrix, scatter

from gist.errors import ConfigError, DataError, one_of
from gist.graph.dgl_graph import import_dgl
from gist.metrics import METRICS, Task

SPLITS = ("train", "val", "test")

WEIGHT = "weight"
"""The name of weights that graphs need not have; a name that was chosen must be there."""


_DENSE = ".toarray() or .to_dense() for a sparse matrix"


def as_tensor(what: str, value: Any, remedy: str = f"convert it first, e.g. {_DENSE}") -> Tensor:
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
            remedy=remedy,
        ) from error


def as_features(x: Any, dtype: torch.dtype | None = None) -> Tensor:
    """``[N, F]`` features of ``dtype``.

    Without one tensors keep theirs, and arrays and lists take torch's default.

    Raises:
        DataError: ``x`` is not a dense array of numbers.
    """
    features = as_tensor("features", x)
    if features.is_complex() or (isinstance(x, Tensor) and dtype is None):
        return features
    return features.to(dtype or torch.get_default_dtype())


def as_edge_values(what: str, values: Any, x: Tensor) -> Tensor | None:
    """What edges carry, on the device of the features ``x`` and as exact as these; None for None.

    Raises:
        DataError: ``values`` is not a dense array of numbers; ``what`` names it in the message.
    """
    if values is None:
        return None
    tensor = as_tensor(what, values).to(x.device)
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    return tensor if tensor.is_complex() else tensor.to(kind)


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
            remedy="count nodes from 0, in the order of the rows of x",
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
    remedy = f"numpy.unique(y, return_inverse=True)[1] numbers classes with names; {_DENSE}"
    labels = as_tensor("labels", y, remedy)
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


def missing_reverses(edge_index: Tensor, edge_weight: Tensor | None, num_nodes: int) -> Tensor:
    """The edges to reverse so that each has a reverse of the same weight, duplicates counted.

    Args:
        edge_index: ``[2, E]`` endpoints in ``[0, N)``.
        edge_weight: ``[E]`` or None.
        num_nodes: ``N``.

    Returns:
        ``[K]`` positions in ``edge_index``, in the order of the reverses' endpoints.
    """
    if edge_index.numel() == 0:
        return edge_index[0]
    source, target = edge_index.cpu().numpy()
    # how often an edge occurs among the reverses, less how often it occurs itself
    key = np.concatenate([source * num_nodes + target, target * num_nodes + source])
    weight = None if edge_weight is None else np.tile(edge_weight.cpu().numpy(), 2)
    # stable: within a group of equal edges the reverses, the second half, come last
    order = np.argsort(key, kind="stable") if weight is None else np.lexsort((weight, key))
    count = np.where(order < len(source), -1, 1)
    key = key[order]
    new = key[1:] != key[:-1]
    if weight is not None:
        weight = weight[order]
        new |= weight[1:] != weight[:-1]
    starts = np.concatenate([[0], np.flatnonzero(new) + 1])
    lacking = np.maximum(np.add.reduceat(count, starts), 0)
    ends = np.append(starts[1:], len(order))
    within = np.arange(lacking.sum()) - np.repeat(np.cumsum(lacking) - lacking, lacking)
    chosen = order[np.repeat(ends - lacking, lacking) + within] - len(source)
    return torch.from_numpy(chosen).to(edge_index.device)


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
    return {**pyg_edge_values(data), **found}


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


def pyg_edge_values(data: Data) -> dict[str, Any]:
    """``edge_weight`` [E] and ``edge_attr`` [E, D] of a ``Data``; None where it has none.

    Without an ``edge_weight``, one column of ``edge_attr`` is one.
    """
    weight, attr = (getattr(data, name, None) for name in ("edge_weight", "edge_attr"))
    if weight is None and isinstance(attr, Tensor) and attr.numel() == len(attr):
        weight, attr = attr.reshape(-1), None
    return {"edge_weight": weight, "edge_attr": attr}


def ogb_inputs(dataset: Any, overrides: dict[str, Any]) -> dict[str, Any]:
    """The arguments of ``GraphData.from_edges`` held by a dataset of OGB, unless overridden.

    Raises:
        DataError: no dataset of nodes of one homogeneous graph.
    """
    item = dataset[0] if hasattr(dataset, "get_idx_split") else None
    if isinstance(item, Data):
        edges, x, attr, y = item.edge_index, item.x, item.edge_attr, item.y
    elif isinstance(item, tuple) and isinstance(item[0], dict) and "edge_index" in item[0]:
        (graph, y), names = item, ("edge_index", "node_feat", "edge_feat")
        edges, x, attr = (graph[name] for name in names)
    elif isinstance(item, tuple) and hasattr(item[0], "ndata"):
        graph, y = item
        edges = torch.stack(graph.edges())
        x, attr = graph.ndata.get("feat"), graph.edata.get("feat")
    else:
        raise DataError(
            "from_ogb reads a dataset with one graph of one type, and labels of its nodes",
            got=type(dataset).__name__,
            expected="NodePropPredDataset, PygNodePropPredDataset or DglNodePropPredDataset of "
            "ogb.nodeproppred",
        )
    edges, attr = as_tensor("edge_index", edges), attr if attr is None else as_tensor("attr", attr)
    if x is None and attr is not None:
        x = mean_of_edges(edges, attr, len(y))
    split = dataset.get_idx_split()
    task: Task = "multilabel" if y.shape[1] > 1 else "multiclass"
    directed = overrides.get("directed", False)
    given = {
        "edge_index": edges,
        "x": x,
        "y": y,
        "edge_attr": attr,
        "train": split["train"],
        "val": split["valid"],
        "test": split["test"],
        "task": task,
        "num_classes": dataset.num_classes if task == "multiclass" else None,
        "metric": {"acc": "accuracy", "rocauc": "roc_auc"}[dataset.eval_metric],
        "symmetrize": not directed and dataset.meta_info["add_inverse_edge"] != "True",
        "name": dataset.name,
    }
    given |= overrides
    carries = any(given.get(name) is not None for name in ("edge_weight", "edge_attr"))
    if given["symmetrize"] and not carries:  # each edge once, as leaderboard scripts have them
        given["edge_index"] = coalesce(as_tensor("edge_index", given["edge_index"]))
    return given


def mean_of_edges(edge_index: Tensor, edge_attr: Tensor, num_nodes: int) -> Tensor:
    """``[N, D]``: the mean of what the edges that a node receives carry; 0 where there are none."""
    columns = (
        scatter(column.double(), edge_index[1], dim_size=num_nodes, reduce="mean")
        for column in edge_attr.unbind(dim=1)
    )
    return torch.stack(list(columns), dim=1).to(edge_attr.dtype)


def dgl_inputs(
    graph: Any, given: dict[str, Any], weight: str | None, edge_attr: str | None
) -> dict[str, Any]:
    """The arguments of ``GraphData.from_edges`` held by a ``DGLGraph``.

    Args:
        graph: One graph, with one type of nodes and of edges.
        given: Entries of ``ndata`` by name, or arrays, by argument.
        weight: The entry of ``edata`` with the weights, or None; :data:`WEIGHT` may be missing.
        edge_attr: The entry of ``edata`` with features of the edges, or None.

    Raises:
        MissingDependencyError: DGL cannot be imported.
        DataError: no such graph, or entries that it lacks.
    """
    if not isinstance(graph, import_dgl().DGLGraph):
        raise DataError(
            "from_dgl reads one DGLGraph",
            got=type(graph).__name__,
            expected="dgl.DGLGraph",
            remedy="pass dataset[0] of a dataset",
        )
    if graph.is_block or not graph.is_homogeneous:
        raise DataError(
            "from_dgl reads a whole graph with one type of nodes and one of edges",
            got="a block of a sampled layer"
            if graph.is_block
            else f"node types {', '.join(graph.ntypes)}, edge types {', '.join(graph.etypes)}",
            remedy="sample with batches=..."
            if graph.is_block
            else "dgl.to_homogeneous(g, ndata=[...]) where all nodes have the same features",
        )
    names = {key: name for key, name in given.items() if isinstance(name, str)}
    if lacking := [key for key, name in names.items() if name not in graph.ndata]:
        raise DataError(
            f"the DGLGraph has no ndata {', '.join(repr(names[key]) for key in lacking)}",
            got=f"entries {sorted(graph.ndata)}",
            remedy=f"set it, or name another or pass arrays as "
            f"{', '.join(f'{key}=' for key in lacking)}",
        )
    chosen = {"weight": None if weight == WEIGHT else weight, "edge_attr": edge_attr}
    for argument, name in chosen.items():
        if name is not None and name not in graph.edata:
            raise DataError(
                f"the DGLGraph has no edata {name!r} ({argument})",
                got=f"entries {sorted(graph.edata)}",
                remedy=f"set it, or {argument}=None",
            )
    values = None if weight is None else graph.edata.get(weight)
    if values is not None and values.dim() == 2 and values.size(1) == 1:
        values = values[:, 0]
    return {
        **given,
        **{key: graph.ndata[name] for key, name in names.items()},
        "edge_index": torch.stack(graph.edges()),
        "edge_weight": values,
        "edge_attr": None if edge_attr is None else graph.edata[edge_attr],
    }


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


def networkx_edges(graph: nx.Graph) -> np.ndarray:
    """Edges ``[2, E]``; node numbers follow the order of ``graph.nodes``.

    An undirected edge gives both directions, a self loop one.
    """
    number = {node: i for i, node in enumerate(graph.nodes)}
    pairs = [(number[u], number[v]) for u, v in graph.edges()]
    index = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    if graph.is_directed():
        return index
    return np.concatenate([index, index[::-1, index[0] != index[1]]], axis=1)


def networkx_edge_values(
    graph: nx.Graph, name: str | None, *, required: bool = False
) -> np.ndarray | None:
    """The attribute ``name`` of every edge of :func:`networkx_edges`: ``[E]`` or ``[E, D]``.

    None where ``name`` is None, or where no edge has the attribute and it is not required.

    Raises:
        DataError: edges without the attribute, or values of unequal shapes.
    """
    if name is None:
        return None
    edges = list(graph.edges(data=name))
    lacking = [(u, v) for u, v, value in edges if value is None]
    if lacking and (required or len(lacking) < len(edges)):
        raise DataError(
            f"edges without the attribute {name!r}",
            got=f"{len(lacking)} of {len(edges)}, first {lacking[0]}",
            expected="it on every edge" if required else "a weight on every edge, or on none",
            remedy="fill it in, or name another attribute"
            if required
            else "fill them in, or pass weight=None",
        )
    if lacking or not edges:
        return None
    values = _equal_shapes(f"the edge attribute {name!r}", (value for _, _, value in edges))
    if graph.is_directed():
        return values
    twice = np.array([u != v for u, v, _ in edges])
    return np.concatenate([values, values[twice]])


def _equal_shapes(what: str, values: Iterable[Any]) -> np.ndarray:
    try:
        return np.array(list(values))
    except ValueError as error:
        raise DataError(f"{what} has unequal shapes", expected="one shape") from error


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
    attributes = (attribute for _, attribute in graph.nodes(data=value))
    return _equal_shapes(f"the node attribute {value!r} ({what})", attributes)


def split_values(graph: nx.Graph, split: str, value: Any) -> Any:
    """As :func:`node_values`, and numbers in place of a list of names of nodes.

    Names are strings and tuples. A list of whole numbers alone counts nodes in their order.

    Raises:
        DataError: names that no node has; or whole numbers which all are names as well, of other
            nodes.
    """
    if isinstance(value, str):
        return node_values(graph, split, value)
    items = value.tolist() if isinstance(value, np.ndarray | Tensor) else value
    if not isinstance(items, Collection):
        return value
    kinds = {type(item) for item in items}
    if bool in kinds or not all(issubclass(kind, str | tuple | Integral) for kind in kinds):
        return value
    numbers = {node: i for i, node in enumerate(graph.nodes)}
    found = [numbers.get(item) for item in items]
    unknown = [item for item, number in zip(items, found, strict=True) if number is None]
    if all(issubclass(kind, Integral) for kind in kinds):
        if unknown or found == list(items):
            return value
        raise DataError(
            f"the {split} split may name nodes, or count them in the order of graph.nodes",
            got="whole numbers that are names of nodes, but not their places",
            remedy=f"give a boolean mask or node attribute as {split}=, or rename the nodes with "
            "networkx.convert_node_labels_to_integers",
        )
    if unknown:
        raise DataError(
            f"the {split} split names nodes that are not in the graph",
            got=f"{len(unknown)} of {len(found)}, first {unknown[0]!r}",
            expected="names of nodes, a boolean mask, or the name of a node attribute",
        )
    return np.array(found)
