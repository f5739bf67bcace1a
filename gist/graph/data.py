"""One graph with everything that training on it needs, checked once on entry.

Shape legend: ``N`` nodes, ``E`` directed edges, ``F`` features, ``C`` output columns.
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import networkx as nx
import numpy as np
import torch
from torch import Tensor
from torch_geometric.data import Data

from gist.errors import ConfigError, DataError, one_of
from gist.graph import convert, files
from gist.graph.adjacency import Adjacency
from gist.graph.convert import SPLITS
from gist.graph.csv_files import csv_inputs
from gist.graph.dgl_graph import is_from
from gist.metrics import METRICS, Metric, Task, is_defined

_SETTINGS = ("task", "metric", "num_classes", "directed", "name")
_KNOWN = ("is_symmetric", "has_symmetric_pattern", "has_self_loops")
_FACTS = {
    "settings": {name: files.SETTINGS[name] for name in _SETTINGS},
    "known": dict.fromkeys(_KNOWN, bool),
    "fingerprint": str,
}


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class GraphData:
    """A graph, its features, labels and splits.

    Build it from what you have with :meth:`from_pyg`, :meth:`from_dgl`, :meth:`from_ogb`,
    :meth:`from_edges`, :meth:`from_scipy`, :meth:`from_networkx` or :meth:`from_csv`, or
    :meth:`load` a saved one; the constructor takes tensors in their final form. Nodes outside all
    splits need no label. Duplicate edges and self loops are kept as they are.

    Attributes:
        x: ``[N, F]`` features, made contiguous float32 (float64 is kept). Products with the graph
            are computed once and remembered.
        adjacency: The edges.
        y: Labels: ``[N]`` int64 (multiclass), ``[N]`` float 0/1 (binary), ``[N, C]`` float 0/1
            (multilabel).
        train_mask: ``[N]`` bool. The three splits share no node and none is empty.
        val_mask: ``[N]`` bool.
        test_mask: ``[N]`` bool.
        num_classes: Output columns that a model needs, ``C``; 1 for binary.
        task: ``"multiclass"``, ``"multilabel"`` or ``"binary"``.
        metric: ``"accuracy"``, ``"micro_f1"`` or ``"roc_auc"``, as ``METRICS`` allows for the task.
        directed: Whether edges without a reverse are meant.
        name: For reports.

    Raises:
        DataError: anything that cannot be trained on, see the messages.
        ConfigError: an unknown task or metric, or a metric that does not fit the task.
    """

    x: Tensor
    adjacency: Adjacency
    y: Tensor
    train_mask: Tensor
    val_mask: Tensor
    test_mask: Tensor
    num_classes: int
    task: Task
    metric: Metric
    directed: bool = False
    name: str = "graph"

    _saved_fingerprint: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        self._check_layout()
        object.__setattr__(self, "x", _as_float(self.x))
        _check_task(self.task, self.metric, self.num_classes)
        self._check_splits()
        self._check_labels()
        self._check_symmetry()
        self.adjacency.remember(self.x)

    def __repr__(self) -> str:
        split = " / ".join(f"{int(self.mask(name).sum()):,}" for name in SPLITS)
        kind = "directed, " if self.directed else ""
        return (
            f"GraphData({self.name!r}, {self.num_nodes:,} nodes, {self.num_edges:,} edges, {kind}"
            f"{self.num_features:,} features, {self.task} with {self.num_classes} outputs, "
            f"{self.metric}, split {split}, {self.x.dtype} on {self.x.device})"
        )

    @property
    def num_nodes(self) -> int:
        """``N``."""
        return self.x.size(0)

    @property
    def num_edges(self) -> int:
        """``E``: stored directed edges; an undirected edge counts twice."""
        return self.adjacency.num_edges

    @property
    def num_features(self) -> int:
        """``F``."""
        return self.x.size(1)

    @property
    def num_edge_features(self) -> int:
        """``D``: columns of ``edge_attr``; 0 where the edges have none."""
        return self.adjacency.num_edge_features

    @property
    def edge_index(self) -> Tensor:
        """``[2, E]``: sources and targets."""
        return self.adjacency.edge_index

    @property
    def edge_weight(self) -> Tensor | None:
        """``[E]``, or None for an unweighted graph."""
        return self.adjacency.edge_weight

    @property
    def edge_attr(self) -> Tensor | None:
        """``[E, D]`` features of the edges, or None."""
        return self.adjacency.edge_attr

    def tensors(self) -> list[Tensor]:
        """Features, labels and, where it is there, ``edge_index``: most of what it takes.

        Features and labels of a folder are not in memory until they are used, and left out.
        """
        mapped = self._saved_fingerprint is not None and self.x.device.type == "cpu"
        held = [] if mapped else [self.x, self.y]
        return [*held, *([self.edge_index] if self.adjacency.is_listed else [])]

    def mask(self, split: str) -> Tensor:
        """The mask ``[N]`` of ``"train"``, ``"val"`` or ``"test"``."""
        one_of("split", split, SPLITS)
        mask: Tensor = getattr(self, f"{split}_mask")
        return mask

    def to(self, device: torch.device | str) -> GraphData:
        """The same graph on ``device``; itself where it is there already."""
        if torch.empty(0, device=device).device == self.x.device:
            return self
        moved = copy.copy(self)  # checked already: not through the constructor
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor | Adjacency):
                object.__setattr__(moved, field.name, value.to(device))
        vars(moved)["_saved_fingerprint"] = self.saved_fingerprint
        moved.adjacency.remember(moved.x)
        return moved

    def fingerprint(self) -> str:
        """SHA-256, in hex, of edges with what they carry, features, labels and splits.

        The same on every device; checkpoints carry it to notice that the data changed. The edges
        count in the order in which nodes receive them.
        """
        if (saved := self.saved_fingerprint) is not None:
            return saved
        digest = hashlib.sha256(f"{self.task} {self.num_classes} {self.directed}".encode())
        for tensor in self._content():
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    @property
    def saved_fingerprint(self) -> str | None:
        """The fingerprint in the folder that it was opened from.

        None of a graph that was made in memory, or was changed in place since.
        """
        changed = any(tensor._version for tensor in self._content())
        return None if changed else self._saved_fingerprint

    def _content(self) -> list[Tensor]:
        """All tensors that count."""
        splits = (self.mask(name) for name in SPLITS)
        return [t for t in (*self.adjacency.rows, self.x, self.y, *splits) if t is not None]

    def save(self, path: str | os.PathLike[str], *, extra: Mapping[str, Any] | None = None) -> Path:
        """Writes the graph, complete or not at all; an older one of that name is replaced.

        Args:
            path: One file, if the name ends in ``.npz``: an archive of the arguments of
                :meth:`from_edges`. Otherwise a folder, which :meth:`load` opens without reading
                it. A graph on another device is written as one of the CPU.
            extra: JSON values that ``meta.json`` of a folder is to hold as well.

        Returns:
            ``path``.

        Raises:
            ConfigError: an archive has no place for ``extra``.
            DataError: something else has that name.
        """
        path = Path(path)
        if extra and path.suffix == ".npz":
            raise ConfigError(
                "an archive has no place for extra values",
                got=", ".join(extra),
                remedy="a name without .npz saves a folder",
            )
        data = self.to("cpu")
        settings = {name: getattr(self, name) for name in _SETTINGS}
        splits = {name: self.mask(name) for name in SPLITS}
        if path.suffix == ".npz":
            names = ("edge_index", "edge_weight", "edge_attr", "x", "y")
            tensors = {name: getattr(data, name) for name in names} | splits
            settings["float64"] = self.x.dtype == torch.float64
            files.write_archive(path, {**_arrays(tensors), **settings})
        else:
            tensors = {**data.adjacency.rows._asdict(), "x": data.x, "y": data.y, **splits}
            known = {name: getattr(data.adjacency, name) for name in _KNOWN}
            facts = {"settings": settings, "known": known, "fingerprint": self.fingerprint()}
            files.write_folder(path, _arrays(tensors), {**(extra or {}), **facts})
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, verify: bool = False) -> GraphData:
        """Reads what :meth:`save` wrote, or an archive that was made with ``numpy.savez``.

        An archive is checked as :meth:`from_edges` does. The arrays of a folder, which were checked
        when it was saved, are mapped into memory: they take time and memory as they are used, and
        may be larger than memory. Changes in place do not reach the file.

        Args:
            path: An ``.npz`` archive or a folder. The keys of an archive are arguments of
                :meth:`from_edges`. Its ``x`` gets torch's default dtype; one more key,
                ``float64``, says True for double precision, or False for single.
            verify: Read a folder as a whole and compare it with the sums that were saved with it,
                where it may have been damaged since.

        Raises:
            DataError: it is not there, damaged, of another version, or cannot be trained on.
            ConfigError: settings that contradict one another.
        """
        path = Path(path)
        if path.suffix == ".npz":
            given = {"name": path.stem, **files.read_archive(path)}
            kinds = {None: None, True: torch.float64, False: torch.float32}
            given["x"] = convert.as_features(given["x"], kinds[given.pop("float64", None)])
            return cls.from_edges(**given)
        required = ("indptr", "indices", "x", "y", *SPLITS)
        arrays, facts = files.read_folder(
            path, required, optional=("weight", "attr"), facts=_FACTS, verify=verify
        )
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        edges = (tensors.pop("indptr"), tensors.pop("indices"))
        carried = (tensors.pop("weight", None), tensors.pop("attr", None))
        adjacency = Adjacency.from_csr(*edges, *carried, by_source=True)
        vars(adjacency).update(facts["known"])
        masks = {f"{name}_mask": tensors.pop(name) for name in SPLITS}
        data = cls.__new__(cls)  # checked already: not through the constructor
        vars(data).update(adjacency=adjacency, **tensors, **masks, **facts["settings"])
        vars(data)["_saved_fingerprint"] = facts["fingerprint"]
        data._check_layout()
        adjacency.remember(data.x)
        return data

    @classmethod
    def of(cls, data: Any) -> GraphData:
        """Whatever holds a graph with features, labels and splits.

        Args:
            data: A :class:`GraphData`, a PyG ``Data``, a ``DGLGraph``, or a node dataset of OGB.
                :meth:`from_pyg` and its siblings take more to say what is where.

        Raises:
            DataError: data that cannot be trained on.
        """
        if isinstance(data, GraphData):
            return data
        if isinstance(data, Data):
            return cls.from_pyg(data)
        kind: type = type(data)
        if is_from(kind, "dgl"):
            return cls.from_dgl(data)
        if is_from(kind, "ogb"):
            return cls.from_ogb(data)
        raise DataError(
            "this holds no graph with features, labels and splits",
            got=type(data).__name__,
            expected="a GraphData, a Data of PyG, a DGLGraph or a node dataset of OGB",
            remedy=_maker(data),
        )

    @classmethod
    def from_edges(
        cls,
        edge_index: Any,
        x: Any,
        y: Any,
        *,
        train: Any,
        val: Any,
        test: Any,
        edge_weight: Any = None,
        edge_attr: Any = None,
        task: Task | None = None,
        num_classes: int | None = None,
        metric: Metric | None = None,
        directed: bool = False,
        symmetrize: bool = False,
        name: str = "graph",
    ) -> GraphData:
        """Takes numpy arrays, tensors or lists; everything moves to the device of ``x``.

        Edges are put in order of source, then target, as PyG's ``coalesce`` has them, so that the
        same graph trains to the same bits wherever it comes from. Duplicates are kept.

        Args:
            edge_index: ``[2, E]`` whole numbers: sources and targets, each direction listed.
            x: ``[N, F]`` features. Arrays get torch's default dtype; tensors keep float32 or
                float64.
            y: ``[N]`` or ``[N, 1]`` labels, or ``[N, C]`` 0/1 for multilabel. Nodes outside all
                splits may have -1 or NaN.
            train: A boolean mask ``[N]``, or node indices.
            val: As ``train``.
            test: As ``train``.
            edge_weight: ``[E]`` numbers.
            edge_attr: ``[E, D]`` features of the edges, or ``[E]`` for one.
            task: Without it one label per node means multiclass, a row of labels multilabel.
            num_classes: Without it the largest label plus one, or the columns of ``y``.
            metric: Without it accuracy, or micro-F1 for multilabel.
            directed: Edges without a reverse are meant.
            symmetrize: Add the reverse of each edge that has none of the same weight.
            name: For reports.

        Raises:
            DataError: data that cannot be trained on.
            ConfigError: settings that contradict one another.
        """
        if directed and symmetrize:
            raise ConfigError(
                "a symmetrised graph is not directed",
                got="directed=True, symmetrize=True",
                expected="at most one of them",
            )
        features = convert.as_features(x)
        if features.dim() != 2:
            raise _bad_features(features)
        device, num_nodes = features.device, features.size(0)
        labels, task, num_classes = convert.as_labels(y, task, num_classes)
        edges = convert.as_tensor("edge_index", edge_index).to(device)
        weight = convert.as_edge_values("edge_weight", edge_weight, features)
        attr = convert.as_edge_values("edge_attr", edge_attr, features)
        if attr is not None and attr.dim() == 1:
            attr = attr[:, None]
        adjacency = Adjacency(edges, num_nodes, weight, attr)
        if symmetrize:
            adjacency = _symmetrized(adjacency)
        adjacency = _in_order(adjacency)
        masks = {
            f"{split}_mask": convert.as_mask(split, value, num_nodes).to(device)
            for split, value in zip(SPLITS, (train, val, test), strict=True)
        }
        return cls(
            x=features,
            adjacency=adjacency,
            y=labels.to(device),
            **masks,
            num_classes=num_classes,
            task=task,
            metric=metric or METRICS[task][0],
            directed=directed,
            name=name,
        )

    @classmethod
    def from_pyg(cls, data: Data, *, split: int | None = None, **overrides: Any) -> GraphData:
        """Takes a PyG ``Data`` with x, edge_index, y, train_mask, val_mask and test_mask.

        Weights are ``edge_weight``, or without it a one-column ``edge_attr``; any other
        ``edge_attr`` holds features of the edges.

        Args:
            data: One homogeneous graph.
            split: The column to use where masks hold several splits.
            **overrides: Arguments of :meth:`from_edges`, which take the place of what ``data``
                holds: ``train=`` for its ``train_mask``, ``task="binary"``, ``symmetrize=True``.

        Raises:
            DataError: data that cannot be trained on.
            ConfigError: settings that contradict one another.
        """
        return cls.from_edges(**convert.pyg_inputs(data, split, overrides))

    @classmethod
    def from_dgl(
        cls,
        graph: Any,
        *,
        x: Any = "feat",
        y: Any = "label",
        train: Any = "train_mask",
        val: Any = "val_mask",
        test: Any = "test_mask",
        weight: str | None = convert.WEIGHT,
        edge_attr: str | None = None,
        **settings: Any,
    ) -> GraphData:
        """Takes a ``DGLGraph`` with one type of nodes and of edges. Self loops are kept.

        Args:
            graph: The graph.
            x: The name of an entry of ``ndata``, or an array ``[N, F]``.
            y: The name of an entry of ``ndata``, or an array.
            train: The name of an entry of ``ndata``, a mask, or node indices.
            val: As ``train``.
            test: As ``train``.
            weight: The entry of ``edata`` with the weights; None, or no entry ``"weight"``, for an
                unweighted graph.
            edge_attr: The entry of ``edata`` with the features of the edges.
            **settings: The other arguments of :meth:`from_edges`.

        Raises:
            MissingDependencyError: DGL cannot be imported.
            DataError: data that cannot be trained on.
            ConfigError: settings that contradict one another.
        """
        given = {"x": x, "y": y, "train": train, "val": val, "test": test}
        found = convert.dgl_inputs(graph, given, weight, edge_attr)
        features = convert.as_features(found.pop("x"))
        if len(features) != graph.num_nodes():
            raise _mismatch("x", len(features), graph.num_nodes(), "the graph")
        return cls.from_edges(x=features, **{**found, **settings})

    @classmethod
    def from_ogb(cls, dataset: Any, **overrides: Any) -> GraphData:
        """Takes a dataset of ``ogb.nodeproppred``: its graph, labels and official split.

        Edges of a directed graph get their reverses, each edge once, as leaderboard scripts do,
        unless ``directed=True`` is given. Without features of the nodes ``x`` is the mean of those
        of the edges that a node receives.

        Args:
            dataset: A ``NodePropPredDataset``, ``PygNodePropPredDataset`` or
                ``DglNodePropPredDataset``. :func:`gist.load_dataset` needs none of them.
            **overrides: Arguments of :meth:`from_edges`, as for :meth:`from_pyg`.

        Raises:
            DataError: data that cannot be trained on.
            ConfigError: settings that contradict one another.
        """
        return cls.from_edges(**convert.ogb_inputs(dataset, overrides))

    @classmethod
    def from_scipy(cls, matrix: Any, x: Any, y: Any, **settings: Any) -> GraphData:
        """Takes a square scipy sparse matrix whose entry ``(i, j)`` is the edge ``i -> j``.

        That is the convention of PyG and networkx. Stored entries become edge weights, unless all
        are 1. ``settings`` are the other arguments of :meth:`from_edges`.

        Raises:
            DataError: data that cannot be trained on.
            ConfigError: settings that contradict one another.
        """
        edges, weight = convert.scipy_edges(matrix)
        num_nodes = matrix.shape[0]
        features = convert.as_features(x)
        if len(features) != num_nodes:
            raise _mismatch("x", len(features), num_nodes, "the matrix")
        return cls.from_edges(edges, features, y, **{"edge_weight": weight, **settings})

    @classmethod
    def from_networkx(
        cls,
        graph: nx.Graph,
        *,
        x: Any,
        y: Any,
        train: Any,
        val: Any,
        test: Any,
        weight: str | None = convert.WEIGHT,
        edge_attr: str | None = None,
        **settings: Any,
    ) -> GraphData:
        """Takes a networkx graph with any node labels; nodes are numbered as in ``graph.nodes``.

        An undirected graph gives both directions of each edge.

        Args:
            graph: A ``Graph``, ``DiGraph`` or a multigraph.
            x: The name of a node attribute, or an array ``[N, F]`` in node order.
            y: The name of a node attribute, or an array in node order.
            train: The name of a boolean node attribute, a mask, a list of nodes whose names are
                strings or tuples, or indices into ``graph.nodes``. Whole numbers are indices;
                those that could as well be names, of other nodes, are refused.
            val: As ``train``.
            test: As ``train``.
            weight: The edge attribute with the weights; None, or no edge with a ``"weight"``, for
                an unweighted graph.
            edge_attr: The edge attribute with the features of an edge, a number or a list of them.
            **settings: The other arguments of :meth:`from_edges`.

        Raises:
            DataError: data that cannot be trained on.
            ConfigError: settings that contradict one another.
        """
        if not isinstance(graph, nx.Graph):
            raise DataError(
                "from_networkx reads a networkx graph",
                got=type(graph).__name__,
                expected="networkx.Graph, DiGraph or a multigraph",
            )
        splits = {"train": train, "val": val, "test": test}
        arrays = {key: convert.split_values(graph, key, value) for key, value in splits.items()}
        arrays["y"] = convert.node_values(graph, "y", y)
        features = convert.as_features(convert.node_values(graph, "x", x))
        if len(features) != len(graph):
            raise _mismatch("x", len(features), len(graph), "the graph")
        given = {
            "edge_weight": convert.networkx_edge_values(
                graph, weight, required=weight != convert.WEIGHT
            ),
            "edge_attr": convert.networkx_edge_values(graph, edge_attr, required=True),
        }
        edges = convert.networkx_edges(graph)
        return cls.from_edges(edges, features, **{**given, **arrays, **settings})

    @classmethod
    def from_csv(
        cls,
        edges: str | os.PathLike[str],
        features: str | os.PathLike[str],
        labels: str | os.PathLike[str],
        *,
        header: bool = True,
        node_ids: bool = True,
        keep_duplicates: bool = False,
        train: Sequence[Any] | None = None,
        val: Sequence[Any] | None = None,
        test: Sequence[Any] | None = None,
        **settings: Any,
    ) -> GraphData:
        """Takes three files of comma-separated text, each compressed if its name ends in ``.gz``.

        Columns count by their place. Nodes may have any names, compared as text, and are numbered
        in the order of ``features``.

        Args:
            edges: Source, target and, in a third column if there is one, weight.
            features: Node, and then its features.
            labels: Node, label and, in a third column if there is one, ``train``, ``val``,
                ``test`` or nothing. Labels are class numbers from 0, or names, which are numbered
                in sorted order; nodes may be left out, or their labels empty, if in no split.
            header: Whether the first line of each file names its columns.
            node_ids: Without them ``features`` has no column of nodes: they are called 0, 1, 2, ...
            keep_duplicates: Keep an edge that is listed again, which is refused otherwise.
            train: The nodes of this split, in place of those that ``labels`` says.
            val: As ``train``.
            test: As ``train``.
            **settings: The other arguments of :meth:`from_edges`; ``symmetrize=True`` where each
                undirected edge is listed once.

        Raises:
            DataError: a file that cannot be read, or a line that is wrong, by its number; or data
                that cannot be trained on.
            ConfigError: settings that contradict one another.
        """
        inputs = csv_inputs(
            Path(edges),
            Path(features),
            Path(labels),
            header=header,
            node_ids=node_ids,
            keep_duplicates=keep_duplicates,
            splits={"train": train, "val": val, "test": test},
        )
        return cls.from_edges(**{**inputs, **settings})

    def _check_layout(self) -> None:
        for name in ("x", "y", *(f"{split}_mask" for split in SPLITS)):
            if not isinstance(value := getattr(self, name), Tensor):
                raise DataError(
                    f"{name} must be a tensor",
                    got=type(value).__name__,
                    expected="torch.Tensor",
                    remedy="GraphData.from_edges takes arrays and lists",
                )
        if not isinstance(self.adjacency, Adjacency):
            raise DataError(
                "adjacency must hold the edges",
                got=type(self.adjacency).__name__,
                expected="gist.graph.adjacency.Adjacency",
                remedy="GraphData.from_edges takes an edge_index, from_scipy a matrix",
            )
        if self.x.dim() != 2 or not self.x.numel() or self.x.is_complex():
            raise _bad_features(self.x)
        if self.adjacency.num_nodes != self.num_nodes:
            raise _mismatch("adjacency", self.adjacency.num_nodes, self.num_nodes, "x")
        for name in ("y", *(f"{split}_mask" for split in SPLITS)):
            value = getattr(self, name)
            if value.dim() == 0 or len(value) != self.num_nodes:
                raise _mismatch(name, value.numel(), self.num_nodes, "x")
            if value.device != self.x.device:
                raise _elsewhere(name, value.device, self.x.device)
        if self.adjacency.device != self.x.device:
            raise _elsewhere("adjacency", self.adjacency.device, self.x.device)

    def _check_splits(self) -> None:
        taken = torch.zeros_like(self.train_mask, dtype=torch.bool)
        for split in SPLITS:
            mask = self.mask(split)
            if mask.dtype != torch.bool or mask.dim() != 1:
                raise DataError(
                    f"{split}_mask must be a boolean mask",
                    got=f"{mask.dtype} of shape {tuple(mask.shape)}",
                    expected=f"torch.bool of shape ({self.num_nodes},)",
                )
            if not bool(mask.any()):
                raise DataError(
                    f"the {split} split is empty", got="0 nodes", expected="at least 1 node"
                )
            if bool((mask & taken).any()):
                raise DataError(
                    f"the {split} split shares nodes with an earlier split: labels would leak",
                    got=_nodes(mask & taken),
                    expected="train, val and test without a common node",
                )
            taken |= mask

    def _check_labels(self) -> None:
        if self.task == "multiclass":
            layout, fits = "int64 [N]", self.y.dtype == torch.int64 and self.y.dim() == 1
        elif self.task == "binary":
            layout, fits = "float [N]", self.y.is_floating_point() and self.y.dim() == 1
        else:
            columns = self.y.size(1) if self.y.dim() == 2 else None
            layout, fits = "float [N, num_classes]", self.y.is_floating_point()
            fits = fits and columns == self.num_classes
        if not fits:
            raise DataError(
                f"labels do not fit the task {self.task} with {self.num_classes} outputs",
                got=f"{self.y.dtype} of shape {tuple(self.y.shape)}",
                expected=layout,
            )
        used = self.train_mask | self.val_mask | self.test_mask
        y = self.y.reshape(self.num_nodes, -1)
        for missing, what in ((y.isnan().any(1) & used, "NaN"), ((y == -1).any(1) & used, "-1")):
            if bool(missing.any()):
                raise DataError(
                    "nodes in a split have no label",
                    got=f"{what} (no label) at {_nodes(missing)}",
                    expected="a label for every node of train, val and test",
                    remedy="take these nodes out of the splits",
                )
        if self.task == "multiclass":
            wrong, expected = (y < 0) | (y >= self.num_classes), f"0 to {self.num_classes - 1}"
        else:
            wrong, expected = (y != 0) & (y != 1), "0 or 1"
        bad = wrong.any(1) & used
        if bool(bad.any()):
            raise DataError(
                f"labels out of range for the task {self.task}",
                got=f"{y[bad][wrong[bad]][0].item():g} and others at {_nodes(bad)}",
                expected=expected,
                remedy="renumber the classes from 0, or correct num_classes or task",
            )
        for split in ("val", "test"):
            if not is_defined(self.metric, self.y[self.mask(split)]):
                raise DataError(
                    f"ROC-AUC is undefined on the {split} split: no class has both labels there",
                    got=f"{int(self.mask(split).sum()):,} nodes",
                    expected="at least one class with positive and negative nodes",
                    remedy="use a larger or stratified split, or another metric",
                )

    def _check_symmetry(self) -> None:
        if self.directed or self.adjacency.is_symmetric:
            return
        missing = convert.missing_reverses(self.edge_index, self.edge_weight, self.num_nodes)
        if count := len(missing):
            same = "" if self.edge_weight is None else " of the same weight"
            raise DataError(
                f"the graph is directed: edges without a reverse{same}",
                got=f"{count:,} of {self.num_edges:,} edges",
                expected="both directions of every edge",
                remedy="symmetrize=True, as in GraphData.from_pyg(data, symmetrize=True), adds the "
                "missing reverses; directed=True keeps the graph",
            )


def _maker(data: Any) -> str:
    """What may read something that :meth:`GraphData.of` does not take."""
    if isinstance(data, nx.Graph):
        return "GraphData.from_networkx(graph, x=..., y=..., train=..., val=..., test=...)"
    if isinstance(data, str | os.PathLike):
        return "GraphData.load reads a saved graph, GraphData.from_csv text"
    return "dataset[0] of a dataset, to_homogeneous() of a HeteroData, GraphData.from_edges"


def _arrays(tensors: Mapping[str, Tensor | None]) -> dict[str, np.ndarray]:
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    return {name: tensor.contiguous().numpy() for name, tensor in given.items()}


def _as_float(x: Tensor) -> Tensor:
    """Contiguous float32 or float64 features; refuses NaN and infinity."""
    x = x.detach()
    x = (x if x.dtype in (torch.float32, torch.float64) else x.float()).contiguous()
    if bool(torch.isfinite(x.sum())):  # NaN and infinity survive a sum: the cheap case
        return x
    bad = ~torch.isfinite(x).all(dim=1)
    if bool(bad.any()):
        raise DataError(
            "features hold NaN or infinite values",
            got=_nodes(bad),
            expected="finite features",
            remedy="fill the missing values or drop the nodes",
        )
    return x


def _check_task(task: Task, metric: Metric, num_classes: int) -> None:
    one_of("task", task, METRICS)
    if metric not in METRICS[task]:
        raise ConfigError(
            f"the metric does not fit the task {task}",
            got=repr(metric),
            expected=" or ".join(METRICS[task]),
            remedy="micro-F1 of a multiclass task is its accuracy"
            if task == "multiclass"
            else None,
        )
    least = 2 if task == "multiclass" else 1
    if num_classes < least or (task == "binary" and num_classes != 1):
        raise DataError(
            f"num_classes does not fit the task {task}",
            got=num_classes,
            expected="1" if task == "binary" else f"at least {least}",
            remedy='for two classes use task="binary" with one output, or num_classes=2',
        )


def _symmetrized(adjacency: Adjacency) -> Adjacency:
    index, nodes, weight = adjacency.edge_index, adjacency.num_nodes, adjacency.edge_weight
    missing = convert.missing_reverses(index, weight, nodes)
    if not len(missing):
        return adjacency
    one_way = len(convert.missing_reverses(index, None, nodes))
    if one_way < len(missing):
        raise DataError(
            "the two directions of an edge have different weights, so none is the reverse's",
            got=f"{len(missing) - one_way:,} such edges",
            remedy="average the weights first, or keep them with directed=True",
        )
    index = torch.cat([index, index[:, missing].flip(0)], dim=1)
    carried = (weight, adjacency.edge_attr)
    both = [None if t is None else torch.cat([t, t[missing]]) for t in carried]
    return Adjacency(index, nodes, *both)


def _in_order(adjacency: Adjacency) -> Adjacency:
    """The same edges in order of source, then target; duplicates in the order given."""
    source, target = adjacency.edge_index
    key = source * adjacency.num_nodes + target
    if bool((key[1:] >= key[:-1]).all()):
        return adjacency
    order = torch.argsort(key, stable=True)
    carried = (adjacency.edge_weight, adjacency.edge_attr)
    sorted_ = [None if t is None else t[order] for t in carried]
    return Adjacency(adjacency.edge_index[:, order], adjacency.num_nodes, *sorted_)


def _nodes(bad: Tensor) -> str:
    """How many entries of ``bad`` [N] are true, and which is the first."""
    nodes = bad.nonzero()[:, 0]
    return f"{len(nodes):,} {'node' if len(nodes) == 1 else 'nodes'}, first node {int(nodes[0])}"


def _bad_features(x: Tensor) -> DataError:
    return DataError(
        "x must hold one row of features per node, of at least one node and one feature",
        got=f"{x.dtype} of shape {tuple(x.shape)}",
        expected="real numbers of shape [N, F], N and F at least 1",
        remedy="reshape a single feature with x[:, None]" if x.dim() == 1 else None,
    )


def _mismatch(name: str, got: int, num_nodes: int, source: str) -> DataError:
    return DataError(
        f"{name} and {source} disagree on the number of nodes",
        got=got,
        expected=f"{num_nodes}, as in {source}",
    )


def _elsewhere(name: str, got: torch.device, expected: torch.device) -> DataError:
    return DataError(f"{name} is not on the device of x", got=got, expected=expected)
