"""One graph with everything that link prediction on it needs, checked once on entry.

Shape legend: ``N`` nodes, ``E`` directed edges, ``F`` features, ``C`` columns of an embedding,
``K`` links, ``n`` negatives of each link, ``M`` negatives that all links share.
"""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Data

from gist.errors import ConfigError, DataError, one_of
from gist.graph import convert
from gist.graph.data import GraphData
from gist.graph.dgl_graph import is_from_dgl
from gist.graph.link_metrics import hits_of, link_metric, rank_scores
from gist.graph.link_sampling import hold_out, links_of, negatives_for

HELD_OUT = ("val", "test")
"""Splits whose links are no edges that messages pass along."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class LinkData:
    """A graph some of whose links are held out, to be predicted.

    Build it with :meth:`split`, which draws the links that are held out, or with
    :meth:`from_edges`, where they are known. Nodes need features, but no labels.

    A link is a pair of different nodes: the score of a pair is a dot product of embeddings, which
    is that of the reversed pair too. So messages pass along an undirected graph, of the training
    links alone.

    Attributes:
        graph: Features, and the training links as edges in both directions, with weights and
            features of edges where there are any. Its labels and splits are not looked at.
        val: ``[2, K]`` int64: links for validation, each once.
        test: ``[2, K]``.
        val_negatives: Pairs that are no links, which the links are to be told from: ``[K, n]``
            int64 for ``"mrr"``, where row ``i`` holds nodes in place of the second one of link
            ``i``; ``[2, M]`` for ``"hits@K"``, the same pairs for all links.
        test_negatives: Likewise.
        metric: ``"mrr"`` or ``"hits@K"``, as the Open Graph Benchmark has them: see
            :func:`~gist.graph.link_metrics.link_metric`.

    Raises:
        DataError: links held out that are edges or are held out twice, negatives that are links, or
            anything else that cannot be trained on, see the messages.
        ConfigError: an unknown metric, or fewer negatives than the K of ``"hits@K"``.
    """

    graph: GraphData
    val: Tensor
    test: Tensor
    val_negatives: Tensor
    test_negatives: Tensor
    metric: str = "mrr"

    def __post_init__(self) -> None:
        hits = hits_of(self.metric)
        _refuse_directions(self.graph)
        for name in HELD_OUT:
            links, negatives = getattr(self, name), getattr(self, f"{name}_negatives")
            _check_nodes(name, links, self.graph)
            rows = links.size(1) if hits is None else 2
            _check_nodes(f"{name}_negatives", negatives, self.graph, rows)
            if hits is not None and negatives.size(1) < hits:
                raise ConfigError(
                    f"{self.metric} needs as many negatives as K",
                    got=f"{negatives.size(1)} in {name}_negatives",
                    expected=f"at least {hits}",
                    remedy=f"num_negatives={hits} or more, or a smaller K",
                )
        self._check_links()

    def __repr__(self) -> str:
        links = " / ".join(f"{self.links(name).size(1):,}" for name in convert.SPLITS)
        each = " each" if self.metric == "mrr" else ""
        return (
            f"LinkData({self.name!r}, {self.num_nodes:,} nodes, {self.num_features:,} features, "
            f"links {links}, {self.metric} among {self.test_negatives.size(1):,} negatives{each}, "
            f"{self.graph.x.dtype} on {self.graph.x.device})"
        )

    @property
    def name(self) -> str:
        """For reports."""
        return self.graph.name

    @property
    def num_nodes(self) -> int:
        """``N``."""
        return self.graph.num_nodes

    @property
    def num_features(self) -> int:
        """``F``."""
        return self.graph.num_features

    def links(self, split: str) -> Tensor:
        """The links of ``"train"``, ``"val"`` or ``"test"``, each once: ``[2, K]``."""
        one_of("split", split, convert.SPLITS)
        if split == "train":
            return links_of(self.graph.edge_index, self.num_nodes)
        links: Tensor = getattr(self, split)
        return links

    def negative_pairs(self, split: str) -> Tensor:
        """The pairs that the links of ``"val"`` or ``"test"`` are to be told from.

        Returns:
            ``[2, K, n]`` for ``"mrr"``; ``[2, M]`` for ``"hits@K"``.
        """
        one_of("split that is held out", split, HELD_OUT)
        negatives: Tensor = getattr(self, f"{split}_negatives")
        if hits_of(self.metric) is not None:
            return negatives
        return torch.stack([self.links(split)[0][:, None].expand_as(negatives), negatives])

    def scores(self, z: Tensor, split: str = "test") -> tuple[Tensor, Tensor]:
        """Dot products of embeddings ``[N, C]``: of a split's links, and of its negatives.

        Returns:
            ``[K]``, and ``[K, n]`` for ``"mrr"`` or ``[M]`` for ``"hits@K"``.
        """
        pairs = self.negative_pairs(split)
        return rank_scores(z, self.links(split)), rank_scores(z, pairs)

    def evaluate(self, z: Tensor, split: str = "test") -> dict[str, float]:
        """The metric of embeddings on ``"val"`` or ``"test"``.

        For another K, or another metric, ``dataclasses.replace(data, metric="hits@10")``, with
        other negatives where it wants others, measures the same embeddings.

        Args:
            z: ``[N, C]``, as ``trainer.predict()`` gives them.
            split: ``"val"`` or ``"test"``.

        Returns:
            One entry: the metric's name and its value.
        """
        return {self.metric: link_metric(self.metric, *self.scores(z, split))}

    def to(self, device: torch.device | str) -> LinkData:
        """The same data on ``device``; itself where it is there already."""
        if self.graph.to(device) is self.graph:
            return self
        moved = copy.copy(self)  # checked already: not through the constructor
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor | GraphData):
                object.__setattr__(moved, field.name, value.to(device))
        return moved

    def fingerprint(self) -> str:
        """SHA-256, in hex, of graph, links, negatives and metric; the same on every device."""
        digest = hashlib.sha256(f"{self.graph.fingerprint()} {self.metric}".encode())
        for name in HELD_OUT:
            for nodes in (self.links(name), self.negative_pairs(name)):
                digest.update(str(tuple(nodes.shape)).encode())
                digest.update(nodes.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    @classmethod
    def split(
        cls,
        graph: GraphData | Data | Any,
        *,
        val_share: float = 0.05,
        test_share: float = 0.1,
        metric: str = "mrr",
        num_negatives: int | None = None,
        seed: int = 0,
        symmetrize: bool = False,
    ) -> LinkData:
        """Holds out links of a graph, and draws pairs that are none.

        All that is drawn depends on the graph and on the arguments alone. Self loops are no links,
        and parallel edges are one.

        Args:
            graph: A graph with labels or without. Of a PyG ``Data`` these are used: ``x``,
                ``edge_index``, and ``edge_weight`` and ``edge_attr`` if there are any; of a
                ``DGLGraph`` its ``ndata["feat"]``, and ``edata["weight"]`` if there is one.
            val_share: Share of the links that are held out for validation.
            test_share: For testing.
            metric: ``"mrr"`` or ``"hits@K"``.
            num_negatives: As for :meth:`from_edges`.
            seed: What is drawn from.
            symmetrize: Add the reverse of each edge that has none.

        Raises:
            DataError: too few links, or as for :class:`LinkData` and :class:`GraphData`.
            ConfigError: shares, a metric or a number of negatives that cannot be used.
        """
        if not (min(val_share, test_share) > 0 and val_share + test_share < 1):
            raise ConfigError(
                "val_share and test_share must leave links to train on",
                got=f"{val_share!r} and {test_share!r}",
                expected="two numbers above 0, together below 1",
            )
        whole = _unlabelled(**_inputs(graph), symmetrize=symmetrize)
        nodes, edges = whole.num_nodes, whole.edge_index
        links = links_of(edges, nodes)
        if int(min(val_share, test_share) * links.size(1)) < 1:
            raise DataError(
                "the graph is too small to split: a split would have no link",
                got=f"{links.size(1)} links, val_share={val_share}, test_share={test_share}",
                expected="at least 1 link in each",
                remedy="hold out larger shares",
            )
        val, test = hold_out(links, nodes, val_share=val_share, test_share=test_share, seed=seed)
        held = torch.cat([val, test], dim=1)
        kept = ~torch.isin(_keys(edges, nodes), _keys(held, nodes))
        carried = {"edge_weight": whole.edge_weight, "edge_attr": whole.edge_attr}
        return cls.from_edges(
            edges[:, kept],
            whole.x,
            val=val,
            test=test,
            metric=metric,
            num_negatives=num_negatives,
            seed=seed,
            name=whole.name,
            **{name: None if values is None else values[kept] for name, values in carried.items()},
        )

    @classmethod
    def from_edges(
        cls,
        edge_index: Any,
        x: Any,
        *,
        val: Any,
        test: Any,
        val_negatives: Any = None,
        test_negatives: Any = None,
        metric: str = "mrr",
        num_negatives: int | None = None,
        seed: int = 0,
        **edges: Any,
    ) -> LinkData:
        """Takes links that are held out already, as tensors, numpy arrays or lists.

        Args:
            edge_index: ``[2, E]``: the training links, each direction listed.
            x: ``[N, F]`` features.
            val: ``[2, K]``: links for validation, which are not among the edges.
            test: ``[2, K]``: links for testing.
            val_negatives: See :class:`LinkData`; drawn where not given.
            test_negatives: Likewise.
            metric: ``"mrr"`` or ``"hits@K"``.
            num_negatives: What is drawn: for ``"mrr"`` nodes for each link, by default 100; for
                ``"hits@K"`` pairs for each split, by default as many as it has links.
            seed: What is drawn from.
            **edges: ``edge_weight``, ``edge_attr``, ``symmetrize`` and ``name``, as
                :meth:`GraphData.from_edges` has them.

        Raises:
            DataError: as for :class:`LinkData` and :class:`GraphData`.
            ConfigError: a metric or a number of negatives that cannot be used.
        """
        graph = _unlabelled(edge_index, x, **edges)
        device = graph.x.device
        given = {"val_negatives": val_negatives, "test_negatives": test_negatives}
        held: dict[str, Tensor] = {}
        for name, value in {"val": val, "test": test, **given}.items():
            if value is not None:
                nodes = convert.as_tensor(name, value).to(device)
                held[name] = nodes if nodes.is_floating_point() else nodes.long()
        for name in HELD_OUT:
            _check_nodes(name, held[name], graph)
        every = torch.cat([graph.edge_index, held["val"], held["test"]], dim=1)
        links = links_of(torch.cat([every, every.flip(0)], dim=1), graph.num_nodes)
        for name in HELD_OUT:
            if f"{name}_negatives" not in held:
                held[f"{name}_negatives"] = negatives_for(
                    held[name], links, graph.num_nodes, metric, num_negatives, name, seed
                )
        return cls(graph=graph, metric=metric, **held)

    def _check_links(self) -> None:
        nodes = self.num_nodes
        known = {"edges": _keys(self.graph.edge_index, nodes)}
        for name in HELD_OUT:
            links = self.links(name)
            own = _keys(links, nodes)
            if torch.unique(own).numel() < own.numel() or bool((links[0] == links[1]).any()):
                raise DataError(
                    f"the links of the {name} split must be different pairs of different nodes",
                    got="a pair that comes twice, in one direction or both, or a self loop",
                    remedy="torch_geometric.utils.coalesce and remove_self_loops drop these",
                )
            for others, theirs in known.items():
                if bool((same := torch.isin(own, theirs)).any()):
                    raise DataError(
                        f"links of the {name} split are among the {others}: they would leak",
                        got=_first(links[:, same]),
                        expected="every link in one split, and edges of training links alone",
                        remedy="take these links out of one of the two",
                    )
            known[f"links of the {'validation' if name == 'val' else name} split"] = own
        links = torch.cat(list(known.values()))
        for name in HELD_OUT:
            pairs = self.negative_pairs(name).flatten(1)
            if bool((same := torch.isin(_keys(pairs, nodes), links)).any()):
                raise DataError(
                    f"{name}_negatives hold links",
                    got=_first(pairs[:, same]),
                    expected="pairs without a link in any split",
                    remedy=f"leave out {name}_negatives to have them drawn",
                )


def _inputs(graph: Any) -> dict[str, Any]:
    """The arguments of :func:`_unlabelled` that a graph holds."""
    if isinstance(graph, GraphData):
        names = ("edge_index", "x", "edge_weight", "edge_attr", "directed", "name")
        return {name: getattr(graph, name) for name in names}
    if is_from_dgl(type(graph)):
        return convert.dgl_inputs(graph, {"x": "feat"}, "weight", None)
    if not isinstance(graph, Data):
        raise DataError(
            "LinkData.split reads one homogeneous graph",
            got=type(graph).__name__,
            expected="a GraphData, a torch_geometric.data.Data or a DGLGraph",
            remedy="torch_geometric.data.Data(x=x, edge_index=edge_index) holds tensors; "
            "torch_geometric.utils.from_networkx(graph, group_node_attrs=['x']) makes one of a "
            "networkx graph",
        )
    for name in ("x", "edge_index"):
        if getattr(graph, name, None) is None:
            raise DataError(
                f"the Data object has no {name}",
                got=f"attributes {sorted(graph.keys())}",
                remedy="set it" if name == "edge_index" else "set it; degrees will do for features",
            )
    return {"edge_index": graph.edge_index, "x": graph.x, **convert.pyg_edge_values(graph)}


def _unlabelled(edge_index: Any, x: Any, **edges: Any) -> GraphData:
    """A graph whose labels and splits say nothing."""
    features = convert.as_features(x)
    nodes = torch.arange(len(features) if features.dim() else 0)
    if features.dim() == 2 and len(nodes) < len(convert.SPLITS):
        raise DataError("the graph is too small to split", got=f"{len(nodes)} nodes")
    if edges.get("symmetrize"):
        edges.pop("directed", None)
    graph = GraphData.from_edges(
        edge_index,
        features,
        nodes % 2,
        train=nodes[2:],
        val=nodes[:1],
        test=nodes[1:2],
        num_classes=2,
        **edges,
    )
    _refuse_directions(graph)
    return graph


def _refuse_directions(graph: GraphData) -> None:
    if graph.directed:
        raise DataError(
            "links have no direction: a dot product scores a pair as its reverse",
            got="a directed graph",
            expected="both directions of every edge",
            remedy="symmetrize=True adds the missing reverses",
        )


def _check_nodes(what: str, nodes: Any, graph: GraphData, rows: int = 2) -> None:
    if not isinstance(nodes, Tensor) or nodes.dtype != torch.int64 or nodes.dim() != 2:
        kind = type(nodes).__name__
        got = f"{nodes.dtype} of shape {tuple(nodes.shape)}" if isinstance(nodes, Tensor) else kind
    elif nodes.size(0) != rows or not nodes.numel():
        got = f"shape {tuple(nodes.shape)}"
    elif int(nodes.min()) < 0 or int(nodes.max()) >= graph.num_nodes:
        got = f"numbers between {int(nodes.min())} and {int(nodes.max())}"
    elif nodes.device != graph.x.device:
        got = f"a tensor on {nodes.device}"
    else:
        return
    transposed = isinstance(nodes, Tensor) and nodes.dim() == 2 and nodes.size(1) == rows
    raise DataError(
        f"{what} must hold numbers of nodes",
        got=got,
        expected=f"int64 of shape ({rows}, at least 1) on {graph.x.device}, between 0 and "
        f"{graph.num_nodes - 1}",
        remedy="transpose it with .t()" if transposed else None,
    )


def _keys(pairs: Tensor, num_nodes: int) -> Tensor:
    """``[K]``: a number for each pair, the same for its reverse."""
    low, high = pairs.aminmax(dim=0)
    return low * num_nodes + high


def _first(pairs: Tensor) -> str:
    pair = tuple(pairs[:, 0].tolist())
    return f"{pairs.size(1):,} {'pair' if pairs.size(1) == 1 else 'pairs'}, first {pair}"
